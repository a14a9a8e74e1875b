// Requests cut into work requests, against a plain model: every named byte once, nothing else, and the right count.
#include "engine/work.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <random>

using namespace railwire;

namespace {

constexpr uint64_t kBase = 0x10000, kKey = 77;

struct Bench {
  explicit Bench(uint64_t size)
      : region(std::make_shared<Region>(std::weak_ptr<Engine>(),
                                        MemorySpec{.address = reinterpret_cast<void*>(kBase), .length = size}, 0)),
        remote(std::make_shared<RemoteAccess>()) {
    remote->region_id = 1;
    remote->keys = {{0, kKey}};
    region->registrations.resize(1);
  }
  std::shared_ptr<Region> region;
  std::shared_ptr<RemoteAccess> remote;
};

// destination byte -> source byte, for all WRs; and the units of weight that they carry.
struct Seen {
  std::map<uint64_t, uint64_t> bytes;
  uint64_t units = 0, requests = 0, longest = 0;
  bool doubled = false;
};

Seen drain(WorkSource& source, std::mt19937_64& random) {
  Seen seen;
  std::vector<WorkRequest> out(64);
  while (!source.exhausted()) {
    const size_t n = source.fill({}, nullptr, {out.data(), 1 + random() % out.size()});
    REQUIRE(n > 0);
    for (size_t i = 0; i < n; ++i) {
      const WorkRequest& wr = out[i];
      ++seen.requests;
      seen.longest = std::max(seen.longest, wr.length);
      if (wr.flags & WorkRequest::kImmediate) seen.units += immediate_weight(wr.immediate);
      const auto name = [&](uint64_t remote, uint64_t local, uint64_t length) {
        for (uint64_t b = 0; b < length; ++b) {
          const auto [at, fresh] = seen.bytes.emplace(remote + b, local - kBase + b);
          seen.doubled |= !fresh;
        }
      };
      const auto local = reinterpret_cast<uint64_t>(wr.local);
      if (!wr.list) {
        name(wr.remote, local, wr.length);
        continue;
      }
      const PageList& list = *wr.list;
      for (uint32_t page = 0; page < list.pages; ++page) {
        for (uint32_t s = 0; s < list.stretch_count; ++s) {
          const PageList::Stretch& stretch = list.stretches[s];
          name(wr.remote + list.remote_pages[page] * list.remote_stride + stretch.remote,
               local + list.local_pages[page] * list.local_stride + stretch.local, stretch.length);
        }
      }
    }
  }
  return seen;
}

}  // namespace

TEST_CASE("weights of the parts of a write are whole and sum to one arrival") {
  for (uint64_t parts = 1; parts <= kMaxParts; ++parts) {
    uint32_t sum = 0;
    for (uint64_t i = 0; i < parts; ++i) {
      CHECK(part_weight(i, parts) >= 1);
      sum += part_weight(i, parts);
    }
    CHECK(sum == kUnitsPerArrival);
  }
}

TEST_CASE("an immediate keeps id and weight apart") {
  for (uint32_t id : {0u, 1u, 12345u, kImmediateIds - 1}) {
    for (uint32_t weight : {1u, 16u, 1023u, kMaxWeight}) {
      const uint32_t wire = encode_immediate(id, weight);
      CHECK(immediate_id(wire) == id);
      CHECK(immediate_weight(wire) == weight);
    }
  }
}

TEST_CASE("split_write covers every length exactly, within what a WR may carry") {
  for (const uint32_t links : {1u, 2u, 3u, 4u, 16u, 40u}) {
    for (const uint64_t most : {uint64_t{1}, uint64_t{4096}, uint64_t{1000003}, uint64_t{1} << 31, uint64_t{1} << 40}) {
      for (const uint64_t length :
           {uint64_t{0}, uint64_t{1}, uint64_t{3}, uint64_t{8192}, uint64_t{16385}, uint64_t{32771}, uint64_t{1} << 20,
            (uint64_t{1} << 32) - 1, uint64_t{1} << 32, (uint64_t{5} << 30) + 7}) {
        for (const bool immediate : {false, true}) {
          const Split split = split_write(length, {links, most}, immediate);
          CAPTURE(links);
          CAPTURE(most);
          CAPTURE(length);
          CHECK(split.part_bytes <= most);
          CHECK(split.parts >= 1);
          if (length) {
            CHECK((split.parts - 1) * split.part_bytes < length);
            CHECK(split.parts * split.part_bytes >= length);
          }
          if (immediate && !split.trailing) CHECK(split.parts <= kMaxParts);
        }
      }
    }
  }
}

