// Links that break although the peer is alive: nothing is lost, nothing is counted twice, and they are made anew.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "engines.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

SimulatedSettings ordered(uint64_t seed) {
  SimulatedSettings settings;
  settings.seed = seed;
  settings.resumable = true;
  settings.max_delay_us = 300;
  settings.link_depth = 32;
  return settings;
}

bool until(auto&& done, int64_t within = 10 * kSecond) {
  for (const int64_t end = now_ns() + within; !done();) {
    if (now_ns() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// Zero if the peer is lost, whose reason the caller shows.
Peer::Stats stats_of(TestEngine& engine) {
  const auto stats = engine.engine->stats();
  return stats.peers.empty() ? Peer::Stats{} : stats.peers[0].second;
}

}  // namespace

TEST_CASE("links that break under load: every write succeeds, lands byte exact, and is counted once") {
  uint64_t resent = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SimulatedSettings settings = ordered(seed);
    settings.message_loss_rate = seed % 2 ? 0.05 : 0;
    std::mt19937_64 random(seed);
    TestFabric fabric(settings);
    // Long enough that a busy machine, which stops us for a second now and then, makes nobody silent.
    TestEngine a(fabric.name, "a", 3, 4 * kSecond), b(fabric.name, "b", 3, 4 * kSecond);
    const auto [to_b, to_a] = join(a, b);
    constexpr size_t kPiece = 3000, kPieces = 1500;
    auto source = random_bytes(kPiece * kPieces, random);
    std::vector<std::byte> target(source.size());
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into);
    const auto expectation = b.expect(5, kPieces, 60 * kSecond);
    std::vector<std::shared_ptr<Transfer>> transfers;
    for (size_t i = 0; i < kPieces; ++i) {
      if (i % 250 == 100) {
        // One at a time, and not before it is whole again: with no link left transfers do fail.
        const std::string victim = (i / 250 % 2 ? "a" : "b") + std::to_string(i / 250 % 3);
        fabric.fabric->break_links(victim);
        const uint64_t before = i / 250 + 1;
        CAPTURE(a.engine->peer_failure(*to_b).message);
        CAPTURE(b.engine->peer_failure(*to_a).message);
        REQUIRE(until([&] { return stats_of(a).links_rebuilt >= before && stats_of(b).links_rebuilt >= before; }));
      }
      transfers.push_back(a.write(to_b, from, i * kPiece, keys, i * kPiece, kPiece, i % 3 ? 5 : 6));
      if (transfers.back()->immediate_id == 6) transfers.push_back(a.write(to_b, from, 0, keys, 0, 0, 5));
    }
    for (const auto& transfer : transfers) {
      REQUIRE(transfer->wait(20 * kSecond));
      INFO(transfer->failure().message);
      REQUIRE(transfer->state() == State::kDone);
    }
    REQUIRE(expectation->wait(10 * kSecond));
    CHECK(expectation->state() == State::kDone);
    CHECK(b.engine->counter_units(5) == 0);
    CHECK(b.engine->counter_units(6) == kPieces / 3 * kUnitsPerArrival);
    CHECK(target == source);
    resent += stats_of(a).work_requests_resent;
    CHECK(a.engine->stats().bad_frames == 0);
    a.engine->close(kSecond);
    b.engine->close(kSecond);
  }
  CHECK(resent > 0);
}

TEST_CASE("a refused write breaks the only link and fails alone; what was beside it goes over the new one") {
  TestFabric fabric(ordered(3));
  TestEngine a(fabric.name, "a", 1), b(fabric.name, "b", 1);
  const auto [to_b, to_a] = join(a, b);
  std::mt19937_64 random(3);
  auto source = random_bytes(1 << 16, random);
  std::vector<std::byte> target(source.size());
  const auto from = a.memory(source), into = b.memory(target);
  const auto keys = b.keys(*into);
  for (int round = 0; round < 5; ++round) {
    const auto fine = a.write(to_b, from, 0, keys, 0, source.size(), 9);
    REQUIRE(fine->wait(10 * kSecond));
    REQUIRE(fine->state() == State::kDone);
    fabric.fabric->fail_next("a0", 1, Status::kRemoteAccess);
    const auto wrong = a.write(to_b, from, 0, keys, 0, 1000, -1);
    const auto beside = a.write(to_b, from, 0, keys, 0, 1000, -1);
    REQUIRE(wrong->wait(10 * kSecond));
    REQUIRE(beside->wait(10 * kSecond));
    CHECK(wrong->state() == State::kFailed);
    CHECK(wrong->failure().reason == Reason::kRemoteAccess);
    CHECK(wrong->failure().message.find("sim://") != std::string::npos);
    INFO(beside->failure().message);
    CHECK(beside->state() == State::kDone);
    const auto later = a.write(to_b, from, 0, keys, 0, source.size(), 9);
    REQUIRE(later->wait(10 * kSecond));
    INFO(later->failure().message);
    CHECK(later->state() == State::kDone);
    CHECK(to_b->connected());
    CHECK(to_a->connected());
  }
  CHECK(stats_of(a).links_rebuilt == 5);
  CHECK(until([&] { return b.engine->counter_units(9) == 10 * kUnitsPerArrival; }));
}

