// What only the shm NIC promises: refused keys, the fence of a closed link, mapped memory, one process, a peer that
// scribbles. What it shares with others is in libfabric_data_test.cpp and libfabric_failure_test.cpp.
#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "nic/host_internal.h"
#include "tests/libfabric_halves.h"

namespace railwire {
namespace {

using namespace testing;

// Two NICs of this process, with a link each.
struct Pair {
  Pair() {
    for (Half* half : {&one, &two}) {
      Half& other = half == &one ? two : one;
      half->peer = half->nic->resolve(other.nic->address());
      half->link->connect(other.link->address());
      half->remote = half->nic->import_memory(other.region.blob);
    }
  }
  template <class F>
  void until(F&& done) {
    bool good = false;
    for (const int64_t end = now_ms() + 10'000; !(good = done()) && now_ms() < end;) {
      one.poll();
      two.poll();
    }
    REQUIRE(good);
  }
  void post(const WorkRequest& wr) {
    const size_t before = one.ends.size();
    until([&] { return one.link->post({&wr, 1}) == 1; });
    until([&] { return one.ends.size() == before + 1; });
  }

  Half one{"shm"}, two{"shm"};
};

TEST_CASE("two shm NICs of one process write, read and send") {
  Pair pair;
  std::fill(pair.one.memory.begin(), pair.one.memory.end(), 0x5a);
  for (const size_t length : {1, 8192, 8193, 3'000'000}) {
    std::fill(pair.two.memory.begin(), pair.two.memory.end(), 0);
    pair.post(pair.one.write(0, 5, length, WorkRequest::kImmediate, 7));
    pair.until([&] { return !pair.two.immediates.empty(); });
    pair.two.immediates.clear();
    CHECK(pair.one.ends.back() == Status::kOk);
    CHECK(pair.two.memory[4] == 0);
    CHECK(std::count(pair.two.memory.begin(), pair.two.memory.end(), 0x5a) == static_cast<ptrdiff_t>(length));
  }
  pair.one.send("hello");
  pair.until([&] { return pair.two.messages.size() == 1; });
  CHECK(pair.two.messages[0] == "hello");
}

TEST_CASE("what a key does not allow is refused, and costs the write alone") {
  Pair pair;
  for (const size_t length : {100, 100'000}) {
    WorkRequest wr = pair.one.write(0, 0, length);
    wr.rkey ^= uint64_t{1} << 40;
    pair.post(wr);
    CHECK(pair.one.ends.back() == Status::kRemoteAccess);
    pair.post(pair.one.write(0, kBytes - length + 1, length));
    CHECK(pair.one.ends.back() == Status::kRemoteAccess);
    wr = pair.one.write(0, 0, length);
    wr.remote -= 1;
    pair.post(wr);
    CHECK(pair.one.ends.back() == Status::kRemoteAccess);
  }
  CHECK(!pair.one.link->broken());
  CHECK(std::all_of(pair.two.memory.begin(), pair.two.memory.end(), [](unsigned char c) { return c == 0; }));

  std::vector<unsigned char> source(4096);
  Registration read_only =
      pair.two.nic->register_memory({.address = source.data(), .length = source.size(), .writable = false});
  const RemoteMemory there = pair.one.nic->import_memory(read_only.blob);
  WorkRequest wr = pair.one.write(0, 0, 64);
  wr.remote = there.base;
  wr.rkey = there.rkey;
  pair.post(wr);
  CHECK(pair.one.ends.back() == Status::kRemoteAccess);
  wr.flags = WorkRequest::kRead;
  pair.post(wr);
  CHECK(pair.one.ends.back() == Status::kOk);
  pair.two.nic->deregister(read_only);
  pair.post(wr);
  CHECK(pair.one.ends.back() == Status::kRemoteAccess);  // the key is gone, and its slot may be another's
}

TEST_CASE("memory that is not there ends a copy with an error that says whose it was") {
  Pair pair;
  void* hole = mmap(nullptr, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(hole != MAP_FAILED);
  Registration bad = pair.two.nic->register_memory({.address = hole, .length = 1 << 20});
  const RemoteMemory there = pair.one.nic->import_memory(bad.blob);
  WorkRequest wr = pair.one.write(0, 0, 100'000);
  wr.remote = there.base;
  wr.rkey = there.rkey;
  pair.post(wr);
  CHECK(pair.one.ends.back() == Status::kRemoteAccess);
  wr = pair.one.write(0, 0, 100'000);
  wr.local = hole;
  pair.post(wr);
  CHECK(pair.one.ends.back() == Status::kLocal);
  pair.post(pair.one.write(0, 0, 100'000));
  CHECK(pair.one.ends.back() == Status::kOk);
  pair.two.nic->deregister(bad);
  munmap(hole, 1 << 20);
}

TEST_CASE("a memfd is mapped by the peer, and no more once it is deregistered") {
  Pair pair;
  SharedMemory shared = SharedMemory::create("test-shared", 1 << 20);
  Registration there = pair.two.nic->register_memory(
      {.address = shared.data() + 100, .length = (1 << 20) - 100, .shared_fd = shared.fd(), .shared_offset = 100});
  const RemoteMemory remote = pair.one.nic->import_memory(there.blob);
  std::fill(pair.one.memory.begin(), pair.one.memory.end(), 0x77);
  for (int i = 0; i < 50; ++i) {  // the first by CMA, or through the ring
    WorkRequest wr = pair.one.write(0, 0, 20'000 - static_cast<size_t>(i) * 399);
    wr.remote = remote.base + 13;
    wr.rkey = remote.rkey;
    std::fill(shared.data(), shared.data() + shared.bytes(), std::byte{0});
    pair.post(wr);
    REQUIRE(pair.one.ends.back() == Status::kOk);
    const auto written = std::count(shared.data(), shared.data() + shared.bytes(), std::byte{0x77});
    REQUIRE(written == static_cast<ptrdiff_t>(wr.length));
    REQUIRE(shared.data()[100 + 12] == std::byte{0});
    REQUIRE(shared.data()[100 + 13] == std::byte{0x77});
  }
  pair.two.nic->deregister(there);
  WorkRequest wr = pair.one.write(0, 0, 64);
  wr.remote = remote.base;
  wr.rkey = remote.rkey;
  pair.post(wr);
  CHECK(pair.one.ends.back() == Status::kRemoteAccess);
}

TEST_CASE("a ring full of immediates of writes that need no ring goes on when the peer has taken them") {
  Pair pair;
  pair.post(pair.one.write(0, 0, 0));  // the halves have met
  std::vector<WorkRequest> batch(64, pair.one.write(0, 0, 0, WorkRequest::kImmediate, 7));
  size_t posted = 0, seen = 0;
  for (size_t before = 1; posted != before;) {  // the peer looks at nothing: until the ring and the link are full
    before = posted;
    posted += pair.one.link->post(batch);
    pair.one.poll();
  }
  REQUIRE(posted > kLinkRingBytes / record_bytes(RecordKind::kImmediate, 0));
  pair.until([&] {
    seen += std::exchange(pair.two.immediates, {}).size();
    return seen == posted && pair.one.link->outstanding() == 0;
  });
}

TEST_CASE("what the peer said of a write is read before the next ones take the place of its record") {
  Pair pair;
  std::fill(pair.one.memory.begin(), pair.one.memory.end(), 0xff);  // read as a record's head, it says "refused"
  pair.post(pair.one.write(0, 0, 0));                               // the halves have met
  pair.one.ends.clear();
  size_t posted = 0;
  for (int round = 0; round < 4; ++round) {
    std::vector<WorkRequest> batch(64, pair.one.write(0, 0, 900 + 77 * round, WorkRequest::kImmediate, 7));
    for (size_t before = posted + 1; posted != before;) {  // the ring is full, and some wait behind it
      before = posted;
      posted += pair.one.link->post(batch);
    }
    REQUIRE(pair.one.link->outstanding() > kLinkRingBytes / record_bytes(RecordKind::kWriteImmediate, 900 + 77 * 4));
    for (size_t seen = 1; seen != pair.two.immediates.size();) {
      seen = pair.two.immediates.size();
      pair.two.poll();
    }
    pair.one.poll();
  }
  pair.until([&] { return pair.one.ends.size() == posted; });
  CHECK(std::count(pair.one.ends.begin(), pair.one.ends.end(), Status::kOk) == static_cast<ptrdiff_t>(posted));
}

TEST_CASE("a half that is closed is fenced while the peer does not copy, and the peer's half breaks") {
  Pair pair;
  pair.post(pair.one.write(0, 0, 100'000, WorkRequest::kImmediate, 1));
  CHECK(!pair.two.link->fenced());
  pair.two.link->close();
  CHECK(pair.two.link->closed());
  CHECK(pair.two.link->fenced());
  const WorkRequest wr = pair.one.write(0, 0, 100'000);
  CHECK(pair.one.link->post({&wr, 1}) <= 1);
  pair.until([&] { return pair.one.link->broken(); });
  pair.until([&] { return pair.one.link->outstanding() == 0; });
  CHECK(std::all_of(pair.two.memory.begin(), pair.two.memory.end(), [](unsigned char c) { return c == 0; }));
}

TEST_CASE("a NIC that is gone breaks the links to it, and is not found again") {
  auto pair = std::make_unique<Pair>();
  auto third = std::make_unique<Half>("shm");
  Half fourth("shm");
  third->link->connect(fourth.link->address());
  fourth.link->connect(third->link->address());
  const auto address = third->nic->address();
  fourth.remote = fourth.nic->import_memory(third->region.blob);
  const WorkRequest wr = fourth.write(0, 0, 64);
  for (int i = 0; i < 1000 && fourth.link->post({&wr, 1}) == 0; ++i) {
    third->poll();
    fourth.poll();
  }
  third.reset();
  fourth.poll_until([&] { return fourth.link->broken() && fourth.link->outstanding() == 0; });
  fourth.poll_until([&] { return throws_nic_error([&] { fourth.nic->forget(fourth.nic->resolve(address)); }); });
}

TEST_CASE("malformed addresses are refused") {
  Half half("shm");
  auto address = half.nic->address();
  for (const size_t length : {size_t{0}, size_t{5}, address.size() - 1}) {
    CHECK(throws_nic_error([&] { half.nic->resolve(std::span(address).first(length)); }));
  }
  address[4] = std::byte{9};
  CHECK(throws_nic_error([&] { half.nic->resolve(address); }));
  CHECK(throws_nic_error([&] { half.link->connect(std::span(address).first(20)); }));
}

}  // namespace
}  // namespace railwire
