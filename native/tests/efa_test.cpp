// The libfabric NIC over the fake EFA (fake_efa/): what EFA and its libfabrics refuse, version by version.
#include <dlfcn.h>
#include <fcntl.h>

#include "tests/libfabric_halves.h"

namespace railwire {
namespace {

using namespace testing;

const char* const kVersions[] = {"2.0", "2.1", "2.2", "2.3", "2.4", "2.5"};
const char* const kFabrics[] = {"efa", "libfabric:efa-direct"};

// In a process of its own, as a library is opened once.
void with_efa(const std::string& rules, const std::function<void()>& body) {
  CAPTURE(rules);
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setenv("RAILWIRE_LIBFABRIC", RAILWIRE_FAKE_EFA_LIBRARY, 1);
    setenv("RAILWIRE_FAKE_EFA", rules.c_str(), 1);
    try {
      body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "threw: %s\n", error.what());
      _exit(3);
    }
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

// Both halves are here, and so is what delivers between them.
void introduce(Half& a, Half& b) {
  const auto half = [](Half& own, Half& other) {
    own.remote = own.nic->import_memory(other.region.blob);
    own.link->connect(other.link->address());
    own.peer = own.nic->resolve(other.nic->address());
  };
  half(a, b);
  half(b, a);
}

template <class F>
void poll_both(Half& a, Half& b, F&& done) {
  for (const int64_t end = now_ms() + 20'000; !done();) {
    a.poll();
    b.poll();
    SIDE_CHECK(now_ms() < end);
  }
}

void treat(const Half& half, int how) {
  void* library = dlopen(RAILWIRE_FAKE_EFA_LIBRARY, RTLD_NOW | RTLD_NOLOAD);
  SIDE_CHECK(library != nullptr);
  const auto function = reinterpret_cast<void (*)(const void*, int)>(dlsym(library, "fake_efa_treat"));
  const auto name = half.link->address();
  // Version, major, protocol, format, length: the name begins behind them (libfabric_address.cpp).
  function(name.data() + 11, how);
}

std::string why(const std::function<void()>& call) {
  try {
    call();
  } catch (const NicError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_CASE("efa: writes, reads, flushes and bare immediates, on every version and both fabrics") {
  for (const char* version : kVersions) {
    for (const char* fabric : kFabrics) {
      with_efa(std::string("version=") + version, [&] {
        Half a(fabric), b(fabric);
        SIDE_CHECK(a.nic->info().kind == (std::string(fabric) == "efa" ? "efa" : "efa-direct"));
        introduce(a, b);
        for (size_t i = 0; i < kBytes / 2; ++i) a.memory[i] = static_cast<unsigned char>(i * 7 + 1);
        size_t at = 0;
        const size_t lengths[] = {0, 1, 100, 4096, 9000, 1 << 20};
        for (const size_t length : lengths) {
          WorkRequest wr = a.write(at, at, length, WorkRequest::kImmediate, static_cast<uint32_t>(length));
          if (length == 0) wr.local = wr.local_key = nullptr;  // as the engine posts it
          a.post(wr);
          at += length;
        }
        poll_both(a, b, [&] { return a.ends.size() == 6 && b.immediates.size() == 6; });
        for (const Status end : a.ends) SIDE_CHECK(end == Status::kOk);
        SIDE_CHECK(std::equal(a.memory.begin(), a.memory.begin() + static_cast<ptrdiff_t>(at), b.memory.begin()));
        WorkRequest flush = a.write(0, kPad, 0, WorkRequest::kFlush | WorkRequest::kImmediate, 5);
        flush.local = flush.local_key = nullptr;
        a.post(flush);
        b.post(b.write(kBytes / 2, 0, 5000, WorkRequest::kRead));
        poll_both(a, b, [&] { return a.ends.size() == 7 && b.ends.size() == 1; });
        SIDE_CHECK(a.ends.back() == Status::kOk);
        SIDE_CHECK(std::equal(a.memory.begin(), a.memory.begin() + 5000, b.memory.begin() + kBytes / 2));
      });
    }
  }
}

TEST_CASE("efa: messages of every length arrive whole, though efa-direct's are packets and come in any order") {
  for (const char* fabric : kFabrics) {
    with_efa("version=2.4", [&] {
      Half a(fabric), b(fabric);
      introduce(a, b);
      SIDE_CHECK(a.nic->info().max_message_bytes == 65536);
      std::vector<std::string> sent;
      for (size_t i = 0; i < 200; ++i) {
        const size_t length = i % 10 == 0 ? 65536 : i * 97 % 9000;
        sent.emplace_back(length, static_cast<char>('a' + i % 26));
        while (!a.nic->send(a.peer, std::as_bytes(std::span(sent.back())), nullptr)) a.poll(), b.poll();
      }
      poll_both(a, b, [&] { return a.sent.size() == sent.size() && b.messages.size() == sent.size(); });
      SIDE_CHECK(std::all_of(a.sent.begin(), a.sent.end(), [](Status s) { return s == Status::kOk; }));
      std::sort(sent.begin(), sent.end());
      std::sort(b.messages.begin(), b.messages.end());
      SIDE_CHECK(b.messages == sent);
    });
  }
}

// Immediates to a receiver that does not look: with unsolicited receives the queue's size holds them, without as many
// as there are receives.
void immediates_unseen(const std::string& rules, const char* fabric, const std::map<std::string, std::string>& options,
                       uint32_t count) {
  with_efa(rules, [&] {
    Half a(fabric, options), b(fabric, options);
    introduce(a, b);
    for (uint32_t i = 0; i < count; ++i) a.post(a.write(0, 0, 8, WorkRequest::kImmediate, i));
    a.poll_until([&] { return a.ends.size() == count; });
    for (const Status end : a.ends) SIDE_CHECK(end == Status::kOk);
    b.poll_until([&] { return b.immediates.size() == count; });
    std::sort(b.immediates.begin(), b.immediates.end());
    for (uint32_t i = 0; i < count; ++i) SIDE_CHECK(b.immediates[i] == i);
  });
}

TEST_CASE("efa: thousands of immediates do not share a few receives") {
  for (const char* version : kVersions) {
    for (const char* fabric : kFabrics) {
      immediates_unseen(std::string("version=") + version + " rx=256", fabric, {}, 3000);
    }
  }
  const std::map<std::string, std::string> off{{"unsolicited_write_recv", "off"}};
  immediates_unseen("version=2.4", kFabrics[1], off, 3000);
  immediates_unseen("version=2.5", kFabrics[1], off, 3000);
  immediates_unseen("version=2.4 unsolicited=0", kFabrics[1], {}, 3000);  // an old device
}

TEST_CASE("efa: unsolicited_write_recv=off is refused where nothing can do it") {
  const auto text = [](const char* fabric) {
    return why([&] { Half half(fabric, {{"unsolicited_write_recv", "off"}}); });
  };
  with_efa("version=2.3", [&] { SIDE_CHECK(has(text(kFabrics[1]), "it needs 2.4")); });
  with_efa("version=2.4", [&] {
    SIDE_CHECK(has(text(kFabrics[0]), "it needs 2.5"));
    setenv("FI_EFA_USE_UNSOLICITED_WRITE_RECV", "0", 1);
    SIDE_CHECK(text(kFabrics[0]).empty());
  });
  with_efa("version=2.5", [&] { SIDE_CHECK(text(kFabrics[0]).empty()); });
}

TEST_CASE("efa: it is slept on where the library can wait, and naps are bounded by the queue where it cannot") {
  for (const char* version : kVersions) {
    for (const char* fabric : kFabrics) {
      for (const char* device : {"", " cq=4096 speed=100"}) {
        with_efa("version=" + std::string(version) + device, [&] {
          Half half(fabric);
          const bool direct = std::string(fabric) != "efa";
          const bool waits = std::string(version) >= (direct ? "2.3" : "2.5");
          SIDE_CHECK((half.nic->wait_fd() >= 0) == waits);
          const int64_t nap = half.nic->info().longest_nap_ns;
          if (waits) {
            SIDE_CHECK(nap == 0);
          } else {
            // 2,048 or 16,384 writes of 1 KiB at 100 Gb/s
            SIDE_CHECK(nap == (*device ? 167'772 : 1'342'177));
          }
        });
      }
    }
  }
}

TEST_CASE("efa: a queue that overflows ends the NIC's links with the reason, and nothing hangs") {
  for (const char* fabric : kFabrics) {
    with_efa("version=2.5 cq=4096", [&] {
      Half a(fabric), b(fabric);
      introduce(a, b);
      treat(a, 2);
      b.post(b.write(0, 0, 100));  // stays under way
      for (uint32_t i = 0; i < 5000; ++i) a.post(a.write(0, 0, 8, WorkRequest::kImmediate, i));
      a.poll_until([&] { return a.ends.size() == 5000; });
      b.poll_until([&] { return b.ends.size() == 1; });
      SIDE_CHECK(b.ends[0] == Status::kUnreachable);
      SIDE_CHECK(b.link->broken());
      SIDE_CHECK(has(b.nic->failure(), "completion queue of 4096 overflowed"));
      const WorkRequest again = b.write(0, 0, 100);
      SIDE_CHECK(b.link->post({&again, 1}) == 0);
      SIDE_CHECK(has(why([&] { b.nic->create_link(); }), "overflowed"));
      b.send("hello");
      b.poll_until([&] { return b.sent.size() == 1; });
      SIDE_CHECK(b.sent[0] == Status::kUnreachable);
      b.link->close();
      SIDE_CHECK(b.link->closed());
      SIDE_CHECK(a.nic->failure().empty());
    });
  }
}

TEST_CASE("efa: a peer that takes nothing leaves the send queue to the others, and to messages") {
  for (const char* fabric : kFabrics) {
    with_efa("version=2.5 tx=256", [&] {
      Half a(fabric), dead(fabric), dead2(fabric), alive(fabric);
      introduce(a, dead);
      treat(dead, 2);
      treat(dead2, 2);
      const auto fill = [&](Link& link, Half& target) {
        WorkRequest wr = a.write(0, 0, 8);
        const RemoteMemory memory = a.nic->import_memory(target.region.blob);
        wr.remote = memory.base;
        wr.rkey = memory.rkey;
        size_t posted = 0;
        while (posted < 10'000 && link.post({&wr, 1}) == 1) ++posted;
        return posted;
      };
      const auto second = a.nic->create_link(), third = a.nic->create_link();
      second->connect(dead2.link->address());
      third->connect(alive.link->address());
      alive.link->connect(a.link->address());
      const size_t first = fill(*a.link, dead), next = fill(*second, dead2), last = fill(*third, alive);
      SIDE_CHECK(first >= 100);
      SIDE_CHECK(next >= 40);
      SIDE_CHECK(last >= 20);
      const uint64_t to = a.nic->resolve(alive.nic->address());
      SIDE_CHECK(a.nic->send(to, std::as_bytes(std::span("hello")), nullptr));
      Completion out[64];
      size_t ended = 0, heard = 0;
      for (const int64_t end = now_ms() + 10'000; ended < last + 1 || heard < 1;) {
        ended += a.nic->poll(out);
        heard += alive.nic->poll(out);
        SIDE_CHECK(now_ms() < end);
      }
      _exit(0);  // the dead would have to be waited for
    });
  }
}

TEST_CASE("efa: where writes are emulated it says so, and a peer that stands still does not hold our memory") {
  with_efa("version=2.5 write=0", [&] {
    Half a("efa"), b("efa");
    SIDE_CHECK(has(a.nic->info().warning, "emulates"));
    SIDE_CHECK(a.nic->info().closing_fences);
    introduce(a, b);
    a.post(a.write(0, 0, 100, WorkRequest::kImmediate, 3));
    poll_both(a, b, [&] { return a.ends.size() == 1 && b.immediates.size() == 1; });
    treat(b, 1);
    a.post(a.write(0, 0, 100));
    for (int i = 0; i < 100; ++i) a.poll(), b.poll();
    SIDE_CHECK(a.ends.size() == 1);
    a.link->close();
    a.poll_until([&] { return a.ends.size() == 2; });
    SIDE_CHECK(a.ends[1] == Status::kFlushed);
    SIDE_CHECK(a.link->closed());
    SIDE_CHECK(has(why([] { Half direct("libfabric:efa-direct"); }), "efa-direct"));
  });
  with_efa("version=2.5", [] {
    Half a("efa");
    SIDE_CHECK(a.nic->info().warning.empty());
  });
}

TEST_CASE("efa: GPU memory is taken by dma-buf or by address, and refused where only CUDA calls could move it") {
  std::vector<unsigned char> gpu(65536);
  const int fd = open("/dev/null", O_RDONLY);
  const MemorySpec memory{
      .address = gpu.data(), .length = gpu.size(), .dmabuf_fd = fd, .dmabuf_offset = 0, .device = 0};
  for (const char* fabric : kFabrics) {
    for (const char* rules : {"hmem=1", "hmem=1 dmabuf=0"}) {
      with_efa(rules, [&] {
        Half half(fabric);
        SIDE_CHECK(half.nic->info().takes_all_memory);
        SIDE_CHECK(half.nic->refuses(memory).empty());
        Registration registration = half.nic->register_memory(memory);
        SIDE_CHECK(parse_plain_blob(registration.blob, "test").base == reinterpret_cast<uint64_t>(gpu.data()));
        half.nic->deregister(registration);
      });
    }
    for (const char* rules : {"hmem=0", "hmem=1 p2p=0"}) {
      with_efa(rules, [&] {
        Half half(fabric);
        SIDE_CHECK(!half.nic->info().takes_all_memory);
        SIDE_CHECK(has(half.nic->refuses(memory), "cuda:0"));
      });
    }
  }
  ::close(fd);
}

}  // namespace
}  // namespace railwire
