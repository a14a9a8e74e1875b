// The tcp link without a socket: two machines whose bytes arrive in pieces of every size; lies, garbage and refusals.
#include "nic/tcp_machine.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>

namespace railwire {
namespace {

using Machine = TcpMachine;

// One half with a region of its own, and what came out of it.
struct Half {
  explicit Half(uint32_t depth = 64, size_t bytes = 8 << 20) : memory(bytes), machine(regions, depth) {
    regions.add(key, {memory.data(), memory.size(), true});
  }

  WorkRequest write(size_t from, size_t to, size_t length, uint32_t immediate = 0) {
    return {.local = memory.data() + from,
            .remote = to,
            .rkey = key,
            .length = length,
            .flags = immediate ? WorkRequest::kImmediate : WorkRequest::kWrite,
            .immediate = immediate};
  }
  WorkRequest read(size_t into, size_t from, size_t length) {
    return {.local = memory.data() + into, .remote = from, .rkey = key, .length = length, .flags = WorkRequest::kRead};
  }
  size_t post(const WorkRequest& request) { return machine.post({&request, 1}); }

  std::vector<std::byte> out(size_t most) {
    std::vector<std::byte> bytes;
    while (bytes.size() < most) {
      const auto parts = machine.output(true);
      if (parts.empty()) break;
      size_t taken = 0;
      for (const iovec& part : parts) {
        const size_t some = std::min(part.iov_len, most - bytes.size());
        const auto* from = static_cast<const std::byte*>(part.iov_base);
        bytes.insert(bytes.end(), from, from + some);
        taken += some;
        if (bytes.size() == most) break;
      }
      machine.sent(taken);
    }
    return bytes;
  }
  void in(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      iovec places[Machine::kMostPlaces];
      const size_t count = machine.room(places);
      size_t put = 0;
      for (size_t i = 0; i < count && put < bytes.size(); ++i) {
        const size_t some = std::min(places[i].iov_len, bytes.size() - put);
        std::memcpy(places[i].iov_base, bytes.data() + put, some);
        put += some;
      }
      REQUIRE(put > 0);
      machine.received(put, immediates);
      bytes = bytes.subspan(put);
    }
  }
  void collect() {
    Completion completions[16];
    while (const size_t n = machine.hand_out(completions, nullptr)) {
      for (size_t i = 0; i < n; ++i) ends.push_back(completions[i].status);
    }
  }

