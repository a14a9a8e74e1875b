// A source stays busy until nobody reads it any more: where the peer's process copies from our memory by itself,
// closing our half of a link is no proof of that. And every such wait ends.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "tests/engines.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

SimulatedSettings copied_by_the_peer() {
  SimulatedSettings settings;
  settings.closing_quiets = settings.closing_fences = false;
  return settings;
}

void nap(int64_t milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

template <class Condition>
bool soon(Condition&& condition) {
  for (const int64_t end = now_ns() + 10 * kSecond; now_ns() < end; nap(1)) {
    if (condition()) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("a write to a stopped peer that copies by itself does not end before the peer has gone on or has ended") {
  for (const bool cancelled : {false, true}) {
    CAPTURE(cancelled);
    TestFabric fabric(copied_by_the_peer());
    TestEngine a(fabric.name, "a", 1, kSecond / 4), b(fabric.name, "b", 1, 60 * kSecond);
    const auto [to_b, to_a] = join(a, b);
    std::vector<std::byte> source(4096, std::byte{1}), target(4096);
    const auto from = a.memory(source), into = b.memory(target);
    fabric.fabric->freeze("b0", true);
    const auto transfer = a.write(to_b, from, 0, b.keys(*into), 0, source.size(), -1);
    if (cancelled) transfer->cancel();
    const auto peer = to_b;
    REQUIRE(soon([&] { return peer->ended(); }));  // the silence is noticed within the liveness time ...
    CHECK_FALSE(transfer->wait(kSecond / 2));      // ... but nobody knows when the peer copies
    // It cannot be taken for quiet by closing the region either: that says whom it waits for.
    const auto close = std::make_shared<RevokeOperation>(a.engine, from, false, kSecond / 10);
    a.engine->submit(close);
    REQUIRE(close->wait(5 * kSecond));
    CHECK(close->failure().reason == Reason::kNotFenced);
    CHECK(close->failure().message.find("b") != std::string::npos);
    fabric.fabric->freeze("b0", false);
    REQUIRE(transfer->wait(5 * kSecond));
    CHECK(transfer->state() == (cancelled ? State::kCancelled : State::kFailed));
    CHECK(transfer->may_still_land());
    std::fill(source.begin(), source.end(), std::byte{2});  // now it may be used again
    nap(50);
    CHECK(std::count(target.begin(), target.end(), std::byte{2}) == 0);
    CHECK(soon([&] { return a.engine->stats().peers.empty(); }));
  }
}

TEST_CASE("an engine that is closed beside a stopped peer ends its transfers, and takes its links with it") {
  TestFabric fabric(copied_by_the_peer());
  TestEngine b(fabric.name, "b", 1, 60 * kSecond);
  std::shared_ptr<Peer> held;
  {
    TestEngine a(fabric.name, "a", 1, kSecond / 4);
    const auto [to_b, to_a] = join(a, b);
    held = to_b;
    std::vector<std::byte> source(4096), target(4096);
    const auto from = a.memory(source), into = b.memory(target);
    fabric.fabric->freeze("b0", true);
    const auto transfer = a.write(to_b, from, 0, b.keys(*into), 0, source.size(), -1);
    nap(20);
    a.engine->close(kSecond / 10);
    REQUIRE(transfer->done());
    CHECK(transfer->state() != State::kDone);
    CHECK(transfer->may_still_land());
    fabric.fabric->hold(true);  // `source` goes
  }
  for (const auto& link : held->links) CHECK_FALSE(link->link);
}

TEST_CASE("a revoke while a connection is being made waits for the side that is up already") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
  std::vector<std::byte> source(1 << 20, std::byte{7}), target(1 << 20);
  const auto from = b.memory(source), into = a.memory(target);
  const auto keys = a.keys(*into);  // b knows them from an earlier connection
  auto at_a = a.engine->create_peer(900, true, "b", {{0, 0, b.engine->nics()[0]->address()}});
  auto at_b = b.engine->create_peer(900, false, "a", {{0, 0, a.engine->nics()[0]->address()}});
  const auto halves_a = a.engine->link_halves(*at_a), halves_b = b.engine->link_halves(*at_b);
  b.engine->activate_peer(*at_b, halves_a, 0, 0);
  fabric.fabric->hold(true);  // b's writes are on their way
  const auto transfer = b.write(at_b, from, 0, keys, 0, source.size(), -1);
  const auto revoke = std::make_shared<RevokeOperation>(a.engine, into, true, 5 * kSecond);
  a.engine->submit(revoke);
  CHECK_FALSE(revoke->wait(kSecond / 5));
  a.engine->activate_peer(*at_a, halves_b, 0, 0);
  CHECK_FALSE(revoke->wait(kSecond / 5));
  fabric.fabric->hold(false);
  REQUIRE(revoke->wait(5 * kSecond));
  CHECK(revoke->state() == State::kDone);
  REQUIRE(transfer->wait(5 * kSecond));
  std::fill(target.begin(), target.end(), std::byte{0});  // "the pages may be reused"
  nap(100);
  CHECK(std::count(target.begin(), target.end(), std::byte{7}) == 0);
}

TEST_CASE("what one side says before the other is up comes after the news that it is up") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
  auto at_a = a.engine->create_peer(901, true, "b", {{0, 0, b.engine->nics()[0]->address()}});
  auto at_b = b.engine->create_peer(901, false, "a", {{0, 0, a.engine->nics()[0]->address()}});
  const auto halves_a = a.engine->link_halves(*at_a), halves_b = b.engine->link_halves(*at_b);
  b.engine->activate_peer(*at_b, halves_a, 0, 0);
  std::vector<std::shared_ptr<SendOperation>> sends;
  for (int i = 0; i < 5; ++i) {
    sends.push_back(std::make_shared<SendOperation>(b.engine, at_b, std::vector<std::byte>(1, std::byte(i))));
    b.engine->submit(sends.back());
  }
  nap(50);
  for (const auto& send : sends) CHECK_FALSE(send->done());  // nobody has them yet
  a.engine->activate_peer(*at_a, halves_b, 0, 0);
  for (const auto& send : sends) REQUIRE(send->wait(5 * kSecond));
  const auto told = a.events.pop(kSecond, 100);
  REQUIRE(told.size() == 6);
  CHECK(told[0].kind == Event::kPeerUp);
  for (size_t i = 0; i < 5; ++i) {
    CHECK(told[i + 1].kind == Event::kMessage);
    CHECK(told[i + 1].data.at(0) == std::byte(i));
  }
}
