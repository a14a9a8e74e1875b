// The engine on a fabric that misbehaves: what `make sanitize` runs under ASan, UBSan and TSan.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <thread>

#include "engines.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

std::vector<SimulatedSettings> settings_to_try() {
  SimulatedSettings plain, reordered, handed_over, lossy, narrow;
  reordered.reorder = true;
  reordered.max_delay_us = 50;
  handed_over = reordered;
  handed_over.completion_proves_landing = false;
  handed_over.link_depth = 3;
  lossy = reordered;
  lossy.message_loss_rate = 0.2;
  narrow.max_write_bytes = 3000;
  return {plain, reordered, handed_over, lossy, narrow};
}

}  // namespace

TEST_CASE("writes are byte exact and counted once, whatever the wire does") {
  for (SimulatedSettings settings : settings_to_try()) {
    for (const auto& [n, m] : {std::pair(1, 1), std::pair(4, 2), std::pair(1, 3)}) {
      settings.seed = static_cast<uint64_t>(n * 10 + m);
      std::mt19937_64 random(settings.seed);
      TestFabric fabric(settings);
      TestEngine a(fabric.name, "a", n), b(fabric.name, "b", m);
      const auto [to_b, to_a] = join(a, b);
      auto source = random_bytes(1 << 18, random);
      std::vector<std::byte> target(1 << 18), model(1 << 18);
      const auto from = a.memory(source), into = b.memory(target);
      const auto keys = b.keys(*into);
      const auto expectation = b.expect(5, 40);
      for (int i = 0; i < 40; ++i) {
        const uint64_t length = random() % 60000, at = random() % (target.size() - length);
        const uint64_t offset = random() % (source.size() - length);
        const auto transfer = a.write(to_b, from, offset, keys, at, length, 5);
        REQUIRE(transfer->wait(10 * kSecond));
        REQUIRE(transfer->state() == State::kDone);
        std::copy_n(source.begin() + static_cast<ptrdiff_t>(offset), length,
                    model.begin() + static_cast<ptrdiff_t>(at));
      }
      REQUIRE(expectation->wait(10 * kSecond));
      CHECK(expectation->state() == State::kDone);
      CHECK(b.engine->counter_units(5) == 0);
      CHECK(target == model);
      a.engine->close(kSecond);
      b.engine->close(kSecond);
    }
  }
}

TEST_CASE("a NIC that dies ends what it carried, and tells the receiver") {
  for (int seed = 0; seed < 20; ++seed) {
    CAPTURE(seed);
    SimulatedSettings settings;
    settings.seed = static_cast<uint64_t>(seed);
    settings.reorder = true;
    settings.max_delay_us = 200;
    settings.completion_proves_landing = seed % 2;
    std::mt19937_64 random(settings.seed);
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 2), b(fabric.name, "b", 2);
    const auto [to_b, to_a] = join(a, b);
    auto source = random_bytes(1 << 20, random);
    std::vector<std::byte> target(1 << 20);
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into);
    const auto expectation = b.expect(5, 20, 20 * kSecond);
    std::vector<std::shared_ptr<Transfer>> transfers;
    for (int i = 0; i < 20; ++i) transfers.push_back(a.write(to_b, from, 0, keys, 0, source.size(), 5));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));
    fabric.fabric->kill(seed % 3 ? "a1" : "b0");
    bool all_done = true;
    for (const auto& transfer : transfers) {
      REQUIRE(transfer->wait(10 * kSecond));
      all_done &= transfer->state() == State::kDone;
      if (transfer->state() == State::kFailed) CHECK_FALSE(transfer->failure().message.empty());
    }
    REQUIRE(expectation->wait(10 * kSecond));
    // A transfer may fail although all of it landed, if the proof is lost with the NIC; the count never lies.
    if (all_done) CHECK(expectation->state() == State::kDone);
    if (expectation->state() == State::kDone) CHECK(source == target);
    // The other NIC goes on. Where everything was done before the death was noticed, one more write may run into it.
    CHECK(to_b->state.load() == PeerState::kConnected);
    auto after = a.write(to_b, from, 0, keys, 0, source.size(), -1);
    REQUIRE(after->wait(10 * kSecond));
    if (all_done && after->state() == State::kFailed) {
      after = a.write(to_b, from, 0, keys, 0, source.size(), -1);
      REQUIRE(after->wait(10 * kSecond));
    }
    CHECK(after->state() == State::kDone);
    CHECK(source == target);
  }
}

