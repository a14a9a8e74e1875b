// The libfabric NIC between two real processes, over tcp and shm, with every libfabric that is at hand: the system's,
// the one in RAILWIRE_LIBFABRIC, and those in RAILWIRE_TEST_LIBFABRICS (separated by colons).
#include "nic/libfabric_nic.h"

#include <doctest/doctest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <random>
#include <set>
#include <sstream>

#include "nic/libfabric_library.h"
#include "tests/two_processes.h"

namespace railwire {
namespace {

using testing::now_ms;
using testing::run_two;
using testing::Wire;

struct Bed {
  std::string library;
  std::string spec;
  int major = 0;  // of the library
};

// The major version of a library, 0 if it is none. Each is opened in a process of its own.
int opens(const std::string& library) {
  const pid_t child = fork();
  if (child == 0) {
    setenv("RAILWIRE_LIBFABRIC", library.c_str(), 1);
    const LibfabricProbe probe = libfabric_probe();
    _exit(probe.providers.empty() ? 0 : std::atoi(probe.version.c_str()));
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

const std::vector<Bed>& beds() {
  static const std::vector<Bed> found = [] {
    std::vector<std::string> libraries{"libfabric.so.1"};
    if (const char* path = std::getenv("RAILWIRE_LIBFABRIC")) libraries.emplace_back(path);
    if (const char* paths = std::getenv("RAILWIRE_TEST_LIBFABRICS")) {
      std::istringstream in(paths);
      for (std::string path; std::getline(in, path, ':');) libraries.push_back(path);
    }
    std::vector<Bed> beds;
    std::set<std::string> seen;
    for (const std::string& library : libraries) {
      const int major = seen.insert(library).second ? opens(library) : 0;
      if (major == 0) continue;
      for (const char* spec : {"tcp://127.0.0.1", "shm"}) beds.push_back({library, spec, major});
    }
    return beds;
  }();
  return found;
}

template <class F>
void on_every_bed(F&& test) {
  if (beds().empty()) MESSAGE("skipped: no libfabric here");
  for (const Bed& bed : beds()) {
    CAPTURE(bed.library);
    CAPTURE(bed.spec);
    test(bed);
  }
}

constexpr size_t kBytes = 8 << 20;
constexpr size_t kPad = kBytes - 64;  // where flushes go

struct RemoteMemory {
  uint64_t base, key;
};

// One NIC with one link and one region.
struct Half {
  explicit Half(const std::string& spec, const std::map<std::string, std::string>& options = {})
      : nic(make_libfabric_nic(spec, options)), memory(kBytes) {
    region = nic->register_memory({.address = memory.data(), .length = memory.size(), .key_hint = random_key()});
    link = nic->create_link();
  }
  ~Half() {
    link.reset();
    nic->deregister(region);
  }

  static uint64_t random_key() { return (uint64_t{std::random_device()()} << 32) | std::random_device()(); }

  void meet(const Wire& wire) {
    const RemoteMemory mine{region.remote_base, region.rkey};
    wire.put(link->address());
    wire.put(nic->address());
    wire.put(&mine, sizeof mine);
    const auto link_address = wire.get();
    const auto nic_address = wire.get();
    const auto theirs = wire.get();
    SIDE_CHECK(link_address.size() <= 128);
    SIDE_CHECK(nic_address.size() <= 256);
    std::memcpy(&remote, theirs.data(), sizeof remote);
    link->connect(link_address);
    peer = nic->resolve(nic_address);
  }

  WorkRequest write(size_t from, size_t to, size_t length, uint32_t flags = 0, uint32_t immediate = 0) {
    return {.local = length ? memory.data() + from : nullptr,
            .local_key = region.local,
            .remote = remote.base + to,
            .rkey = remote.key,
            .length = length,
            .flags = flags,
            .immediate = immediate,
            .context = this};
  }

  // Posts one, however long the link takes to come up.
  void post(const WorkRequest& wr) {
    const int64_t end = now_ms() + 20'000;
    while (link->post({&wr, 1}) == 0) {
      SIDE_CHECK(!link->broken());
      SIDE_CHECK(now_ms() < end);
      poll();
    }
  }

  // Polls once and sorts what came.
  size_t poll() {
    Completion out[16];
    const size_t n = nic->poll(out);
    for (size_t i = 0; i < n; ++i) {
      switch (out[i].kind) {
        case Completion::kWorkRequest:
          SIDE_CHECK(out[i].link == link.get());
          SIDE_CHECK(out[i].context == this);
          ends.push_back(out[i].status);
          last_error = out[i].provider_error;
          break;
        case Completion::kImmediate:
          immediates.push_back(out[i].immediate);
          break;
        case Completion::kMessage:
          messages.emplace_back(reinterpret_cast<const char*>(out[i].data.data()), out[i].data.size());
          break;
        case Completion::kSend:
          sent.push_back(out[i].status);
          break;
      }
    }
    return n;
  }

  template <class F>
  void poll_until(F&& done, int64_t timeout_ms = 20'000) {
    const int64_t end = now_ms() + timeout_ms;
    while (!done()) {
      poll();
      SIDE_CHECK(now_ms() < end);
    }
  }

  // As an idle engine does it. Returns how often it slept.
  template <class F>
  int sleep_until(F&& done) {
    int sleeps = 0;
    const int64_t end = now_ms() + 20'000;
    while (!done()) {
      SIDE_CHECK(now_ms() < end);
      if (poll() > 0) continue;
      if (!nic->arm()) {
        usleep(100);
        continue;
      }
      ++sleeps;
      pollfd fd{nic->wait_fd(), POLLIN, 0};
      if (fd.fd < 0) {
        usleep(100);  // it has none: one naps
      } else {
        SIDE_CHECK(::poll(&fd, 1, 10'000) == 1);  // a lost wake-up ends here
      }
      nic->disarm();
    }
    return sleeps;
  }

  void send(const std::string& text) {
    const int64_t end = now_ms() + 20'000;
    while (!nic->send(peer, std::as_bytes(std::span(text)), this)) {
      SIDE_CHECK(now_ms() < end);
      poll();
    }
  }

  // Waits for the other side's word without ceasing to serve it: manual progress needs both sides' polling.
  std::vector<std::byte> hear(const Wire& wire) {
    poll_until([&] { return wire.ready(); });
    return wire.get();
  }
  void leave_together(const Wire& wire) {
    wire.signal();
    hear(wire);
  }

  std::unique_ptr<Nic> nic;
  std::vector<unsigned char> memory;
  Registration region;
  std::unique_ptr<Link> link;
  RemoteMemory remote{};
  uint64_t peer = 0;
  std::vector<Status> ends, sent;
  std::vector<uint32_t> immediates;
  std::vector<std::string> messages;
  int32_t last_error = 0;
};

unsigned char pattern(size_t i, size_t length) { return static_cast<unsigned char>(i * 131 + length * 7 + 1); }

const size_t kLengths[] = {0, 1, 3, 4096, 65536, 1 << 20, (1 << 20) + 13};

TEST_CASE("writes with immediates arrive byte-exact") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          for (const size_t length : kLengths) {
            for (size_t i = 0; i < length; ++i) half.memory[i] = pattern(i, length);
            half.ends.clear();
            half.hear(wire);
            half.post(half.write(0, 64, length, WorkRequest::kImmediate, static_cast<uint32_t>(length) | 0x80000000u));
            half.poll_until([&] { return half.ends.size() == 1; });
            SIDE_CHECK(half.ends[0] == Status::kOk);
            SIDE_CHECK(half.link->outstanding() == 0);
          }
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          for (const size_t length : kLengths) {
            std::fill(half.memory.begin(), half.memory.end(), 0xee);
            half.immediates.clear();
            wire.signal();
            half.poll_until([&] { return half.immediates.size() == 1; });
            SIDE_CHECK(half.immediates[0] == (static_cast<uint32_t>(length) | 0x80000000u));
            for (size_t i = 0; i < length; ++i) SIDE_CHECK(half.memory[64 + i] == pattern(i, length));
            for (size_t i = 0; i < 64; ++i) SIDE_CHECK(half.memory[i] == 0xee);
            for (size_t i = 0; i < 64; ++i) SIDE_CHECK(half.memory[64 + length + i] == 0xee);
          }
          half.leave_together(wire);
        });
  });
}

TEST_CASE("thousands of writes, both ways at once, each immediate once") {
  static constexpr uint32_t kCount = 20'000;
  const auto side = [](const Bed& bed, const Wire& wire) {
    Half half(bed.spec);
    half.meet(wire);
    uint32_t posted = 0;
    std::vector<WorkRequest> batch;
    half.poll_until([&] {
      batch.clear();
      for (uint32_t i = posted; i < std::min(posted + 64, kCount); ++i) {
        batch.push_back(half.write(i % 4096, kBytes / 2 + i, i % 700, WorkRequest::kImmediate, i));
      }
      posted += static_cast<uint32_t>(half.link->post(batch));
      SIDE_CHECK(!half.link->broken());
      SIDE_CHECK(half.link->outstanding() == posted - half.ends.size());
      return half.ends.size() == kCount && half.immediates.size() == kCount;
    });
    SIDE_CHECK(std::all_of(half.ends.begin(), half.ends.end(), [](Status s) { return s == Status::kOk; }));
    std::sort(half.immediates.begin(), half.immediates.end());
    for (uint32_t i = 0; i < kCount; ++i) SIDE_CHECK(half.immediates[i] == i);
    half.leave_together(wire);
  };
  on_every_bed([&](const Bed& bed) {
    run_two(bed.library, [&](const Wire& wire) { side(bed, wire); }, [&](const Wire& wire) { side(bed, wire); });
  });
}

TEST_CASE("reads bring the peer's bytes") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          for (const size_t length : kLengths) {
            if (length == 0) continue;
            half.ends.clear();
            WorkRequest read = half.write(0, 128, length, WorkRequest::kRead);
            half.post(read);
            half.poll_until([&] { return half.ends.size() == 1; });
            SIDE_CHECK(half.ends[0] == Status::kOk);
            for (size_t i = 0; i < length; ++i) SIDE_CHECK(half.memory[i] == pattern(128 + i, 5));
          }
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          for (size_t i = 0; i < half.memory.size(); ++i) half.memory[i] = pattern(i, 5);
          half.meet(wire);
          half.leave_together(wire);
        });
  });
}

