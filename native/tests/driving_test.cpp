// Who drives: whatever mixture of threads polls, waits, sleeps, leaves and submits, what has ended is noticed in time.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "alone.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

constexpr int64_t kMs = 1'000'000;

void nap(int64_t ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }
void spin(int64_t ns) {
  for (const int64_t end = now_ns() + ns; now_ns() < end;) continue;
}
template <class F>
int64_t ms_of(F work) {
  const int64_t begin = now_ns();
  work();
  return (now_ns() - begin) / kMs;
}

struct Two {
  explicit Two(SimulatedSettings settings = {}, int64_t liveness = 10 * kSecond)
      : fabric(settings), a(fabric.name, "a", 1, liveness), b(fabric.name, "b", 1, liveness) {
    std::tie(to_b, to_a) = join(a, b);
    from = a.memory(source), into = b.memory(target);
    keys = b.keys(*into);
  }
  std::shared_ptr<Transfer> write() { return a.write(to_b, from, 0, keys, 0, 64, -1); }

  TestFabric fabric;
  std::vector<std::byte> source = std::vector<std::byte>(4096), target = std::vector<std::byte>(4096);
  TestEngine a, b;  // end before the memory that they may still write from
  std::shared_ptr<Peer> to_b, to_a;
  std::shared_ptr<Region> from, into;
  std::shared_ptr<RemoteKeys> keys;
};

SimulatedSettings slow() {
  SimulatedSettings settings;
  settings.max_delay_us = 100;
  return settings;
}

// Writes and forgets, so that whoever drives always finds something.
struct Traffic {
  explicit Traffic(Two& two)
      : thread([this, &two] {
          while (!stop) two.write();
        }) {}
  ~Traffic() {
    stop = true;
    thread.join();
  }
  std::atomic<bool> stop{false};
  std::thread thread;
};

// A thread that waits, and by now sleeps as the driver.
struct Sleeper {
  explicit Sleeper(Operation& operation)
      : thread([this, &operation] {
          operation.wait(8 * kSecond);
          ended = now_ns();
        }) {
    nap(20);
  }
  int64_t ended = 0;  // once joined
  std::thread thread;
};

}  // namespace

