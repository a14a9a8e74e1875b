// The verbs NIC: over a provider in memory always, and over the devices that RXE_DEVICES names (scripts/rxe-vm.sh).
#include "nic/verbs_nic.h"

#include <doctest/doctest.h>
#include <poll.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <random>
#include <sstream>
#include <thread>

#include "nic/verbs_internal.h"
#include "stub_verbs.h"
#include "verbs_ends.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

std::vector<std::string> devices() {
  const char* named = std::getenv("RXE_DEVICES");
  std::istringstream words(named ? named : "");
  std::vector<std::string> out;
  for (std::string word; words >> word;) out.push_back("verbs:" + word);
  return out;
}

std::vector<std::byte> noise(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> out(size);
  for (auto& byte : out) byte = static_cast<std::byte>(random());
  return out;
}

}  // namespace

// ---- over the provider in memory
// -------------------------------------------------------------------------------------
TEST_CASE("verbs: every WR comes back once and in order, whatever was signalled, and no queue overruns") {
  for (const std::string depth : {"1", "2", "3", "16", "128"}) {
    StubVerbs stub;
    End a("verbs:stub0", {{"link_depth", depth}}), b("verbs:stub0", {{"recv_depth", "64"}});
    join(a, b);
    std::mt19937 random(7);
    uint32_t next = 0;
    constexpr uint32_t kCount = 5000;
    stub.held = true;
    while (a.ended.size() < kCount) {
      std::vector<WorkRequest> batch;
      const uint32_t chain = 1 + random() % 100;
      for (uint32_t i = 0; i < chain && next + i < kCount; ++i) batch.push_back(a.write(b, 0, 0, 8, next + i));
      next += static_cast<uint32_t>(a.link->post(batch));
      REQUIRE(a.link->outstanding() <= a.nic->info().link_depth);
      stub.carry_out(random() % 50);
      a.poll();
      b.poll();
    }
    CHECK(stub.overruns == 0);
    CHECK(a.failed == 0);
    for (uint32_t i = 0; i < kCount; ++i) {
      REQUIRE(a.ended[i].context == reinterpret_cast<void*>(uintptr_t{i} + 1));
      REQUIRE(b.immediates[i] == i);
    }
    CHECK(b.link->immediates_landed() == kCount);
    CHECK(a.link->immediates_completed() == kCount);
    CHECK(a.link->outstanding() == 0);
  }
}

TEST_CASE("verbs: a batch is one doorbell, few WRs are signalled, short ones travel inline, receives go in batches") {
  StubVerbs stub;
  End a("verbs:stub0"), b("verbs:stub0");
  join(a, b);
  const size_t doorbells = stub.doorbells, receives = stub.receive_doorbells;
  std::vector<WorkRequest> batch;
  for (uint32_t i = 0; i < 64; ++i) batch.push_back(a.write(b, 0, 0, i % 2 ? 8 : 4096, i));
  for (int round = 0; round < 20; ++round) {
    const size_t before = a.ended.size();
    REQUIRE(a.link->post(batch) == 64);
    REQUIRE(until(a, b, [&] { return a.ended.size() == before + 64 && b.immediates.size() == before + 64; }));
  }
  CHECK(stub.doorbells - doorbells == 20);
  CHECK(stub.signalled <= 20 * 4);
  CHECK(stub.inlined == 20 * 32);
  CHECK(stub.receive_doorbells - receives <= 21);
}

TEST_CASE("verbs: errors are told by wr_id: the one that failed, then what was flushed, and nothing before it") {
  StubVerbs stub;
  End a("verbs:stub0", {{"link_depth", "64"}}), b("verbs:stub0");
  join(a, b);
  stub.held = true;
  std::vector<WorkRequest> batch;
  for (uint32_t i = 0; i < 40; ++i) batch.push_back(a.write(b, 0, 0, 16, i));
  REQUIRE(a.link->post(batch) == 40);
  stub.fail_in = 20;
  stub.carry_out();
  REQUIRE(until(a, b, [&] { return a.ended.size() == 40; }));
  CHECK(b.immediates.size() == 20);
  CHECK(a.immediates.empty());  // the stub's error completions call themselves receives
  for (size_t i = 0; i < 40; ++i) {
    const Status expected = i < 20 ? Status::kOk : i == 20 ? Status::kRemoteAccess : Status::kFlushed;
    CHECK(a.ended[i].status == expected);
  }
  CHECK(has(a.nic->describe(a.ended[20].provider_error), "IBV_WC_REM_ACCESS_ERR"));
  CHECK(a.link->broken());
  CHECK(a.link->post(batch) == 0);
  REQUIRE(a.unfinished.size() == 20);
  for (uint32_t i = 0; i < 20; ++i) CHECK(a.unfinished[i].immediate == 20 + i);
  shut(b);
  CHECK(b.link->immediates_landed() == 20);
  CHECK(a.link->immediates_completed() == 20);
}