TEST_CASE("a flush proves that what was posted before it has landed") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          for (int round = 1; round <= 20; ++round) {
            const size_t length = round % 2 ? 1000 : 1 << 20;
            std::fill_n(half.memory.begin(), length, static_cast<unsigned char>(round));
            half.ends.clear();
            for (size_t i = 0; i < 4; ++i) half.post(half.write(0, i * length, length));
            half.post(half.write(0, kPad, 8, WorkRequest::kFlush));
            half.poll_until([&] { return half.ends.size() == 5; });
            SIDE_CHECK(std::all_of(half.ends.begin(), half.ends.end(), [](Status s) { return s == Status::kOk; }));
            wire.signal();  // from here on the other looks, and no longer polls
            half.hear(wire);
          }
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          for (int round = 1; round <= 20; ++round) {
            half.hear(wire);
            const size_t length = round % 2 ? 1000 : 1 << 20;
            for (size_t i = 0; i < 4 * length; ++i) SIDE_CHECK(half.memory[i] == round);
            wire.signal();
          }
          half.leave_together(wire);
        });
  });
}

TEST_CASE("messages go both ways, of every length, more than there are buffers") {
  const auto side = [](const Bed& bed, const Wire& wire) {
    Half half(bed.spec);
    half.meet(wire);
    const uint32_t longest = half.nic->info().max_message_bytes;
    SIDE_CHECK(longest == 65536);
    SIDE_CHECK(!half.nic->send(half.peer, std::vector<std::byte>(longest + 1), nullptr));
    std::vector<std::string> sent;
    for (size_t i = 0; i < 2000; ++i) {
      const size_t length = i % 100 == 0 ? longest : (i * 37) % 5000;
      sent.emplace_back(length, static_cast<char>('a' + i % 26));
      half.send(sent.back());
    }
    half.poll_until([&] { return half.messages.size() == sent.size() && half.sent.size() == sent.size(); });
    std::sort(sent.begin(), sent.end());  // both send the same, but order is not promised: long ones are overtaken
    std::sort(half.messages.begin(), half.messages.end());
    SIDE_CHECK(half.messages == sent);
    SIDE_CHECK(std::all_of(half.sent.begin(), half.sent.end(), [](Status s) { return s == Status::kOk; }));
    half.leave_together(wire);
    half.nic->forget(half.peer);
  };
  on_every_bed([&](const Bed& bed) {
    run_two(bed.library, [&](const Wire& wire) { side(bed, wire); }, [&](const Wire& wire) { side(bed, wire); });
  });
}

