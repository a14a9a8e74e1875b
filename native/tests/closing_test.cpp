// Ends that come together: regions that go while the engine closes, links that break under a flush, fences that fail.
#include <doctest/doctest.h>

#include <chrono>
#include <thread>

#include "alone.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

constexpr int64_t kMs = 1'000'000;

void nap(int64_t ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

}  // namespace

TEST_CASE("closing: a region that goes on another thread meanwhile") {
  Alone alone(1);
  std::thread other;
  alone.nics[0]->on_link_gone = [&] {
    if (other.joinable()) return;
    other = std::thread([&] { alone.region.reset(); });
    nap(50);
  };
  alone.engine->close(0);
  other.join();
  CHECK(alone.engine->closed());
}

TEST_CASE("closing: a write of the last moment holds the last reference to its region") {
  Alone alone(1);
  auto transfer = alone.pages(1);
  alone.region.reset();
  alone.nics[0]->on_link_closed = [&] { alone.engine->submit(transfer); };  // into the queue of an engine that closes
  alone.engine->close(0);
  CHECK(transfer->done());
}

TEST_CASE("closing: a revoke that nobody holds is under way") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
  join(a, b);
  std::vector<std::byte> bytes(4096);
  auto region = b.memory(bytes);
  fabric.fabric->freeze("a0", true);
  b.engine->submit(std::make_shared<RevokeOperation>(b.engine, std::move(region), true, 10 * kSecond));
  b.engine->close(100 * kMs);
  CHECK(b.engine->closed());
  fabric.fabric->freeze("a0", false);
}

TEST_CASE("closing: a revoke that comes after it ends") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1);
  std::vector<std::byte> bytes(4096);
  const auto region = a.memory(bytes);
  a.engine->close(0);
  for (const bool reregister : {true, false}) {
    const auto revoke = std::make_shared<RevokeOperation>(a.engine, region, reregister, kSecond);
    a.engine->submit(revoke);
    REQUIRE(revoke->wait(5 * kSecond));
    CHECK(revoke->state() == (reregister ? State::kFailed : State::kDone));
  }
}

TEST_CASE("closing: a flush finds its link broken while pages wait, and nothing stays with the dead link") {
  Alone alone(2);
  const auto first = alone.pages(200);
  alone.engine->submit(first);
  nap(20);
  std::vector<std::shared_ptr<Transfer>> others;
  {
    std::lock_guard gate(alone.nics[0]->polling);  // the driver stands still: what follows is queued
    for (const int64_t end = now_ns() + 20 * kSecond; alone.nics[0]->at_the_gate == 0 && now_ns() < end;) nap(1);
    REQUIRE(alone.nics[0]->at_the_gate == 1);
    alone.nics[0]->polls_until_flushes_break = 2;  // when it has been taken from there, and waits to be posted
    for (int i = 0; i < 4; ++i) alone.engine->submit(others.emplace_back(alone.pages(4000)));
  }
  // All of it goes over the other link. Whether `first` has landed is for the peer to say, who does not.
  for (const auto& transfer : others) CHECK(transfer->wait(20 * kSecond));
  CHECK(!first->done());
}

TEST_CASE("closing: a fence that failed fails again until it holds, and no other succeeds meanwhile") {
  SimulatedSettings settings;
  settings.closing_fences = false;
  TestFabric fabric(settings);
  TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
  join(a, b);
  std::vector<std::byte> one(4096), two(4096);
  const auto region = b.memory(one), other = b.memory(two);
  fabric.fabric->freeze("a0", true);
  const auto revoke = [&](const std::shared_ptr<Region>& which, bool again) {
    const auto made = std::make_shared<RevokeOperation>(b.engine, which, again, 100 * kMs);
    b.engine->submit(made);
    REQUIRE(made->wait(5 * kSecond));
    return made->failure().reason;
  };
  CHECK(revoke(region, true) == Reason::kNotFenced);
  CHECK(revoke(region, false) == Reason::kNotFenced);
  // The peer is lost, and has the descriptor of this one, too, for all that is known.
  CHECK(revoke(other, true) == Reason::kNotFenced);
  fabric.fabric->freeze("a0", false);
}

TEST_CASE("closing: a peer that has said goodbye is no obstacle to a fence, whatever the NIC") {
  SimulatedSettings settings;
  settings.closing_fences = false;
  TestFabric fabric(settings);
  TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
  const auto [to_b, to_a] = join(a, b);
  std::vector<std::byte> bytes(4096);
  const auto region = b.memory(bytes);
  const auto close = std::make_shared<CloseOperation>(a.engine, to_b, 5 * kSecond);
  a.engine->submit(close);
  REQUIRE(close->wait(5 * kSecond));
  for (const int64_t end = now_ns() + 5 * kSecond; !to_a->ended() && now_ns() < end;) nap(1);
  REQUIRE(to_a->ended());
  const auto revoke = std::make_shared<RevokeOperation>(b.engine, region, true, kSecond);
  b.engine->submit(revoke);
  CHECK(revoke->wait(5 * kSecond));
  CHECK(revoke->state() == State::kDone);
  const auto closed = std::make_shared<CloseOperation>(b.engine, to_a, kSecond);
  b.engine->submit(closed);
  CHECK(closed->wait(5 * kSecond));
  CHECK(closed->state() == State::kDone);
}

TEST_CASE("closing: a second close of a region waits for the fence of the first") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
  join(a, b);
  std::vector<std::byte> bytes(4096);
  const auto region = b.memory(bytes);
  fabric.fabric->freeze("a0", true);
  std::shared_ptr<RevokeOperation> both[2];
  for (auto& revoke : both) {
    revoke = std::make_shared<RevokeOperation>(b.engine, region, false, 5 * kSecond);
    b.engine->submit(revoke);
  }
  nap(50);
  CHECK(!both[0]->done());
  CHECK(!both[1]->done());
  fabric.fabric->freeze("a0", false);
  for (auto& revoke : both) {
    REQUIRE(revoke->wait(5 * kSecond));
    CHECK(revoke->state() == State::kDone);
  }
}

TEST_CASE("closing: a connection that never came about ends nobody's expectation but its own") {
  TestFabric fabric;
  TestEngine b(fabric.name, "b", 1), c(fabric.name, "c", 1);
  const auto any = b.expect(5, 1);
  const auto half = b.engine->create_peer(999, false, "c", {{0, 0, c.engine->nics()[0]->address()}});
  const auto named =
      std::make_shared<Expectation>(b.engine, 6, kUnitsPerArrival, std::vector<uint64_t>{half->id}, 10 * kSecond);
  b.engine->submit(named);
  b.engine->abandon_peer(*half, "the connection could not be set up");
  CHECK(named->wait(kSecond));
  CHECK(named->failure().reason == Reason::kPeerLost);
  CHECK(!any->wait(20 * kMs));
}
