// The libfabric NIC: names and addresses, good and bad, what a killed process leaves behind, and the probe.
#include <sys/stat.h>

#include "tests/libfabric_halves.h"

namespace railwire {
namespace {

using namespace testing;

TEST_CASE("garbage for addresses is refused") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          std::mt19937 random(7);
          const auto good = half.link->address();
          for (size_t cut = 0; cut < good.size(); ++cut) {
            const std::span<const std::byte> part(good.data(), cut);
            SIDE_CHECK(throws_nic_error([&] { half.link->connect(part); }));
            SIDE_CHECK(throws_nic_error([&] { half.nic->resolve(part); }));
          }
          for (int i = 0; i < 2000; ++i) {
            std::vector<std::byte> garbage(random() % 200);
            for (auto& byte : garbage) byte = static_cast<std::byte>(random());
            if (!garbage.empty() && i % 2) garbage[0] = good[0];
            SIDE_CHECK(throws_nic_error([&] { half.nic->resolve(garbage); }));
          }
          // Single flipped bits: refused, or an address that nobody has. Never a crash.
          for (size_t bit = 0; bit < good.size() * 8; ++bit) {
            auto bent = good;
            bent[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
            try {
              half.nic->forget(half.nic->resolve(bent));
            } catch (const NicError&) {
            }
          }
          half.poll();
          half.meet(wire);
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          half.leave_together(wire);
        });
  });
}

TEST_CASE("a port that was asked for is had, refused while in use, and free again at once") {
  on_every_bed([](const Bed& bed) {
    if (bed.spec == "libfabric:shm") return;
    run_two(
        bed.library,
        [&](const Wire& wire) {
          std::string name;
          {
            Half half(bed.spec);
            half.meet(wire);
            name = half.nic->info().name;
            SIDE_CHECK(name.starts_with("libfabric:tcp://127.0.0.1:"));
            SIDE_CHECK(!name.ends_with(":0"));
            SIDE_CHECK(throws_nic_error([&] { make_libfabric_nic(name, {}); }));
            for (int i = 0; i < 10; ++i) half.send("so that there is a connection that lingers");
            half.poll_until([&] { return half.sent.size() == 10; });
            half.leave_together(wire);
          }
          for (int i = 0; i < 3; ++i) SIDE_CHECK(make_libfabric_nic(name, {})->info().name == name);
          wire.signal();
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          half.poll_until([&] { return half.messages.size() == 10; });
          half.leave_together(wire);
          half.hear(wire);
        });
  });
}

TEST_CASE("what the shm NIC of a killed process left in /dev/shm goes with the next one") {
  on_every_bed([](const Bed& bed) {
    if (bed.spec != "libfabric:shm") return;
    run_two(
        bed.library,
        [&](const Wire& wire) {
          const auto bytes = wire.get();
          const std::string name(reinterpret_cast<const char*>(bytes.data()), bytes.size());
          const auto exists = [&](const std::string& suffix) {
            struct stat status;
            return stat(("/dev/shm/" + name + suffix).c_str(), &status) == 0;
          };
          make_libfabric_nic("libfabric:shm", {});
          SIDE_CHECK(exists(".wake") && exists(".bell") && exists("-0") && exists("-1"));  // it lives
          SIDE_CHECK(kill(wire.other(), SIGKILL) == 0);
          usleep(200'000);  // its descriptors close some time after
          make_libfabric_nic("libfabric:shm", {});
          SIDE_CHECK(!exists(".wake") && !exists(".bell") && !exists("-0") && !exists("-1"));
        },
        [&](const Wire& wire) {
          Half half("libfabric:shm");
          const auto address = half.nic->address();
          const std::string text(reinterpret_cast<const char*>(address.data()), address.size());
          const std::string name = text.substr(text.find("railwire-"), std::strlen("railwire-") + 16);
          wire.put(name.data(), name.size());
          half.poll_until([] { return false; }, 50'000);
        },
        false);
  });
}

TEST_CASE("wrong names of NICs are refused with a reason") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [](const Wire&) {
          for (const char* spec :
               {"libfabric:tcp://", "libfabric:tcp://127.0.0.1:", "libfabric:tcp://127.0.0.1:x",
                "libfabric:tcp://127.0.0.1:65536", "libfabric:tcp://[::1", "libfabric:tcp://192.0.2.77", "efa:nosuch",
                "libfabric:", "libfabric:nosuch", "shm:1", ""}) {
            SIDE_CHECK(throws_nic_error([&] { make_libfabric_nic(spec, {}); }));
          }
          SIDE_CHECK(throws_nic_error([] { make_libfabric_nic("libfabric:shm", {{"link_depth", "0"}}); }));
          SIDE_CHECK(throws_nic_error([] { make_libfabric_nic("libfabric:shm", {{"link_depth", "many"}}); }));
          SIDE_CHECK(make_libfabric_nic("libfabric:shm", {{"link_depth", "32"}})->info().link_depth == 32);
          SIDE_CHECK(make_libfabric_nic("libfabric:tcp", {})->info().name.starts_with("libfabric:tcp://"));
        },
        [](const Wire&) {});
  });
}

TEST_CASE("the probe says what was tried and found") {
  set_libfabric_search({"/nonexistent/libfabric.so.1"});
  const pid_t child = fork();
  if (child == 0) {
    const LibfabricProbe probe = libfabric_probe();
    SIDE_CHECK(probe.attempts.size() == 1);
    SIDE_CHECK(!probe.attempts[0].found && !probe.attempts[0].error.empty());
    SIDE_CHECK(!probe.error.empty() && probe.providers.empty());
    SIDE_CHECK(throws_nic_error([] { make_libfabric_nic("libfabric:shm", {}); }));
    _exit(0);
  }
  set_libfabric_search({});
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire&) {
          set_libfabric_search({"/nonexistent/libfabric.so.1", bed.library});
          const LibfabricProbe probe = libfabric_probe();
          SIDE_CHECK(probe.error.empty() && probe.attempts.size() == 2 && probe.attempts[1].found);
          const auto has = [&](const char* kind) {
            return std::any_of(probe.providers.begin(), probe.providers.end(),
                               [&](const ProviderFound& p) { return p.kind == kind; });
          };
          SIDE_CHECK(has("tcp") && has("shm"));
        },
        [](const Wire&) {});
  });
}

}  // namespace
}  // namespace railwire