TEST_CASE("an idle side sleeps, and wakes for messages, writes and the ends of its own work") {
  constexpr int kRounds = 200;
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          int sleeps = 0;
          for (int round = 1; round <= kRounds; ++round) {
            if (round % 10 == 0) usleep(2000);  // time for the other to fall asleep
            if (round % 2) {
              half.send("ping");
            } else {
              half.post(half.write(0, 0, round % 4 ? 64 : 200'000, WorkRequest::kImmediate, 7));
            }
            sleeps += half.sleep_until([&] { return half.immediates.size() == static_cast<size_t>(round); });
          }
          SIDE_CHECK(sleeps > kRounds / 20);
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          int sleeps = 0;
          for (size_t round = 1; round <= kRounds; ++round) {
            sleeps += half.sleep_until([&] { return half.immediates.size() + half.messages.size() == round; });
            half.post(half.write(0, 0, 8, WorkRequest::kImmediate, 9));
          }
          SIDE_CHECK(sleeps > kRounds / 20);
          half.leave_together(wire);
        });
  });
}

TEST_CASE("a NIC with nothing to do lets its caller sleep, and stays asleep") {
  on_every_bed([](const Bed& bed) {
    const auto side = [&](const Wire& wire) {
      Half half(bed.spec);
      half.meet(wire);
      half.post(half.write(0, 0, 100, WorkRequest::kImmediate, 1));
      half.send("hello");
      half.poll_until([&] { return half.ends.size() + half.sent.size() + half.immediates.size() == 3; });
      half.leave_together(wire);
      const int64_t settled = now_ms() + 50;  // while connections are young, arm() says no
      half.poll_until([&] { return now_ms() > settled; });
      int wakes = 0;
      for (const int64_t end = now_ms() + 300; now_ms() < end;) {
        half.poll();
        if (!half.nic->arm()) {
          ++wakes;
          usleep(100);
          continue;
        }
        pollfd fd{half.nic->wait_fd(), POLLIN, 0};
        if (::poll(&fd, 1, 50) > 0) ++wakes;
        half.nic->disarm();
      }
      SIDE_CHECK(wakes < 20);
      half.leave_together(wire);
    };
    run_two(bed.library, side, side);
  });
}