TEST_CASE("verbs: close() takes every WR back, and what had landed by then is still handed out") {
  StubVerbs stub;
  End a("verbs:stub0", {{"link_depth", "64"}}), b("verbs:stub0");
  join(a, b);
  stub.held = true;
  std::vector<WorkRequest> batch;
  for (uint32_t i = 0; i < 40; ++i) batch.push_back(a.write(b, 0, 0, 16, i));
  REQUIRE(a.link->post(batch) == 40);
  stub.carry_out(10);
  const auto message = noise(1000, 1);
  const uint64_t to_b = a.nic->resolve(b.nic->address());
  REQUIRE(a.nic->send(to_b, message, nullptr));
  shut(b);
  CHECK(b.link->immediates_landed() == 10);
  shut(a);
  REQUIRE(until(a, b, [&] { return a.link->outstanding() == 0 && b.messages.size() == 1; }));
  CHECK(b.immediates.size() == 10);
  CHECK(b.messages[0] == message);
  CHECK(a.ended.size() == 40);
  CHECK(a.failed == 30);
}

TEST_CASE(
    "verbs: while a device takes its time to end a queue pair, other links write, and the end is told when it has "
    "come") {
  StubVerbs stub;
  std::atomic<bool> in_call{false};
  std::atomic<int> permits{0};
  stub.on_error = stub.on_destroy = [&] {
    in_call = true;
    while (permits == 0) std::this_thread::yield();
    in_call = false;
    --permits;
  };
  End a("verbs:stub0"), b("verbs:stub0");
  join(a, b);
  const auto near = a.nic->create_link(), far = b.nic->create_link();
  near->connect(far->address());
  far->connect(near->address());
  stub.held = true;
  const WorkRequest lost = a.write(b, 0, 0, 8, 1);
  REQUIRE(a.link->post({&lost, 1}) == 1);
  a.link->close();  // returns although the device has not
  for (int call = 0; call < 2; ++call) {
    CAPTURE(call);
    REQUIRE(until(a, b, [&] { return in_call.load(); }));
    CHECK(!a.link->shut());
    CHECK(!a.link->closed());
    stub.held = false;
    const WorkRequest wr = a.write(b, 0, 0, 8, static_cast<uint32_t>(10 + call));
    REQUIRE(near->post({&wr, 1}) == 1);
    REQUIRE(until(a, b, [&] { return !b.immediates.empty(); }));
    CHECK(b.immediates.back() == static_cast<uint32_t>(10 + call));
    b.immediates.clear();
    ++permits;
    while (permits > 0) std::this_thread::yield();
  }
  REQUIRE(until(a, b, [&] { return a.link->closed(); }));
  CHECK(a.failed == 1);
  CHECK(a.link->immediates_completed() == 0);
  permits = 1000;  // for the ends of the others
}

TEST_CASE("verbs: control messages of every length, cut into packets and put together again") {
  StubVerbs stub;
  End a("verbs:stub0"), b("verbs:stub0");
  const uint64_t to_b = a.nic->resolve(b.nic->address());
  const uint32_t longest = a.nic->info().max_message_bytes;
  CHECK(longest >= 32768);
  size_t count = 0;
  for (const uint32_t size : {0u, 1u, 991u, 992u, 993u, 5000u, longest - 1, longest}) {
    const auto message = noise(size, size);
    REQUIRE(until(a, b, [&] { return a.nic->send(to_b, message, nullptr); }));
    ++count;
    REQUIRE(until(a, b, [&] { return b.messages.size() == count; }));
    CHECK(b.messages.back() == message);
  }
  // A lost piece loses its message and no other.
  stub.lose_every = 7;
  for (int i = 0; i < 100; ++i) {
    REQUIRE(until(a, b, [&] { return a.nic->send(to_b, noise(3000, 100 + static_cast<uint32_t>(i)), nullptr); }));
  }
  REQUIRE(until(a, b, [&] { return a.sent == count + 100; }));
  b.poll();
  CHECK(b.messages.size() > count + 20);
  CHECK(b.messages.size() < count + 100);
  for (size_t i = count; i < b.messages.size(); ++i) CHECK(b.messages[i].size() == 3000);
  CHECK(stub.overruns == 0);
}

