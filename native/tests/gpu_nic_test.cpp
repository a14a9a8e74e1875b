// GPU memory as the shm and tcp NICs move it, without an engine: lists of pages, and what they may not touch.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "gpu_memory.h"
#include "nic/make_nic.h"

using namespace railwire;

namespace {

constexpr size_t kBytes = 1 << 20;

struct GpuHalf {
  GpuHalf(const std::string& spec, int ordinal)
      : memory(gpu_or_skip(ordinal), kBytes), nic(make_nic(spec, {{"gpu", std::to_string(ordinal)}})) {
    memory.fill(std::vector<unsigned char>(kBytes, 0));
    region = nic->register_memory(
        {.address = reinterpret_cast<void*>(memory.address()), .length = kBytes, .device = ordinal});
    link = nic->create_link();
  }
  ~GpuHalf() {
    link.reset();
    nic->release_memory(remote);
    nic->deregister(region);
  }
  void poll() {
    std::array<Completion, 16> out;
    const size_t count = nic->poll(out);
    for (size_t i = 0; i < count; ++i) {
      if (out[i].kind == Completion::kWorkRequest) ends.push_back(out[i].status);
      if (out[i].kind == Completion::kImmediate) immediates.push_back(out[i].immediate);
    }
  }
  WorkRequest write(size_t from, size_t to, size_t length, uint32_t immediate) const {
    return {.local = reinterpret_cast<void*>(memory.address() + from),
            .local_key = region.local,
            .remote = remote.base + to,
            .rkey = remote.rkey,
            .length = length,
            .flags = WorkRequest::kImmediate,
            .immediate = immediate};
  }

  GpuBytes memory;
  std::unique_ptr<Nic> nic;
  Registration region;
  std::unique_ptr<Link> link;
  RemoteMemory remote;
  std::vector<Status> ends;
  std::vector<uint32_t> immediates;
};

struct GpuPair {
  explicit GpuPair(const std::string& spec) : one(spec, 0), two(spec, 0) {
    for (GpuHalf* half : {&one, &two}) {
      GpuHalf& other = half == &one ? two : one;
      half->link->connect(other.link->address());
      half->remote = half->nic->import_memory(other.region.blob);
    }
    for (size_t i = 0; i < kBytes; ++i) data[i] = static_cast<unsigned char>(i * 31 >> 3);
    one.memory.fill(data);
  }
  template <class F>
  void until(F&& done) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!done()) {
      one.poll();
      two.poll();
      REQUIRE(std::chrono::steady_clock::now() < end);
    }
  }
  // Posts one, and waits for its end.
  Status post(const WorkRequest& wr) {
    const size_t before = one.ends.size();
    until([&] { return one.link->post({&wr, 1}) == 1; });
    until([&] { return one.ends.size() == before + 1; });
    return one.ends.back();
  }

  GpuHalf one, two;
  std::vector<unsigned char> data = std::vector<unsigned char>(kBytes);
};

}  // namespace