// Posts until the link takes no more, so that much is under way.
void fill(Half& half, size_t length) {
  const int64_t end = now_ms() + 300;
  while (now_ms() < end && !half.link->broken()) {
    const WorkRequest wr = half.write(0, 0, length, WorkRequest::kImmediate, 3);
    if (half.link->post({&wr, 1}) == 0) half.poll();
  }
}

void close_gives_all_back(const Bed& bed, int signal, size_t length) {
  run_two(
      bed.library,
      [&](const Wire& wire) {
        Half half(bed.spec);
        half.meet(wire);
        half.post(half.write(0, 0, 8));
        half.poll_until([&] { return half.ends.size() == 1; });
        half.hear(wire);
        if (signal == SIGSTOP) {
          SIDE_CHECK(kill(wire.other(), SIGSTOP) == 0);
          fill(half, length);
        } else {
          std::vector<WorkRequest> batch(32, half.write(0, 0, length, WorkRequest::kImmediate, 3));
          half.link->post(batch);
          SIDE_CHECK(kill(wire.other(), SIGKILL) == 0);
          fill(half, length);
        }
        const size_t under_way = half.link->outstanding();
        // Short writes over shm end as soon as they are in the peer's queue, and it then takes no more.
        if (signal == SIGSTOP && length > 4096) SIDE_CHECK(under_way > 0);
        const size_t before = half.ends.size();
        const int64_t start = now_ms();
        half.link->close();
        SIDE_CHECK(now_ms() - start < 2000);
        half.link->close();
        SIDE_CHECK(half.link->broken());
        const WorkRequest late = half.write(0, 0, 8);
        SIDE_CHECK(half.link->post({&late, 1}) == 0);
        half.poll_until([&] { return half.link->outstanding() == 0; });
        SIDE_CHECK(half.ends.size() == before + under_way);
        // The source is ours again, and the NIC still works: another link to ourselves.
        half.link = half.nic->create_link();
        for (int i = 0; i < 100; ++i) half.poll();
        SIDE_CHECK(half.ends.size() == before + under_way);
      },
      [&](const Wire& wire) {
        Half half(bed.spec);
        half.meet(wire);
        wire.signal();
        half.poll_until([] { return false; }, 50'000);
      },
      false);
}

TEST_CASE("close() gives every work request back when the peer was killed") {
  on_every_bed([](const Bed& bed) {
    if (bed.spec == "shm" && bed.major < 2) {
      MESSAGE("left out: shm of libfabric 1.17 spins for ever on a lock that a killed peer held");
      return;
    }
    for (const size_t length : {64, 65536, 4 << 20}) {
      CAPTURE(length);
      close_gives_all_back(bed, SIGKILL, length);
    }
  });
}

TEST_CASE("close() gives every work request back when the peer was stopped") {
  on_every_bed([](const Bed& bed) {
    for (const size_t length : {64, 65536, 4 << 20}) {
      CAPTURE(length);
      close_gives_all_back(bed, SIGSTOP, length);
    }
  });
}

TEST_CASE("a link that goes with work outstanding disturbs no other link") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          auto extra = half.nic->create_link();
          wire.put(extra->address());
          extra->connect(half.hear(wire));
          int own = 0;
          WorkRequest wr = half.write(0, 0, 50'000, WorkRequest::kImmediate, 3);
          wr.context = &own;
          const int64_t end = now_ms() + 5000;
          Completion out[1];
          while (extra->post({&wr, 1}) == 0 && now_ms() < end) half.nic->poll(out);
          for (int i = 0; i < 10; ++i) extra->post({&wr, 1});
          extra.reset();  // with held completions, which go with it
          for (uint32_t i = 0; i < 2000; ++i) half.post(half.write(0, 0, 100, WorkRequest::kImmediate, 4));
          half.poll_until([&] { return half.ends.size() == 2000; });
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          auto extra = half.nic->create_link();
          wire.put(extra->address());
          extra->connect(half.hear(wire));
          half.poll_until([&] { return std::count(half.immediates.begin(), half.immediates.end(), 4u) == 2000; });
          half.leave_together(wire);
        });
  });
}

