// Silence: when a peer is lost by it, and when not.
#include <doctest/doctest.h>

#include <chrono>
#include <thread>

#include "engines.h"

using namespace railwire;
using namespace railwire::testing;

TEST_CASE("liveness: a peer that dies while this process is stopped is lost no later than any other") {
  constexpr int64_t kLiveness = kSecond / 2, kStop = 3 * kSecond;
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, kLiveness, false), b(fabric.name, "b", 1, 5 * kSecond);
  const auto to_b = join(a, b).first;
  const auto drive_for = [&](int64_t ns) { a.expect(1, 1, 60 * kSecond)->wait(ns); };
  drive_for(kSecond / 10);
  std::this_thread::sleep_for(std::chrono::nanoseconds(kStop));
  fabric.fabric->hold(true);  // what b has said before lies in a's queue; nothing follows, and no error tells of it
  const int64_t begin = now_ns();
  drive_for(kLiveness / 4);
  CHECK(to_b->connected());  // the silence so far was our own
  while (!to_b->ended() && now_ns() < begin + 5 * kSecond) drive_for(kSecond / 50);
  CHECK(to_b->ended());
  CHECK(now_ns() - begin < kLiveness + kStop / 2);  // and not by all of kStop later
  fabric.fabric->hold(false);
}