TEST_CASE("gpu memory: writes of many lengths over shm and tcp, each counted after its bytes") {
  if (!gpu_or_skip(0)) return;
  for (const std::string spec : {"shm", "tcp://127.0.0.1"}) {
    CAPTURE(spec);
    GpuPair pair(spec);
    uint32_t number = 0;
    for (const size_t length : {size_t{1}, size_t{64}, size_t{4097}, size_t{300'001}, kBytes - 7}) {
      CAPTURE(length);
      CHECK(pair.post(pair.one.write(3, 7, length, ++number)) == Status::kOk);
      pair.until([&] { return pair.two.immediates.size() == number; });
      CHECK(pair.two.immediates.back() == number);
      const auto got = pair.two.memory.read();
      CHECK(std::equal(got.begin() + 7, got.begin() + 7 + static_cast<ptrdiff_t>(length), pair.data.begin() + 3));
      CHECK(std::count(got.begin(), got.begin() + 7, 0) == 7);
    }
  }
}

TEST_CASE("gpu memory: a list of pages is one work request, and none of it may lie outside of the peer's region") {
  if (!gpu_or_skip(0)) return;
  GpuPair pair("shm");
  REQUIRE(pair.one.region.takes_lists);
  REQUIRE(pair.one.remote.takes_lists);
  // Pages of 1000 bytes in two stretches of 500, 1500 apart over there; some neighbours, some not.
  constexpr size_t kPage = 1000;
  const std::vector<uint32_t> from{5, 6, 7, 100, 3, 900, 901}, to{0, 1, 2, 9, 7, 300, 299};
  const std::array<PageList::Stretch, 2> stretches{{{0, 0, 500}, {500, 1000, 500}}};
  PageList list{.local_pages = from.data(),
                .remote_pages = to.data(),
                .stretches = stretches.data(),
                .local_stride = kPage,
                .remote_stride = 3 * kPage,
                .pages = static_cast<uint32_t>(from.size()),
                .stretch_count = 2};
  WorkRequest wr = pair.one.write(8, 16, from.size() * kPage, 77);
  wr.list = &list;
  std::vector<unsigned char> expected(kBytes, 0);
  for (size_t page = 0; page < from.size(); ++page) {
    for (const auto& s : stretches) {
      std::copy_n(pair.data.begin() + static_cast<ptrdiff_t>(8 + from[page] * kPage + s.local), s.length,
                  expected.begin() + static_cast<ptrdiff_t>(16 + to[page] * 3 * kPage + s.remote));
    }
  }
  CHECK(pair.post(wr) == Status::kOk);
  pair.until([&] { return pair.two.immediates.size() == 1; });
  CHECK(pair.two.immediates.back() == 77);
  CHECK(pair.two.memory.read() == expected);

  const auto with = [&](uint32_t last, uint64_t stride, PageList::Stretch stretch) {
    std::vector<uint32_t> bad = to;
    bad[3] = last;
    const std::array<PageList::Stretch, 2> wrong{{stretches[0], stretch}};
    PageList other = list;
    other.remote_pages = bad.data();
    other.remote_stride = stride;
    other.stretches = wrong.data();
    WorkRequest refused = wr;
    refused.list = &other;
    return pair.post(refused);
  };
  const uint64_t last_good = (kBytes - 16 - 1500) / (3 * kPage);
  CHECK(with(static_cast<uint32_t>(last_good), 3 * kPage, stretches[1]) == Status::kOk);
  const auto before = pair.two.memory.read();
  CHECK(with(static_cast<uint32_t>(last_good + 1), 3 * kPage, stretches[1]) == Status::kRemoteAccess);
  CHECK(with(0xffffffff, 3 * kPage, stretches[1]) == Status::kRemoteAccess);
  CHECK(with(0xffffffff, uint64_t{1} << 62, stretches[1]) == Status::kRemoteAccess);
  CHECK(with(2, 3 * kPage, {500, kBytes, 500}) == Status::kRemoteAccess);
  CHECK(with(2, 3 * kPage, {500, ~uint64_t{0} - 100, 500}) == Status::kRemoteAccess);
  CHECK(pair.two.memory.read() == before);
  CHECK(pair.two.immediates.size() == 2);
}

TEST_CASE("gpu memory: whoever is about to sleep is told of a copy that has ended since") {
  if (!gpu_or_skip(0)) return;
  for (const std::string spec : {"shm", "tcp://127.0.0.1"}) {
    CAPTURE(spec);
    GpuPair pair(spec);
    CHECK(pair.post(pair.one.write(0, 0, 64, 1)) == Status::kOk);
    const WorkRequest wr = pair.one.write(0, 0, 64, 2);
    REQUIRE(pair.one.link->post({&wr, 1}) == 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_FALSE(pair.one.nic->arm());
    pair.until([&] { return pair.two.immediates.size() == 2 && pair.one.ends.size() == 2; });
  }
}

TEST_CASE("gpu memory: a link that is closed has no copy under way") {
  if (!gpu_or_skip(0)) return;
  for (const std::string spec : {"shm", "tcp://127.0.0.1"}) {
    CAPTURE(spec);
    GpuPair pair(spec);
    std::vector<WorkRequest> many(200, pair.one.write(0, 0, 100'000, 5));
    size_t posted = 0;
    pair.until([&] { return (posted += pair.one.link->post(std::span(many).subspan(posted))) > 100; });
    pair.one.link->close();
    pair.until([&] { return pair.one.link->closed(); });
    CHECK(pair.one.ends.size() == posted);
    // The source is ours again, and the peer's memory stays what it is once its half has closed.
    pair.two.link->close();
    pair.until([&] { return pair.two.link->closed(); });
    pair.one.memory.fill(std::vector<unsigned char>(kBytes, 0xee));
    const auto there = pair.two.memory.read();
    CHECK(std::count(there.begin(), there.end(), 0xee) <= std::count(pair.data.begin(), pair.data.end(), 0xee));
    CHECK(pair.two.memory.read() == there);
  }
}