TEST_CASE("closing a tcp link keeps the peer from writing") {
  on_every_bed([](const Bed& bed) {
    if (bed.spec == "shm") return;  // closing_fences is false there
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          SIDE_CHECK(half.nic->info().closing_fences);
          half.meet(wire);
          half.poll_until([&] { return half.immediates.size() > 100; });
          half.link->close();
          std::fill(half.memory.begin(), half.memory.end(), 0);
          wire.signal();
          half.poll_until([&] { return wire.ready(); });
          wire.get();
          SIDE_CHECK(std::all_of(half.memory.begin(), half.memory.end(), [](unsigned char c) { return c == 0; }));
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          std::fill(half.memory.begin(), half.memory.end(), 0xaa);
          half.meet(wire);
          const int64_t end = now_ms() + 20'000;
          while (!half.link->broken()) {
            const WorkRequest wr = half.write(0, 0, 10'000, WorkRequest::kImmediate, 3);
            if (half.link->post({&wr, 1}) == 0) half.poll();
            SIDE_CHECK(now_ms() < end);
          }
          half.poll_until([&] { return half.link->outstanding() == 0; });
          SIDE_CHECK(half.ends.back() == Status::kUnreachable);
          SIDE_CHECK(!half.nic->describe(half.last_error).empty());
          usleep(100'000);
          wire.signal();
        });
  });
}