TEST_CASE("pieces: random writes of random lengths name each byte once") {
  std::mt19937_64 random(20261123);
  for (int round = 0; round < 300; ++round) {
    CAPTURE(round);
    const uint64_t size = 1 << 18;
    Bench bench(size);
    const uint64_t length = random() % 3 ? random() % 70000 : random() % 5;
    const uint64_t from = random() % (size - length), to = random() % (size - length);
    const SplitLimits limits{static_cast<uint32_t>(1 + random() % 5), 1 + random() % 20000};
    PieceSource source(bench.region, {{from, bench.remote, to, length}}, false, 9, limits);
    const uint64_t trailing = source.trailing_units();
    const Seen seen = drain(source, random);
    CHECK_FALSE(seen.doubled);
    CHECK(seen.longest <= limits.max_write_bytes);
    CHECK(seen.units + trailing == kUnitsPerArrival);
    REQUIRE(seen.bytes.size() == length);
    for (const auto& [remote, local] : seen.bytes) REQUIRE(remote - to == local - from);
  }
}

TEST_CASE("pages: random layouts, one and two stride levels, on both sides") {
  std::mt19937_64 random(7);
  for (int round = 0; round < 400; ++round) {
    CAPTURE(round);
    const uint64_t size = 1 << 19;
    Bench bench(size);
    const uint64_t runs = uint64_t{1} << random() % 6;  // up to 32: more than an arrival has sixteenths
    const uint64_t other_runs = uint64_t{1} << random() % 4;
    const uint64_t page_bytes = 64 * (1 + random() % 8);
    const auto side = [&](uint64_t r) {
      PageSide s;
      s.runs = r;
      const uint64_t run = page_bytes / r;
      s.run_stride = random() % 2 ? run : run + random() % 64;
      const uint64_t extent = (r - 1) * s.run_stride + run;
      s.stride = random() % 2 ? extent : extent + random() % 100;
      s.offset = random() % 1000;
      return s;
    };
    PageSide local = side(runs), remote = side(other_runs);
    const uint64_t most = std::min((size - 5000) / local.stride, (size - 5000) / remote.stride) - 1;
    const size_t count = random() % std::min<uint64_t>(most, 100);
    std::vector<uint32_t> all(most);
    std::iota(all.begin(), all.end(), 0);
    local.indices.assign(all.begin(), all.begin() + static_cast<ptrdiff_t>(count));
    if (random() % 2) std::shuffle(all.begin(), all.end(), random);
    remote.indices.assign(all.begin(), all.begin() + static_cast<ptrdiff_t>(count));
    const SplitLimits limits{2, random() % 4 ? uint64_t{1} << 30 : 1 + random() % 100};

    std::map<uint64_t, uint64_t> expected;
    const auto at = [&](const PageSide& s, size_t page, uint64_t b) {
      const uint64_t run = page_bytes / s.runs;
      return s.offset + s.indices[page] * s.stride + b / run * s.run_stride + b % run;
    };
    for (size_t page = 0; page < count; ++page) {
      for (uint64_t b = 0; b < page_bytes; ++b) expected[at(remote, page, b)] = at(local, page, b);
    }
    PageSource source(bench.region, local, bench.remote, remote, page_bytes, 3, limits);
    const uint64_t trailing = source.trailing_units();
    const Seen seen = drain(source, random);
    CHECK_FALSE(seen.doubled);
    CHECK(seen.longest <= std::max(limits.max_write_bytes, uint64_t{1}));
    CHECK(seen.units + trailing == count * kUnitsPerArrival);
    CHECK((trailing == 0 || seen.units == 0));
    CHECK(seen.bytes == expected);

    // The same where memory takes lists: 64 pages a WR at most, of all stretches.
    bench.remote->keys[0].takes_lists = bench.region->registrations[0].takes_lists = true;
    PageSource lists(bench.region, local, bench.remote, remote, page_bytes, 3, limits);
    const Seen listed = drain(lists, random);
    CHECK_FALSE(listed.doubled);
    CHECK(listed.units + trailing == count * kUnitsPerArrival);
    CHECK(listed.bytes == expected);
    if (runs <= 8 && limits.max_write_bytes > page_bytes) CHECK(listed.requests == (count + 63) / 64);
  }
}