TEST_CASE("driving: a thread that polls with wait(0) gets what it polls for, and its peers hear of it") {
  Two two(slow(), kSecond);
  nap(20);
  const auto transfer = two.write();
  const int64_t took = ms_of([&] {
    for (const int64_t end = now_ns() + 2 * kSecond; !transfer->wait(0) && now_ns() < end;) spin(5'000);
  });
  CHECK(transfer->done());
  CHECK(took < 200);
  const auto never = two.a.expect(3, 1);
  for (const int64_t end = now_ns() + 2 * kSecond; now_ns() < end && !never->wait(0);) spin(20'000);
  CHECK(two.to_a->connected());
}

TEST_CASE("driving: a thread that finds each arrival at once keeps the peers told that we live") {
  // No worker, so that this thread is all that drives.
  Alone alone(1, true, 5 * kSecond, false);
  const auto& engine = alone.engine;
  StandInNic& nic = *alone.nics[0];
  nic.arrivals = encode_immediate(5, kUnitsPerArrival);
  const size_t before = nic.sent;
  for (const int64_t end = now_ns() + 4 * kSecond; now_ns() < end && nic.sent - before < 2;) {
    const auto arrival =
        std::make_shared<Expectation>(engine, 5, kUnitsPerArrival, std::vector<uint64_t>{}, 10 * kSecond);
    engine->submit(arrival);
    REQUIRE(arrival->wait(kSecond));
  }
  CHECK(nic.sent - before >= 2);  // one a second
}

TEST_CASE("driving: threads that look at what has ended do not keep what another waits for from ending") {
  Two two(slow());
  const auto first = two.write();
  REQUIRE(first->wait(kSecond));
  const auto second = two.write();
  second->notify(7);
  const int64_t took = ms_of([&] {
    for (const int64_t end = now_ns() + 2 * kSecond; second->state() == State::kPending && now_ns() < end;) {
      first->wait(kSecond);
      spin(5'000);
    }
  });
  CHECK(second->state() == State::kDone);
  CHECK(took < 50);
}

TEST_CASE("driving: an expectation's time is over in time, though nobody waits and the worker sleeps") {
  Two two;  // its ticks are two seconds apart
  for (int i = 0; i < 3; ++i) {
    nap(100);
    const auto expectation = two.a.expect(5, 1, 50 * kMs);
    expectation->notify(9);
    const int64_t took = ms_of([&] {
      while (expectation->state() == State::kPending) nap(1);
    });
    CHECK(took < 300);
  }
}

TEST_CASE("driving: a wait ends at its deadline, though another thread drives and is never idle") {
  Two two;
  const auto one = two.a.expect(1, 1), other = two.a.expect(2, 1);
  int64_t took = 0;
  std::thread first([&] { took = ms_of([&] { one->wait(200 * kMs); }); });
  nap(20);  // it sleeps, as the driver
  std::thread second([&] { other->wait(3000 * kMs); });
  nap(1);
  {
    Traffic traffic(two);
    first.join();
  }
  second.join();
  CHECK(took >= 199);
  CHECK(took < 1000);  // some 20 more than 200; a sanitizer takes 500
}

TEST_CASE("driving: a call that needs the engine for a moment gets it beside a wait that is never idle") {
  Two two;
  const auto other = two.a.expect(2, 1);
  std::thread second([&] { other->wait(3000 * kMs); });
  nap(1);
  int64_t took = 0;
  {
    Traffic traffic(two);
    nap(20);
    took = ms_of([&] { two.a.engine->counter_units(5); });
  }
  second.join();
  CHECK(took < 1000);
}

TEST_CASE("driving: of two threads that sleep one leaves, and the other still hears of its end at once") {
  Two two;
  for (const bool leaves : {false, true}) {
    const auto one = two.a.expect(1, 1), other = two.a.expect(2, 1);
    Sleeper first(*one);
    std::thread second([&] {
      if (leaves) other->wait(20 * kMs);
    });
    nap(100);
    const int64_t cancelled = now_ns();
    one->cancel();
    first.thread.join();
    second.join();
    CHECK(first.ended - cancelled < 200 * kMs);
    other->cancel();
  }
}

TEST_CASE("driving: what a thread that drives ends for one that sleeps, it tells it at once") {
  Two two;
  const auto one = two.a.expect(1, 1), other = two.a.expect(2, 1);
  Sleeper first(*one);
  std::thread second([&] { other->wait(3 * kSecond); });
  nap(1);
  int64_t cancelled = 0;
  {
    Traffic traffic(two);  // keeps the second at it
    nap(50);
    cancelled = now_ns();
    one->cancel();
    first.thread.join();
  }
  CHECK(first.ended - cancelled < 300 * kMs);
  other->cancel();
  second.join();
}

TEST_CASE("driving: what is due for a peer is done soon, though nobody waits for it and the peer has nothing else") {
  SimulatedSettings handed_over;
  handed_over.completion_proves_landing = false;
  Two two(handed_over);  // its ticks are two seconds apart
  nap(100);
  const auto within = [](const Operation& operation) {  // without wanting it, as wait() does
    return ms_of([&] {
      for (const int64_t end = now_ns() + 5 * kSecond; operation.state() == State::kPending && now_ns() < end;) nap(1);
    });
  };
  for (int i = 0; i < 3; ++i) {
    const auto transfer = two.write();  // done when a flush has proven its landing
    CHECK(within(*transfer) < 500);
    CHECK(transfer->state() == State::kDone);
    const auto message = std::make_shared<SendOperation>(two.a.engine, two.to_b, std::vector<std::byte>(8));
    two.a.engine->submit(message);  // done when the peer has acknowledged it
    CHECK(within(*message) < 500);
    CHECK(message->state() == State::kDone);
  }
}

TEST_CASE("driving: what a link had no room for goes out when it has, though nobody waits for it") {
  Alone alone(1, true);
  StandInNic& nic = *alone.nics[0];
  nic.room = 0;
  const auto transfer = alone.pages(1);
  alone.engine->submit(transfer);
  nap(100);
  CHECK(transfer->state() == State::kPending);
  nic.room = StandInNic::kDepth;
  const int64_t took = ms_of([&] {
    for (const int64_t end = now_ns() + 5 * kSecond; transfer->state() == State::kPending && now_ns() < end;) nap(1);
  });
  CHECK(transfer->state() == State::kDone);
  CHECK(took < 500);
}
