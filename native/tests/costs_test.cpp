// What a call costs must not grow with what the connection has seen, nor an end with the square of what ends.
#include <doctest/doctest.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>

#include "engine/recent_ids.h"
#include "engines.h"
#include "far_end.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

// The best of several, so that a loaded machine does not count.
template <class F>
double best_ns(int rounds, F work) {
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < rounds; ++i) {
    const int64_t begin = now_ns();
    work();
    best = std::min(best, now_ns() - begin);
  }
  return static_cast<double>(best);
}

// Of the calling thread: what else runs on the machine does not count.
int64_t thread_cpu_ns() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec * kSecond + now.tv_nsec;
}

}  // namespace

TEST_CASE("costs: a write does not look at each region that its peer has ever revoked") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 60 * kSecond, false), b(fabric.name, "b", 1, 60 * kSecond, false);
  const auto [to_b, to_a] = join(a, b);
  std::vector<std::byte> source(64), target(64);
  const auto from = a.memory(source), into = b.memory(target);
  const auto keys = b.keys(*into);
  const auto writes = [&] {
    for (int i = 0; i < 50; ++i) a.write(to_b, from, 0, keys, 0, 64, -1)->wait(5 * kSecond);
  };
  to_b->revoked_regions.insert(1);
  const double before = best_ns(20, writes);
  for (uint64_t id = 2; id < 100'000; ++id) to_b->revoked_regions.insert(id);
  CHECK(best_ns(20, writes) < 10 * before);
  to_b->revoked_regions.insert(keys->region_id);
  const auto refused = a.write(to_b, from, 0, keys, 0, 64, -1);
  CHECK(refused->wait(5 * kSecond));
  CHECK(refused->failure().reason == Reason::kRevoked);
}

TEST_CASE("costs: what is remembered of a peer's revokes has an end, and the newest are among it") {
  RecentIds ids;
  CHECK(ids.empty());
  const uint64_t all = 5 * RecentIds::kAtLeast;
  for (uint64_t id = 1; id <= all; ++id) ids.insert(id);
  CHECK(ids.size() <= 2 * RecentIds::kAtLeast);
  CHECK(ids.size() >= RecentIds::kAtLeast);
  for (uint64_t id = all - RecentIds::kAtLeast + 1; id <= all; ++id) CHECK(ids.contains(id));
  CHECK(!ids.contains(1));
}

TEST_CASE("costs: queued writes end in a time that grows with their number, not with its square") {
  const auto time_to_end = [](int count) {
    TestFabric fabric;
    TestEngine a(fabric.name, "a", 1, 60 * kSecond, false), b(fabric.name, "b", 1, 60 * kSecond, false);
    const auto [to_b, to_a] = join(a, b);
    std::vector<std::byte> source(4096), target(4096);
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into);
    fabric.fabric->freeze("b0", true);
    std::vector<std::shared_ptr<Transfer>> all;
    for (int i = 0; i < count; ++i) all.push_back(a.write(to_b, from, 0, keys, 0, 4096, -1));
    const auto close = std::make_shared<CloseOperation>(a.engine, to_b, kSecond);
    const int64_t begin = thread_cpu_ns();
    a.engine->submit(close);  // stops them all, in this thread
    const int64_t took = thread_cpu_ns() - begin;
    size_t ended = 0;
    for (const auto& one : all) ended += one->done();
    CHECK(ended + 5'000 > all.size());  // but for those that the NIC has
    fabric.fabric->freeze("b0", false);
    return static_cast<double>(took);
  };
  const double few = std::min({time_to_end(6'000), time_to_end(6'000), time_to_end(6'000)});
  const double many = std::min(time_to_end(96'000), time_to_end(96'000));
  CHECK(many < 80 * few);  // the square would be 256
}

TEST_CASE("costs: nobody looks at the peers that have nothing to do because one has") {
  const auto looks_for_a_send = [](int peers) {
    TestFabric fabric;
    TestEngine a(fabric.name, "a", 1, 60 * kSecond), b(fabric.name, "b", 1, 60 * kSecond);
    std::vector<std::unique_ptr<FarEnd>> idle;
    for (int i = 0; i < peers; ++i) {
      idle.push_back(std::make_unique<FarEnd>(fabric, a, 1, "idle" + std::to_string(i), false));
    }
    const auto to_b = join(a, b).first;
    std::vector<std::byte> source(64), target(64);
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into);
    a.expect(1, 1, kSecond / 20)->wait(kSecond);  // what connecting them has brought about is over
    const uint64_t before = a.engine->stats().peer_looks;
    for (int i = 0; i < 100; ++i) {
      a.write(to_b, from, 0, keys, 0, 64, -1)->wait(5 * kSecond);
      const auto send = std::make_shared<SendOperation>(a.engine, to_b, std::vector<std::byte>(8));
      a.engine->submit(send);
      send->wait(5 * kSecond);
    }
    return static_cast<double>(a.engine->stats().peer_looks - before);
  };
  const double few = looks_for_a_send(1), many = looks_for_a_send(150);
  CAPTURE(few);
  // Each may be pinged once meanwhile; a look at all of them for each send would be 15,000.
  CHECK(many < few + 2'000);
}

TEST_CASE("watcher: the last increment is told, whenever it falls") {
  Watcher watcher(1);
  std::atomic<uint64_t> events{0}, handled{0}, seen{0};
  std::atomic<bool> stop{false};
  std::thread dispatcher([&] {
    while (!stop.load()) {
      if (events.load(std::memory_order_acquire) == handled.load(std::memory_order_relaxed)) continue;
      seen.store(watcher.take().second, std::memory_order_release);
      handled.fetch_add(1);
    }
  });
  const auto look = [&] {
    if (watcher.look()) events.fetch_add(1, std::memory_order_release);
  };
  std::atomic_ref<uint64_t> word(*watcher.word());
  uint64_t random = 88172645463325252u;
  uint64_t lost = 0;
  for (const int64_t end = now_ns() + 2 * kSecond; now_ns() < end && lost == 0;) {
    word.fetch_add(1);
    look();  // an event is on its way
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    for (uint64_t i = random % 120; i > 0; --i) cpu_relax();
    const uint64_t last = word.load(std::memory_order_relaxed) + 1;
    word.store(last, std::memory_order_relaxed);
    look();  // perhaps in the middle of take()
    const int64_t limit = now_ns() + 2 * kSecond;
    while (seen.load(std::memory_order_acquire) != last && lost == 0) {
      look();
      const bool idle = events.load() == handled.load() && seen.load() != last;
      if (idle && now_ns() > limit) ++lost;
    }
  }
  stop = true;
  dispatcher.join();
  CHECK(lost == 0);
}