  static constexpr uint64_t key = 77;
  TcpRegions regions;
  std::vector<std::byte> memory;
  Machine machine;
  std::vector<uint32_t> immediates;
  std::vector<Status> ends;
};

// Moves bytes both ways until nothing moves, in pieces of random size up to `most`.
void run(Half& a, Half& b, std::mt19937& random, size_t most) {
  for (;;) {
    const auto there = a.out(random() % most + 1), back = b.out(random() % most + 1);
    b.in(there);
    a.in(back);
    a.collect();
    b.collect();
    if (there.empty() && back.empty()) return;
  }
}

std::byte pattern(size_t i) { return static_cast<std::byte>(i * 131 + (i >> 8) * 7 + 3); }

TEST_CASE("tcp machine: writes of every length land exactly, in pieces of every size") {
  std::mt19937 random(1);
  for (const size_t most : {1u, 7u, 100u, 5000u, 3'000'000u}) {
    CAPTURE(most);
    for (const size_t length : {size_t{0}, size_t{1}, size_t{63}, size_t{4096}, size_t{40'000}, size_t{1} << 20,
                                (size_t{1} << 20) + 1, (size_t{3} << 20) + 13}) {
      if (most < 100 && length > 4096) continue;
      CAPTURE(length);
      Half a, b;
      for (size_t i = 0; i < a.memory.size(); ++i) a.memory[i] = pattern(i);
      REQUIRE(a.post(a.write(5, 100, length)) == 1);
      REQUIRE(a.post(a.write(9, 4 << 20, length, 42)) == 1);
      run(a, b, random, most);
      CHECK(a.ends == std::vector(2, Status::kOk));
      CHECK(b.immediates == std::vector<uint32_t>{42});
      CHECK(b.machine.immediates_landed() == 1);
      CHECK(a.machine.immediates_completed() == 1);
      CHECK(
          std::equal(b.memory.begin() + 100, b.memory.begin() + 100 + static_cast<long>(length), a.memory.begin() + 5));
      CHECK(std::equal(b.memory.begin() + (4 << 20), b.memory.begin() + (4 << 20) + static_cast<long>(length),
                       a.memory.begin() + 9));
      const auto zeros = [&](size_t from, size_t to) {
        return std::all_of(b.memory.begin() + static_cast<long>(from), b.memory.begin() + static_cast<long>(to),
                           [](std::byte x) { return x == std::byte{0}; });
      };
      CHECK(zeros(0, 100));
      CHECK(zeros(100 + length, 4 << 20));
      CHECK(zeros((4 << 20) + length, b.memory.size()));
    }
  }
}

TEST_CASE("tcp machine: a mix of everything, both ways, against a plain copy") {
  const unsigned seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 20; ++round) {
    Half a(256), b(256);
    for (size_t i = 0; i < a.memory.size(); ++i) a.memory[i] = pattern(i), b.memory[i] = pattern(i + 99);
    auto want_a = a.memory, want_b = b.memory;
    // Each half: the low quarter is read by the other and written by nobody; the rest is cut into places of one use.
    const size_t quarter = a.memory.size() / 4;
    std::vector<uint32_t> sent_a, sent_b;
    size_t place = quarter;
    size_t count = 0;
    for (; count < 200; ++count) {
      const size_t length = random() % 10 == 0 ? random() % (1 << 20) : random() % 3000;
      if (place + length > a.memory.size()) break;
      const size_t from = random() % (quarter - std::min(length, quarter - 1));
      const bool mine = random() % 2, read = random() % 4 == 0;
      Half& one = mine ? a : b;
      const auto& source = read == mine ? b.memory : a.memory;
      auto& want = read == mine ? want_a : want_b;
      const uint32_t immediate = read || random() % 3 == 0 ? 0 : random() % 1000 + 1;
      if (immediate) (mine ? sent_a : sent_b).push_back(immediate);
      REQUIRE(one.post(read ? one.read(place, from, length) : one.write(from, place, length, immediate)) == 1);
      std::copy_n(source.begin() + static_cast<long>(from), length, want.begin() + static_cast<long>(place));
      place += length;
      if (random() % 8 == 0) run(a, b, random, 2'000'000);
    }
    run(a, b, random, random() % 2 ? 50'000 : 3'000'000);
    CHECK(a.ends.size() + b.ends.size() == count);
    CHECK(std::count(a.ends.begin(), a.ends.end(), Status::kOk) == static_cast<long>(a.ends.size()));
    CHECK(std::count(b.ends.begin(), b.ends.end(), Status::kOk) == static_cast<long>(b.ends.size()));
    CHECK(a.memory == want_a);
    CHECK(b.memory == want_b);
    CHECK(b.immediates == sent_a);  // in the order of posting
    CHECK(a.immediates == sent_b);
  }
}

TEST_CASE("tcp machine: what the peer may not touch is refused, what was before it has landed, the rest comes back") {
  std::mt19937 random(2);
  struct Bad {
    const char* what;
    WorkRequest request;
  };
  Half probe;
  WorkRequest wrong_key = probe.write(0, 0, 8, 9), beyond = probe.write(0, probe.memory.size() - 7, 8, 9),
              far = probe.write(0, ~uint64_t{0} - 3, 8, 9), read_key = probe.read(0, 0, 8),
              read_beyond = probe.read(0, probe.memory.size(), 1);
  wrong_key.rkey = read_key.rkey = 78;
  for (const Bad& bad : {Bad{"key", wrong_key}, Bad{"beyond", beyond}, Bad{"far", far}, Bad{"read key", read_key},
                         Bad{"read beyond", read_beyond}}) {
    CAPTURE(bad.what);
    Half a, b;
    WorkRequest request = bad.request;
    request.local = a.memory.data();
    a.memory[3] = std::byte{7};
    a.post(a.write(3, 3, 1, 1));
    a.post(request);
    a.post(a.write(3, 50, 1, 2));
    b.post(b.write(0, 60, 10));
    run(a, b, random, 100);
    CHECK(a.ends == std::vector{Status::kOk, Status::kRemoteAccess, Status::kFlushed});
    CHECK(b.immediates == std::vector<uint32_t>{1});
    CHECK(b.memory[3] == std::byte{7});
    CHECK(b.memory[50] == std::byte{0});
    CHECK(a.machine.state() == Machine::State::kFailed);
    CHECK(b.machine.state() == Machine::State::kFailed);
    CHECK(b.ends.size() == 1);
    CHECK(a.post(a.write(0, 0, 1)) == 0);
  }
}

TEST_CASE("tcp machine: memory that goes in the middle of a write, or of a read, is touched no more") {
  for (const bool read : {false, true}) {
    CAPTURE(read);
    Half a, b;
    a.post(read ? a.read(0, 0, 3 << 20) : a.write(0, 0, 3 << 20, 5));
    if (read) {
      b.in(a.out(1000));
      a.in(b.out((1 << 20) + 16));
    } else {
      b.in(a.out(500'000));
    }
    b.regions.remove(Half::key);
    b.machine.region_gone(Half::key);
    const auto before = b.memory;
    std::fill(a.memory.begin() + (1 << 20), a.memory.end(), std::byte{9});
    std::mt19937 random(3);
    run(a, b, random, 200'000);
    CHECK(a.ends == std::vector{Status::kRemoteAccess});
    CHECK(b.immediates.empty());
    CHECK(b.memory == before);
  }
}

TEST_CASE("tcp machine: a break anywhere leaves counts that tell what has landed") {
  std::mt19937 random(4);
  for (int round = 0; round < 200; ++round) {
    Half a, b;
    std::vector<WorkRequest> requests;
    for (uint32_t i = 0; i < 40; ++i) requests.push_back(a.write(i, i * 1000, random() % 900, i % 3 ? i + 1 : 0));
    REQUIRE(a.machine.post(requests) == 40);
    size_t some = random() % 25'000;
    while (some > 0) {
      const auto bytes = a.out(std::min<size_t>(some, random() % 999 + 1));
      if (bytes.empty()) break;
      some -= bytes.size();
      b.in(bytes);
      if (random() % 4 == 0) a.in(b.out(1000));
      a.collect();
    }
    a.machine.fail(Status::kUnreachable, ECONNRESET);
    b.machine.fail(Status::kUnreachable, ECONNRESET);
    a.collect();
    CHECK(a.ends.size() == 40);
    CHECK(b.machine.immediates_landed() == b.immediates.size());
    CHECK(a.machine.immediates_completed() <= b.machine.immediates_landed());
    const auto first_bad = std::find_if(a.ends.begin(), a.ends.end(), [](Status s) { return s != Status::kOk; });
    if (first_bad != a.ends.end()) CHECK(*first_bad == Status::kUnreachable);
    CHECK(std::all_of(first_bad == a.ends.end() ? first_bad : first_bad + 1, a.ends.end(),
                      [](Status s) { return s == Status::kFlushed; }));
  }
}

TEST_CASE("tcp machine: the depth of a link is a limit") {
  Half a(4), b(4);
  std::vector<WorkRequest> requests(10, a.write(0, 0, 1, 1));
  CHECK(a.machine.post(requests) == 4);
  CHECK(a.machine.post(requests) == 0);
  std::mt19937 random(5);
  run(a, b, random, 1000);
  CHECK(a.machine.post(requests) == 4);
}

std::vector<std::byte> bytes_of(const TcpFrame& frame, std::vector<TcpEntry> entries = {}, size_t payload = 0) {
  std::vector<std::byte> bytes(sizeof frame + entries.size() * sizeof(TcpEntry) + payload);
  std::memcpy(bytes.data(), &frame, sizeof frame);
  if (!entries.empty()) std::memcpy(bytes.data() + sizeof frame, entries.data(), entries.size() * sizeof(TcpEntry));
  return bytes;
}

TEST_CASE("tcp machine: lies end the link before a byte is written") {
  const TcpEntry good{.rkey = Half::key, .length = 8};
  TcpEntry strange = good, reserved = good, huge = good, torn = good;
  strange.flags = 8;
  reserved.reserved = 1;
  huge.length = 0xffffffff;
  torn.flags = TcpEntry::kRead | TcpEntry::kImmediate;
  const std::vector<std::vector<std::byte>> lies{
      bytes_of({.type = 0}),
      bytes_of({.type = 9}),
      bytes_of({.type = TcpFrame::kWork, .count = 0}),
      bytes_of({.type = TcpFrame::kWork, .count = 513}),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 9}, {good}, 9),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 7}, {good}, 7),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 0xffffffff}, {good}),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 0xffffffff}, {huge}),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 8}, {strange}, 8),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 8}, {reserved}, 8),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 8}, {torn}, 8),
      bytes_of({.type = TcpFrame::kWork, .flags = 1, .count = 1, .payload = 8}, {good}, 8),
      bytes_of({.type = TcpFrame::kWork, .count = 1, .payload = 8, .landed = 1}, {good}, 8),
      bytes_of({.type = TcpFrame::kLanded, .landed = 1}),
      bytes_of({.type = TcpFrame::kLanded, .payload = 1}),
      bytes_of({.type = TcpFrame::kLanded, .count = 1}),
      bytes_of({.type = TcpFrame::kReadData, .count = 1, .payload = 8}, {}, 8),
      bytes_of({.type = TcpFrame::kRefused}),
      bytes_of({.type = TcpFrame::kRefused, .flags = TcpFrame::kOfRead}),
  };
  for (const auto& lie : lies) {
    CAPTURE(&lie - lies.data());
    Half half;
    std::fill(half.memory.begin(), half.memory.end(), std::byte{1});
    half.in(lie);
    CHECK(half.machine.state() == Machine::State::kFailed);
    CHECK(std::all_of(half.memory.begin(), half.memory.end(), [](std::byte b) { return b == std::byte{1}; }));
  }
}

