// The verbs NIC against what mlx5 limits and refuses (stub_verbs.h): GPU memory, inline data, paths, forks.
#include <cstring>

#include "stub_verbs.h"
#include "verbs_ends.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

constexpr unsigned kRelaxed = IBV_ACCESS_RELAXED_ORDERING;

ibv_gid infiniband_gid(uint16_t flid, uint16_t subnet, uint8_t id) {
  ibv_gid gid{};
  gid.raw[0] = 0xfe;
  gid.raw[1] = 0x80;
  gid.raw[4] = static_cast<uint8_t>(flid >> 8);
  gid.raw[5] = static_cast<uint8_t>(flid);
  gid.raw[6] = static_cast<uint8_t>(subnet >> 8);
  gid.raw[7] = static_cast<uint8_t>(subnet);
  gid.raw[15] = id;
  return gid;
}

}  // namespace

TEST_CASE("mlx5: GPU memory goes by dma-buf, and by nvidia_peermem where that cannot be imported") {
  std::vector<std::byte> gpu(65536);
  const MemorySpec memory{.address = gpu.data(), .length = gpu.size(), .dmabuf_fd = 5, .device = 0};
  const auto registered = [&](StubVerbs& stub, const Options& options = {}) {
    stub.gpu = {gpu.data(), gpu.size()};
    const auto nic = make_verbs_nic("verbs:stub0", options);
    Registration registration = nic->register_memory(memory);
    nic->deregister(registration);
  };
  {
    StubVerbs stub;
    registered(stub);
    CHECK(stub.by_dmabuf);
    CHECK((stub.access & kRelaxed) != 0);  // without it a ConnectX gives half of its speed, they say
  }
  {
    StubVerbs stub;
    registered(stub, {{"relaxed_ordering", "off"}});
    CHECK(stub.by_dmabuf);
    CHECK((stub.access & kRelaxed) == 0);
  }
  {
    StubVerbs stub;
    stub.dmabuf = false;
    stub.peermem = true;
    registered(stub);
    CHECK(!stub.by_dmabuf);
    CHECK((stub.access & kRelaxed) != 0);
  }
  StubVerbs stub;
  stub.dmabuf = false;
  const std::string text = why([&] { registered(stub); });
  CHECK(has(text, "nvidia_peermem"));
  CHECK(has(text, "does not know dma-buf"));
  CHECK(has(text, "Bad address"));
}

TEST_CASE("mlx5: nothing is sent inline from GPU memory") {
  StubVerbs stub;
  End a("verbs:stub0"), b("verbs:stub0");
  join(a, b);
  stub.gpu = {a.memory.data(), 4096};
  Registration gpu = a.nic->register_memory({.address = a.memory.data(), .length = 4096, .dmabuf_fd = 5, .device = 0});
  WorkRequest wr = a.write(b, 0, 0, 8, 1);
  wr.local_key = gpu.local;
  REQUIRE(a.link->post({&wr, 1}) == 1);
  REQUIRE(until(a, b, [&] { return b.immediates.size() == 1; }));
  CHECK(stub.inlined_from_gpu == 0);
  a.nic->deregister(gpu);
}

TEST_CASE("mlx5: a queue pair that is too long with inline data is made without") {
  StubVerbs stub;
  End a("verbs:stub0", {{"link_depth", "16000"}, {"recv_depth", "64"}}), b("verbs:stub0");
  join(a, b);
  const WorkRequest wr = a.write(b, 0, 0, 8, 1);
  REQUIRE(a.link->post({&wr, 1}) == 1);
  REQUIRE(until(a, b, [&] { return b.immediates.size() == 1; }));
  CHECK(stub.inlined == 0);
  CHECK(a.nic->info().link_depth == 16000);
}

TEST_CASE("verbs: several queue pairs to a peer, each with its own count") {
  StubVerbs stub;
  End a("verbs:stub0", {{"qps", "3"}}), b("verbs:stub0");
  CHECK(a.nic->info().links_per_pair == 3);
  CHECK(b.nic->info().links_per_pair == 1);  // no hardware
  CHECK(has(why([] { make_verbs_nic("verbs:stub0", {{"qps", "17"}}); }), "1 to 16"));
}

TEST_CASE("InfiniBand: the global header goes along between subnets, and where a virtual function asks for it") {
  struct Case {
    uint8_t flags;
    uint16_t our_subnet, their_subnet, their_flid;
    bool global;
    uint16_t dlid;
  };
  const Case cases[] = {
      {0, 1, 1, 0, false, 7},   {IBV_QPF_GRH_REQUIRED, 1, 1, 0, true, 7},
      {0, 1, 2, 0, true, 7},    {0, 1, 2, 900, true, 900},
      {0, 1, 1, 900, false, 7},  // a forwardable LID says nothing of the subnet
  };
  for (const Case& one : cases) {
    CAPTURE(one.their_flid);
    CAPTURE(one.their_subnet);
    StubVerbs stub;
    stub.link_layer = IBV_LINK_LAYER_INFINIBAND;
    stub.port_flags = one.flags;
    stub.gids = {infiniband_gid(0, one.their_subnet, 1), infiniband_gid(one.their_flid, one.their_subnet, 1)};
    End b("verbs:stub0");
    stub.gids = {infiniband_gid(0, one.our_subnet, 2), infiniband_gid(0, one.our_subnet, 2)};
    End a("verbs:stub0");
    a.link->connect(b.link->address());
    CHECK(stub.path.is_global == one.global);
    CHECK(stub.path.dlid == one.dlid);
    a.nic->resolve(b.nic->address());
    CHECK(stub.path.is_global == one.global);
    CHECK(stub.path.dlid == one.dlid);
  }
}

TEST_CASE("verbs: registered memory is kept out of children where the kernel does not copy it for them") {
  static int calls = 0;
  static ibv_fork_status status = IBV_FORK_DISABLED;
  VerbsApi api;
  api.fork_init = [] { return ++calls; };
  protect_from_forks(api);  // an older libibverbs cannot say
  CHECK(calls == 1);
  api.is_fork_initialized = [] { return status; };
  protect_from_forks(api);
  CHECK(calls == 2);
  status = IBV_FORK_UNNEEDED;
  protect_from_forks(api);
  CHECK(calls == 2);
}