TEST_CASE("pages contiguous on both sides share WRs, 64 at most; others do not") {
  std::mt19937_64 random(1);
  Bench bench(1 << 20);
  std::vector<uint32_t> ascending(200);
  std::iota(ascending.begin(), ascending.end(), 5);
  PageSide side{.indices = ascending, .offset = 0, .stride = 1024};
  PageSource merged(bench.region, side, bench.remote, side, 1024, 3, {1, uint64_t{1} << 30});
  CHECK(drain(merged, random).requests == 4);
  PageSource apart(bench.region, side, bench.remote, side, 1000, 3, {1, uint64_t{1} << 30});
  CHECK(drain(apart, random).requests == 200);
  PageSide backwards = side;
  std::reverse(backwards.indices.begin(), backwards.indices.end());
  PageSource reversed(bench.region, side, bench.remote, backwards, 1024, 3, {1, uint64_t{1} << 30});
  CHECK(drain(reversed, random).requests == 200);
}

TEST_CASE("gathered immediates weigh as much, and none comes before what it tells of") {
  std::mt19937_64 random(2);
  const auto pick = [&](uint64_t n) { return std::uniform_int_distribution<uint64_t>(0, n - 1)(random); };
  for (int round = 0; round < 2000; ++round) {
    std::vector<WorkRequest> batch(1 + pick(64));
    for (WorkRequest& wr : batch) {
      wr.length = std::array<uint64_t, 4>{0, 1024, 65536, 1 << 20}[pick(4)];
      wr.flags = pick(8) == 0 ? WorkRequest::kWrite : WorkRequest::kImmediate;
      wr.immediate =
          encode_immediate(static_cast<uint32_t>(pick(10) == 0), static_cast<uint32_t>(1 + pick(kMaxWeight)));
    }
    const auto before = batch;
    gather_immediates(batch);
    std::map<uint32_t, uint64_t> told, due;
    for (size_t i = 0; i < batch.size(); ++i) {
      CHECK(batch[i].length == before[i].length);
      if (before[i].flags & WorkRequest::kImmediate) {
        due[immediate_id(before[i].immediate)] += immediate_weight(before[i].immediate);
      }
      if (!(batch[i].flags & WorkRequest::kImmediate)) continue;
      CHECK((before[i].flags & WorkRequest::kImmediate) != 0);
      const uint32_t id = immediate_id(batch[i].immediate);
      CHECK(id == immediate_id(before[i].immediate));
      CHECK((told[id] += immediate_weight(batch[i].immediate)) <= due[id]);
    }
    CHECK(told == due);
  }
  std::vector<WorkRequest> pages(
      64, {.length = 4096, .flags = WorkRequest::kImmediate, .immediate = encode_immediate(9, 16)});
  gather_immediates(pages);
  CHECK(std::count_if(pages.begin(), pages.end(), [](const auto& wr) { return wr.flags != 0; }) == 1);
  CHECK(pages.back().immediate == encode_immediate(9, 1024));
  std::vector<WorkRequest> large(
      4, {.length = 1 << 20, .flags = WorkRequest::kImmediate, .immediate = encode_immediate(9, 16)});
  gather_immediates(large);
  CHECK(
      std::all_of(large.begin(), large.end(), [](const auto& wr) { return wr.immediate == encode_immediate(9, 16); }));
}

TEST_CASE("nothing to do needs no WR, but a bare immediate does") {
  std::mt19937_64 random(1);
  Bench bench(4096);
  PieceSource silent(bench.region, {{0, bench.remote, 0, 0}}, false, -1, {});
  CHECK(silent.exhausted());
  PieceSource told(bench.region, {{0, bench.remote, 0, 0}}, false, 4, {});
  const Seen seen = drain(told, random);
  CHECK(seen.requests == 1);
  CHECK(seen.units == kUnitsPerArrival);
  PageSource none(bench.region, {}, bench.remote, {}, 1024, 3, {});
  CHECK(none.exhausted());
}