TEST_CASE("tcp machine: answers to reads that were not asked for, or too long, end the link") {
  for (const TcpFrame& lie : {TcpFrame{.type = TcpFrame::kReadData, .count = 1, .payload = 200},
                              TcpFrame{.type = TcpFrame::kReadData, .count = 1, .payload = 99},
                              TcpFrame{.type = TcpFrame::kReadData, .count = 0, .payload = 100},
                              TcpFrame{.type = TcpFrame::kReadData, .count = 0, .payload = 0},
                              TcpFrame{.type = TcpFrame::kReadData, .count = 2, .payload = 100}}) {
    Half half;
    half.post(half.read(0, 0, 100));
    half.out(1000);
    half.in(bytes_of(lie, {}, lie.payload));
    half.collect();
    CHECK(half.ends == std::vector{Status::kOther});
  }
}

TEST_CASE("tcp machine: a million garbage frames: no crash, no byte outside the region") {
  const unsigned seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937 random(seed);
  std::vector<std::byte> bytes;
  for (int link = 0; link < 2000; ++link) {
    Half half(8, 4096);
    for (int i = 0; i < 3; ++i) half.post(half.write(0, 0, 50, 1));
    half.post(half.read(0, 0, 100));
    if (link % 2) half.out(10'000);
    for (int i = 0; i < 500 && half.machine.state() != Machine::State::kFailed; ++i) {
      TcpFrame frame{.type = static_cast<uint8_t>(random() % 20 ? 1 : random() % 6)};
      frame.landed = random() % 50 ? 0 : random() % 6;
      std::vector<TcpEntry> entries(random() % 4 + (random() % 30 != 0));
      uint32_t payload = 0;
      for (TcpEntry& entry : entries) {
        entry = {.rkey = Half::key, .offset = random() % 4000, .length = static_cast<uint32_t>(random() % 96)};
        const uint32_t kinds[] = {0, 2, 4, 1};
        entry.flags = kinds[random() % 4];
        if (random() % 300 == 0) entry.flags = random();
        if (random() % 300 == 0) entry.length = random();
        if (random() % 300 == 0) entry.offset = random() % 2 ? random() : ~uint64_t{random() % 200};
        if (random() % 300 == 0) entry.rkey = random();
        if (entry.flags != TcpEntry::kRead) payload += entry.length;
      }
      frame.count = static_cast<uint16_t>(random() % 300 ? entries.size() : random());
      frame.payload = random() % 300 ? payload : static_cast<uint32_t>(random());
      bytes = bytes_of(frame, entries, std::min<size_t>(payload, 100'000));
      if (random() % 100 == 0) bytes.resize(random() % (bytes.size() + 1));
      half.in(bytes);
      if (random() % 16 == 0) half.out(random() % 5000);
    }
    half.collect();
    if (half.machine.state() == Machine::State::kFailed) CHECK(half.ends.size() == 4);
  }
}

}  // namespace
}  // namespace railwire