TEST_CASE("a wrong key on tcp ends the write with an error and breaks the link") {
  on_every_bed([](const Bed& bed) {
    if (bed.spec == "shm") return;  // which trusts its peers
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          WorkRequest wr = half.write(0, 0, 100, WorkRequest::kFlush);
          wr.rkey ^= 0x55;
          half.post(wr);
          half.poll_until([&] { return half.ends.size() == 1; });
          SIDE_CHECK(half.ends[0] == Status::kUnreachable || half.ends[0] == Status::kRemoteAccess);
          half.poll_until([&] { return half.link->broken(); });
          half.leave_together(wire);
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          half.leave_together(wire);
          SIDE_CHECK(std::all_of(half.memory.begin(), half.memory.end(), [](unsigned char c) { return c == 0; }));
        });
  });
}

template <class F>
bool throws_nic_error(F&& f) {
  try {
    f();
  } catch (const NicError& error) {
    return std::strlen(error.what()) > 20;
  }
  return false;
}

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

TEST_CASE("messages to a peer that was killed do not hang the sender") {
  on_every_bed([](const Bed& bed) {
    run_two(
        bed.library,
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          half.send("hello");
          half.hear(wire);
          SIDE_CHECK(kill(wire.other(), SIGKILL) == 0);
          usleep(50'000);
          const int64_t end = now_ms() + 300;
          while (now_ms() < end) {
            half.nic->send(half.peer, std::vector<std::byte>(100), nullptr);
            half.nic->send(half.peer, std::vector<std::byte>(60'000), nullptr);
            half.poll();
          }
          half.nic->forget(half.peer);
          half.poll();
        },
        [&](const Wire& wire) {
          Half half(bed.spec);
          half.meet(wire);
          half.poll_until([&] { return half.messages.size() == 1; });
          wire.signal();
          half.poll_until([] { return false; }, 50'000);
        },
        false);
  });
}

TEST_CASE("a port that was asked for is had, refused while in use, and free again at once") {
  on_every_bed([](const Bed& bed) {
    if (bed.spec == "shm") return;
    run_two(
        bed.library,
        [&](const Wire& wire) {
          std::string name;
          {
            Half half(bed.spec);
            half.meet(wire);
            name = half.nic->info().name;
            SIDE_CHECK(name.starts_with("tcp://127.0.0.1:"));
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
    if (bed.spec != "shm") return;
    run_two(
        bed.library,
        [&](const Wire& wire) {
          const auto bytes = wire.get();
          const std::string name(reinterpret_cast<const char*>(bytes.data()), bytes.size());
          const auto exists = [&](const std::string& suffix) {
            struct stat status;
            return stat(("/dev/shm/" + name + suffix).c_str(), &status) == 0;
          };
          make_libfabric_nic("shm", {});
          SIDE_CHECK(exists(".wake") && exists(".bell") && exists("-0") && exists("-1"));  // it lives
          SIDE_CHECK(kill(wire.other(), SIGKILL) == 0);
          usleep(200'000);  // its descriptors close some time after
          make_libfabric_nic("shm", {});
          SIDE_CHECK(!exists(".wake") && !exists(".bell") && !exists("-0") && !exists("-1"));
        },
        [&](const Wire& wire) {
          Half half("shm");
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
               {"tcp://", "tcp:/x", "tcp://127.0.0.1:", "tcp://127.0.0.1:x", "tcp://127.0.0.1:65536", "tcp://[::1",
                "tcp://192.0.2.77", "efa:nosuch", "libfabric:", "libfabric:nosuch", "shm:1", ""}) {
            SIDE_CHECK(throws_nic_error([&] { make_libfabric_nic(spec, {}); }));
          }
          SIDE_CHECK(throws_nic_error([] { make_libfabric_nic("shm", {{"link_depth", "0"}}); }));
          SIDE_CHECK(throws_nic_error([] { make_libfabric_nic("shm", {{"link_depth", "many"}}); }));
          SIDE_CHECK(make_libfabric_nic("shm", {{"link_depth", "32"}})->info().link_depth == 32);
          SIDE_CHECK(make_libfabric_nic("tcp", {})->info().name.starts_with("tcp://"));
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
    SIDE_CHECK(throws_nic_error([] { make_libfabric_nic("shm", {}); }));
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