TEST_CASE("page lists over the only link, which breaks: all of it lands, and no more is ever counted than has landed") {
  constexpr size_t kPage = 512, kPages = 300;
  uint64_t resent = 0, part = 0, gathered = 0;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    TestFabric fabric(ordered(seed));
    TestEngine a(fabric.name, "a", 1, 4 * kSecond), b(fabric.name, "b", 1, 4 * kSecond);
    const auto [to_b, to_a] = join(a, b);
    auto source = random_bytes(kPage * kPages, random);
    std::vector<std::byte> target(source.size());
    const auto from = a.memory(source), into = b.memory(target);
    PageSide near, far;
    near.stride = far.stride = kPage;
    for (uint32_t i = 0; i < kPages; ++i) {
      near.indices.push_back(i * 7 % kPages);  // no two neighbours, so that nothing merges
      far.indices.push_back(i * 7 % kPages);
    }
    const auto transfer = std::make_shared<Transfer>(a.engine, Transfer::Kind::kWrite, 9);
    transfer->submitted_ns = now_ns();
    transfer->add_lane<PageSource>(to_b, from, near, a.engine->reach(to_b, *b.keys(*into)), far, kPage, 9,
                                   to_b->limits());
    a.engine->submit(transfer);
    if (seed % 4) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
      fabric.fabric->break_links(seed % 2 ? "a0" : "b0");
    }
    // Some end in the middle of it, perhaps of making the link anew: nothing moves any more when the memory is looked
    // at.
    const bool to_the_end = seed % 3 == 0;
    if (to_the_end) {
      REQUIRE(transfer->wait(20 * kSecond));
      INFO(transfer->failure().message);
      CHECK(transfer->state() == State::kDone);
      CHECK(until([&] { return b.engine->counter_units(9) == kPages * kUnitsPerArrival; }));
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 40'000));
    }
    resent += stats_of(a).work_requests_resent;
    a.engine->close(kSecond);
    b.engine->close(kSecond);
    const uint64_t counted = b.engine->counter_units(9) / kUnitsPerArrival;
    size_t landed = 0;
    for (size_t i = 0; i < kPages; ++i) {
      landed += std::equal(target.begin() + static_cast<ptrdiff_t>(i * kPage),
                           target.begin() + static_cast<ptrdiff_t>((i + 1) * kPage),
                           source.begin() + static_cast<ptrdiff_t>(i * kPage));
    }
    CHECK(counted <= landed);
    if (to_the_end) CHECK(landed == kPages);
    part += counted > 0 && counted < kPages;
    gathered += b.engine->stats().nics[0].immediates < counted;
  }
  CHECK(resent > 0);
  CHECK(part > 0);
  CHECK(gathered > 0);
}

TEST_CASE("the one that was refused fails; what was behind it on the link succeeds over another") {
  TestFabric fabric(ordered(4));
  TestEngine a(fabric.name, "a", 2), b(fabric.name, "b", 2);
  const auto [to_b, to_a] = join(a, b);
  std::mt19937_64 random(4);
  auto source = random_bytes(1 << 16, random);
  std::vector<std::byte> target(source.size());
  const auto from = a.memory(source), into = b.memory(target);
  const auto keys = b.keys(*into);
  fabric.fabric->fail_next("a0", 1, Status::kRemoteAccess);
  std::vector<std::shared_ptr<Transfer>> transfers;
  for (int i = 0; i < 60; ++i) transfers.push_back(a.write(to_b, from, 0, keys, 0, 100, -1));
  size_t failed = 0;
  for (const auto& transfer : transfers) {
    REQUIRE(transfer->wait(10 * kSecond));
    failed += transfer->state() == State::kFailed;
    INFO(transfer->failure().message);
    CHECK(!transfer->may_still_land());
  }
  CHECK(failed == 1);
}

TEST_CASE("a NIC that dies leaves the traffic to the other; cancelled and failed transfers still end") {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    TestFabric fabric(ordered(seed));
    TestEngine a(fabric.name, "a", 2, kSecond / 2), b(fabric.name, "b", 2, kSecond / 2);
    const auto [to_b, to_a] = join(a, b);
    std::mt19937_64 random(seed);
    auto source = random_bytes(1 << 20, random);
    std::vector<std::byte> target(source.size());
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into);
    std::vector<std::shared_ptr<Transfer>> kept, cancelled;
    for (int i = 0; i < 400; ++i) {
      kept.push_back(a.write(to_b, from, 0, keys, 0, 2000, 5));
      cancelled.push_back(a.write(to_b, from, 0, keys, 1 << 19, 2000, -1));
      if (i == 200) fabric.fabric->kill("b1");
      if (i >= 200) cancelled.back()->cancel();
    }
    for (const auto& transfer : kept) {
      REQUIRE(transfer->wait(10 * kSecond));
      INFO(transfer->failure().message);
      CHECK(transfer->state() == State::kDone);
    }
    for (const auto& transfer : cancelled) REQUIRE(transfer->wait(10 * kSecond));
    REQUIRE(until([&] { return b.engine->counter_units(5) == 400 * kUnitsPerArrival; }));
    CHECK(to_b->connected());
    CHECK(to_a->connected());
    // Then the other dies too: now the peer is lost, and everything ends.
    INFO(to_b->end_reason.message);
    const auto last = b.expect(77, 1, 60 * kSecond);
    std::vector<std::shared_ptr<Transfer>> doomed;
    for (int i = 0; i < 50; ++i) doomed.push_back(a.write(to_b, from, 0, keys, 0, 2000, 5));
    fabric.fabric->kill("b0");
    for (const auto& transfer : doomed) REQUIRE(transfer->wait(5 * kSecond));
    REQUIRE(last->wait(5 * kSecond));
    CHECK(last->state() == State::kFailed);
    REQUIRE(until([&] { return to_b->ended() && to_a->ended(); }, 5 * kSecond));
  }
}
