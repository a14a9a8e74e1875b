// The libfabric and shm NICs: writes, reads, flushes and messages between two processes, awake and asleep.
#include "tests/libfabric_halves.h"

namespace railwire {
namespace {

using namespace testing;

unsigned char pattern(size_t i, size_t length) { return static_cast<unsigned char>(i * 131 + length * 7 + 1); }

const size_t kLengths[] = {0, 1, 3, 4096, 65536, 1 << 20, (1 << 20) + 13};

TEST_CASE("writes with immediates arrive byte-exact") {
  on_shm_and_every_bed([](const Bed& bed) {
    two_halves(
        bed,
        [](Half& half, const Wire& wire) {
          for (const size_t length : kLengths) {
            for (size_t i = 0; i < length; ++i) half.memory[i] = pattern(i, length);
            half.ends.clear();
            half.hear(wire);
            half.post(half.write(0, 64, length, WorkRequest::kImmediate, static_cast<uint32_t>(length) | 0x80000000u));
            half.poll_until([&] { return half.ends.size() == 1; });
            SIDE_CHECK(half.ends[0] == Status::kOk);
            SIDE_CHECK(half.link->outstanding() == 0);
          }
        },
        [](Half& half, const Wire& wire) {
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
        });
  });
}

TEST_CASE("thousands of writes, both ways at once, each immediate once") {
  static constexpr uint32_t kCount = 20'000;
  const auto side = [](Half& half, const Wire&) {
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
  };
  on_shm_and_every_bed([&](const Bed& bed) { two_halves(bed, side, side); });
}

TEST_CASE("reads bring the peer's bytes") {
  on_shm_and_every_bed([](const Bed& bed) {
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
  on_shm_and_every_bed([](const Bed& bed) {
    two_halves(
        bed,
        [](Half& half, const Wire& wire) {
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
        },
        [](Half& half, const Wire& wire) {
          for (int round = 1; round <= 20; ++round) {
            half.hear(wire);
            const size_t length = round % 2 ? 1000 : 1 << 20;
            for (size_t i = 0; i < 4 * length; ++i) SIDE_CHECK(half.memory[i] == round);
            wire.signal();
          }
        });
  });
}

TEST_CASE("messages go both ways, of every length, more than there are buffers") {
  const auto side = [](Half& half, const Wire& wire) {
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
  on_shm_and_every_bed([&](const Bed& bed) { two_halves(bed, side, side); });
}

TEST_CASE("an idle side sleeps, and wakes for messages, writes and the ends of its own work") {
  constexpr int kRounds = 200;
  on_shm_and_every_bed([](const Bed& bed) {
    two_halves(
        bed,
        [](Half& half, const Wire&) {
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
        },
        [](Half& half, const Wire&) {
          int sleeps = 0;
          for (size_t round = 1; round <= kRounds; ++round) {
            sleeps += half.sleep_until([&] { return half.immediates.size() + half.messages.size() == round; });
            half.post(half.write(0, 0, 8, WorkRequest::kImmediate, 9));
          }
          SIDE_CHECK(sleeps > kRounds / 20);
        });
  });
}

TEST_CASE("a NIC with nothing to do lets its caller sleep, and stays asleep") {
  on_shm_and_every_bed([](const Bed& bed) {
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

}  // namespace
}  // namespace railwire