TEST_CASE("a frozen peer ends everything within the liveness time") {
  TestFabric fabric;
  std::mt19937_64 random(1);
  TestEngine a(fabric.name, "a", 1, kSecond / 2), b(fabric.name, "b", 1, kSecond / 2);
  const auto [to_b, to_a] = join(a, b);
  auto source = random_bytes(1 << 16, random);
  std::vector<std::byte> target(1 << 16);
  const auto from = a.memory(source), into = b.memory(target);
  fabric.fabric->freeze("b0", true);
  const int64_t begin = now_ns();
  const auto transfer = a.write(to_b, from, 0, b.keys(*into), 0, source.size(), 5);
  const auto expectation = a.expect(6, 1, 20 * kSecond);
  REQUIRE(transfer->wait(5 * kSecond));
  REQUIRE(expectation->wait(5 * kSecond));
  CHECK(transfer->state() == State::kFailed);
  CHECK(transfer->failure().reason == Reason::kPeerLost);
  CHECK(transfer->may_still_land());
  CHECK(expectation->state() == State::kFailed);
  CHECK(now_ns() - begin < 2 * kSecond);
  fabric.fabric->freeze("b0", false);
}

TEST_CASE("after revoke() nothing lands any more, and the new keys work") {
  for (int seed = 0; seed < 10; ++seed) {
    CAPTURE(seed);
    SimulatedSettings settings;
    settings.seed = static_cast<uint64_t>(seed);
    settings.reorder = true;
    settings.max_delay_us = 300;
    settings.completion_proves_landing = seed % 2;
    std::mt19937_64 random(settings.seed);
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 2), b(fabric.name, "b", 1);
    const auto [to_b, to_a] = join(a, b);
    auto source = random_bytes(1 << 19, random);
    std::vector<std::byte> target(1 << 19);
    const auto from = a.memory(source), into = b.memory(target);
    const auto old_keys = b.keys(*into);
    std::vector<std::shared_ptr<Transfer>> transfers;
    for (int i = 0; i < 10; ++i) transfers.push_back(a.write(to_b, from, 0, old_keys, 0, source.size(), -1));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 1500));
    const auto revoke = std::make_shared<RevokeOperation>(b.engine, into, true, 5 * kSecond);
    b.engine->submit(revoke);
    REQUIRE(revoke->wait(10 * kSecond));
    CHECK(revoke->state() == State::kDone);
    std::fill(target.begin(), target.end(), std::byte{0});
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    CHECK(std::all_of(target.begin(), target.end(), [](std::byte b) { return b == std::byte{0}; }));
    for (const auto& transfer : transfers) {
      REQUIRE(transfer->wait(5 * kSecond));
      CHECK_FALSE(transfer->may_still_land());
    }
    const auto again = a.write(to_b, from, 0, b.keys(*into), 0, source.size(), -1);
    REQUIRE(again->wait(5 * kSecond));
    CHECK(again->state() == State::kDone);
    CHECK(source == target);
    CHECK(fabric.fabric->audit().refused_access == 0);
  }
}

TEST_CASE("who knows a revoked key cannot work out the new one") {
  const TestFabric fabric;
  TestEngine engine(fabric.name, "a", 1);
  std::vector<std::byte> bytes(4096);
  const auto region = engine.memory(bytes);
  std::set<uint64_t> seen;
  for (int i = 0; i < 8; ++i) {
    const uint64_t old = rkey_of(*engine.keys(*region));
    const int64_t before = now_ns();
    const auto revoke = std::make_shared<RevokeOperation>(engine.engine, region, true, 5 * kSecond);
    engine.engine->submit(revoke);
    REQUIRE(revoke->wait(10 * kSecond));
    const uint64_t fresh = rkey_of(*engine.keys(*region));
    CHECK(seen.insert(fresh).second);
    // What it once was: the old key in a linear congruence, and the clock, that a peer of the same host reads, too.
    const uint64_t clock = fresh - old * 6364136223846793005ull;
    CHECK_FALSE((clock >= static_cast<uint64_t>(before) && clock <= static_cast<uint64_t>(now_ns())));
  }
}