TEST_CASE("verbs: addresses from the network are checked") {
  StubVerbs stub;
  End a("verbs:stub0"), b("verbs:stub0");
  const auto good = b.link->address();
  for (size_t cut = 0; cut < good.size(); ++cut) {
    CHECK_THROWS_AS(a.link->connect({good.data(), cut}), NicError);
    CHECK_THROWS_AS(a.nic->resolve({good.data(), cut}), NicError);
  }
  std::mt19937 random(3);
  for (int i = 0; i < 2000; ++i) {
    auto bad = good;
    bad[random() % bad.size()] = static_cast<std::byte>(random());
    try {
      a.nic->forget(a.nic->resolve(bad));
    } catch (const NicError&) {
    }
  }
  auto other_layer = good;
  other_layer[1] = std::byte{0};
  CHECK(has(why([&] { a.link->connect(other_layer); }), "the peer's is InfiniBand"));
  CHECK(has(why([&] { a.link->connect(other_layer); }), "stub0"));
  End forced("verbs:stub0", {{"mtu", "1024"}});
  auto smaller = good;
  smaller[2] = std::byte{IBV_MTU_512};
  CHECK(has(why([&] { forced.link->connect(smaller); }), "the peer's port carries 512"));
  a.link->connect(smaller);  // without the option the smaller of the two is used
}

TEST_CASE("verbs: what is wrong with a device is said with its name and the way out") {
  StubVerbs stub;
  const auto open = [](const std::string& spec, const Options& options = {}) {
    return why([&] { make_verbs_nic(spec, options); });
  };
  CHECK(has(open("verbs:mlx5_7"), "no RDMA device mlx5_7; this machine has stub0"));
  CHECK(has(open("verbs:stub0:3"), "there is no port 3"));
  CHECK(has(open("verbs:stub0", {{"gid_index", "9"}}), "gid_index 9 of stub0"));
  CHECK(has(open("verbs:stub0", {{"pkey_index", "9"}}), "pkey_index 9"));
  CHECK(has(open("verbs:stub0", {{"mtu", "4096"}}), "carries 1024"));
  CHECK(has(open("verbs:stub0", {{"mtu", "1000"}}), "512, 1024"));
  CHECK(has(open("verbs:stub0", {{"timeout", "0"}}), "1 to 31"));
  CHECK(has(open("verbs:stub0", {{"traffic_class", "x"}}), "traffic_class is \"x\""));
  CHECK(has(open("verbs:"), "write verbs"));
  stub.max_cqe = 6000;
  End small("verbs:stub0");
  CHECK(has(why([&] {
              std::vector<std::unique_ptr<Link>> links;
              for (int i = 0; i < 10; ++i) links.push_back(small.nic->create_link());
            }),
            "options link_depth and recv_depth"));
  stub.reg_errno = ENOMEM;
  CHECK(has(open("verbs:stub0"), "Cannot allocate memory"));
  stub.state = IBV_PORT_DOWN;
  CHECK(has(open("verbs:stub0"), "port 1 of stub0 is DOWN"));
}

// ---- over real queue pairs
// -------------------------------------------------------------------------------------------
TEST_CASE("verbs on devices: writes with immediates land byte exact and in order, over any pair of devices") {
  const auto names = devices();
  for (const auto& from : names) {
    for (const auto& to : names) {
      End a(from), b(to);
      join(a, b);
      const auto content = noise(1 << 20, 5);
      std::copy(content.begin(), content.end(), a.memory.begin());
      std::mt19937 random(9);
      std::vector<std::byte> model(b.memory.size());
      constexpr uint32_t kCount = 100;
      for (uint32_t i = 0; i < kCount; ++i) {
        const uint64_t length = i % 3 == 0 ? random() % 64 : random() % 20'000;
        const uint64_t at = random() % (model.size() - length), source = random() % (content.size() - length);
        const WorkRequest wr = a.write(b, source, at, length, i);
        REQUIRE(until(a, b, [&] { return a.link->post({&wr, 1}) == 1; }));
        std::memcpy(model.data() + at, content.data() + source, length);
      }
      REQUIRE(until(a, b, [&] { return a.ended.size() == kCount && b.immediates.size() == kCount; }));
      CHECK(a.failed == 0);
      CHECK(b.memory == model);
      for (uint32_t i = 0; i < kCount; ++i) REQUIRE(b.immediates[i] == i);
      // A read brings it back.
      WorkRequest back = b.write(a, 0, 0, 1 << 20, 0, WorkRequest::kRead);
      std::fill(b.memory.begin(), b.memory.end(), std::byte{0});
      REQUIRE(b.link->post({&back, 1}) == 1);
      REQUIRE(until(a, b, [&] { return b.ended.size() == 1; }));
      CHECK(b.memory == content);
    }
  }
}