TEST_CASE("threads submit, cancel and wait at once; the engine closes under them") {
  for (int seed = 0; seed < 5; ++seed) {
    SimulatedSettings settings;
    settings.seed = static_cast<uint64_t>(seed);
    settings.reorder = true;
    settings.max_delay_us = 30;
    std::mt19937_64 random(settings.seed);
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 2), b(fabric.name, "b", 2);
    const auto [to_b, to_a] = join(a, b);
    auto source = random_bytes(1 << 16, random);
    std::vector<std::byte> target(1 << 16);
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into);
    std::vector<std::thread> threads;
    std::atomic<int> ended{0};
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t, peer = to_b] {
        for (int i = 0; i < 50; ++i) {
          const auto transfer = a.write(peer, from, 0, keys, static_cast<uint64_t>(t) * 4096, 4096, t);
          if (i % 7 == 0) transfer->cancel();
          if (transfer->wait(10 * kSecond)) ++ended;
        }
      });
    }
    if (seed >= 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(seed));
      (seed % 2 ? a : b).engine->close(kSecond / 2);
    }
    for (auto& thread : threads) thread.join();
    CHECK(ended == 200);
  }
}

TEST_CASE("one write in eight is timed, whatever is submitted between them") {
  TestFabric fabric(SimulatedSettings{});
  TestEngine a(fabric.name, "a", 1), b(fabric.name, "b", 1);
  const auto [to_b, to_a] = join(a, b);
  std::vector<std::byte> from(4096), into(4096);
  const auto local = a.memory(from), remote = b.memory(into);
  const auto keys = b.keys(*remote);
  for (uint64_t i = 1; i <= 64; ++i) {
    if (i % 3 == 0) a.expect(7, 1, 0);
    const auto transfer = a.write(to_b, local, 0, keys, 0, 64, 9);
    REQUIRE(transfer->wait(10 * kSecond));
    REQUIRE(transfer->state() == State::kDone);
  }
  const auto samples = a.engine->stats().post_latency_ns;
  CHECK(samples.size() == 8);
  CHECK(std::all_of(samples.begin(), samples.end(), [](uint32_t ns) { return ns > 0 && ns < UINT32_MAX; }));
}

TEST_CASE("a wait ends in time while the engine is busy with something else") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1), b(fabric.name, "b", 1);
  const auto [to_b, to_a] = join(a, b);
  std::vector<std::byte> source(4096), target(4096);
  const auto from = a.memory(source), into = b.memory(target);
  PageSide pages;
  pages.stride = 8;
  for (uint32_t i = 0; i < 4'000'000; ++i) pages.indices.push_back(i % 2 * 100);  // no two neighbours: none merge
  const auto many = std::make_shared<Transfer>(a.engine, Transfer::Kind::kWrite, 1);
  many->add_lane<PageSource>(to_b, from, pages, a.engine->reach(to_b, *b.keys(*into)), pages, 8, 1, to_b->limits());
  a.engine->submit(many);
  const auto never = a.expect(2, 1, 60 * kSecond);
  CHECK(!never->wait(kSecond / 50));
  CHECK(!many->done());  // or the wait has lasted until there was nothing else to do
  many->cancel();
  CHECK(many->wait(10 * kSecond));
}

TEST_CASE("a row of few: one in itself, more in memory of their own") {
  for (size_t count = 0; count < 5; ++count) {
    Few<std::unique_ptr<size_t>> row, sized;
    for (size_t i = 0; i < count; ++i) row.emplace_back() = std::make_unique<size_t>(i);
    const auto moved = std::move(row);
    CHECK(moved.size() == count);
    CHECK(moved.empty() == (count == 0));
    size_t seen = 0;
    for (const auto& member : moved) CHECK(*member == seen++);
    CHECK(seen == count);
    sized.resize(count);
    CHECK(static_cast<size_t>(sized.end() - sized.begin()) == count);
  }
  CHECK(Few<int>(7)[0] == 7);
  CHECK(Few<int>(std::vector<int>{}).empty());
  CHECK(Few<int>(std::vector<int>{1, 2})[1] == 2);
  CHECK(Few<int>(std::vector<int>{3}).size() == 1);
}