TEST_CASE("verbs on devices: a refused WR fails, breaks its link, and a new link works") {
  const auto names = devices();
  if (names.empty()) return;
  End a(names.front()), b(names.back());
  join(a, b);
  WorkRequest wr = a.write(b, 0, 0, 100, 1);
  wr.rkey ^= 0x5500;
  const WorkRequest batch[] = {a.write(b, 0, 0, 100, 0), wr, a.write(b, 0, 0, 100, 2)};
  REQUIRE(a.link->post(batch) == 3);
  REQUIRE(until(a, b, [&] { return a.ended.size() == 3; }));
  CHECK(a.ended[0].status == Status::kOk);
  CHECK(a.ended[1].status == Status::kRemoteAccess);
  CHECK(a.ended[2].status == Status::kFlushed);
  CHECK(a.link->broken());
  shut(a);
  shut(b);
  CHECK(b.link->immediates_landed() == 1);
  a.link = a.nic->create_link();
  b.link = b.nic->create_link();
  join(a, b);
  const WorkRequest again = a.write(b, 0, 0, 100, 7);
  REQUIRE(a.link->post({&again, 1}) == 1);
  REQUIRE(until(a, b, [&] { return b.immediates.size() == 2; }));
  CHECK(b.immediates[1] == 7);
}

TEST_CASE("verbs on devices: closing the receiving half under load fences, and both sides agree on what landed") {
  const auto names = devices();
  if (names.empty()) return;
  for (int round = 0; round < 5; ++round) {
    End a(names.front(), {{"timeout", "8"}, {"retry_count", "1"}}), b(names.back());
    join(a, b);
    uint32_t next = 0;
    const size_t stop = 20 + 13 * static_cast<size_t>(round);
    while (b.immediates.size() < stop) {
      std::vector<WorkRequest> batch;
      for (uint32_t i = 0; i < 16; ++i) batch.push_back(a.write(b, 0, 0, 2000, next + i));
      next += static_cast<uint32_t>(a.link->post(batch));
      a.poll();
      b.poll();
    }
    shut(b);
    const uint64_t landed = b.link->immediates_landed();
    std::memset(b.memory.data(), 0x5a, b.memory.size());
    shut(a);
    REQUIRE(until(a, b, [&] { return a.link->outstanding() == 0; }));
    for (int i = 0; i < 200; ++i) b.poll();
    CHECK(b.immediates.size() == landed);
    CHECK(std::all_of(b.memory.begin(), b.memory.end(), [](std::byte byte) { return byte == std::byte{0x5a}; }));
    CHECK(a.link->immediates_completed() <= landed);
    CHECK(a.link->immediates_completed() + a.unfinished.size() >= landed);
    for (uint32_t i = 0; i < landed; ++i) REQUIRE(b.immediates[i] == i);
  }
}

TEST_CASE("verbs on devices: messages pass, a sleeper is woken, links come and go beyond the first queue's size") {
  const auto names = devices();
  if (names.empty()) return;
  End a(names.front()), b(names.back());
  const uint64_t to_b = a.nic->resolve(b.nic->address());
  for (const uint32_t size : {1u, 4000u, 40000u}) {
    const auto message = noise(size, size);
    const size_t before = b.messages.size();
    REQUIRE(a.nic->send(to_b, message, nullptr));
    REQUIRE(until(a, b, [&] { return b.messages.size() > before; }));
    CHECK(b.messages.back() == message);
  }
  for (int i = 0; i < 10; ++i) {
    while (!b.nic->arm()) b.poll();
    REQUIRE(a.nic->send(to_b, noise(10, 1), nullptr));
    pollfd fd{b.nic->wait_fd(), POLLIN, 0};
    CHECK(::poll(&fd, 1, 5000) == 1);
    b.nic->disarm();
    const size_t before = b.messages.size();
    REQUIRE(until(a, b, [&] { return b.messages.size() > before; }));
  }
  std::vector<std::unique_ptr<Link>> near, far;
  for (int i = 0; i < 30; ++i) {
    near.push_back(a.nic->create_link());
    far.push_back(b.nic->create_link());
    near.back()->connect(far.back()->address());
    far.back()->connect(near.back()->address());
  }
  for (uint32_t i = 0; i < 30; ++i) {
    const WorkRequest wr = a.write(b, 0, 0, 10, i);
    REQUIRE(near[i]->post({&wr, 1}) == 1);
  }
  REQUIRE(until(a, b, [&] { return b.immediates.size() == 30 && a.ended.size() == 30; }));
}
