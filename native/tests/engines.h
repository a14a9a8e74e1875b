// Two or more engines on a simulated fabric, connected without Python: for the native tests.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/clock.h"
#include "engine/engine.h"
#include "nic/simulated_nic.h"

namespace railwire::testing {

inline constexpr int64_t kSecond = 1'000'000'000;

// Of a simulated NIC's plain blob.
inline uint64_t rkey_of(const RemoteKeys& keys) { return parse_plain_blob(keys.blobs.at(0), "test").rkey; }
// The same region with keys that its owner has not given.
inline std::shared_ptr<RemoteKeys> forge(const RemoteKeys& keys) {
  auto blobs = keys.blobs;
  for (auto& blob : blobs) blob[8] ^= std::byte{1};  // of the rkey
  return std::make_shared<RemoteKeys>(keys.region_id, keys.length, std::move(blobs));
}

inline SplitLimits limits_of(const Peer& peer) { return peer.limits(); }

// An engine with `count` NICs on a fabric; closed by its destructor. Without a worker it stands still while no thread
// of the test waits for anything, as a process that has been stopped does.
class TestEngine {
 public:
  using Wrap = std::function<std::unique_ptr<Nic>(std::unique_ptr<Nic>)>;  // what a test puts around a NIC
  TestEngine(const std::string& fabric, const std::string& name, int count, int64_t liveness = kSecond,
             bool worker = true, const Wrap& wrap = nullptr)
      : name(name) {
    std::vector<std::unique_ptr<Nic>> nics;
    for (int i = 0; i < count; ++i) {
      nics.push_back(make_simulated_nic("sim://" + fabric + "/" + name + std::to_string(i)));
      if (wrap) nics.back() = wrap(std::move(nics.back()));
    }
    engine = std::make_shared<Engine>(
        EngineOptions{.liveness_ns = liveness, .events = &events, .handshakes = &handshakes}, std::move(nics));
    if (worker) engine->run();
  }
  ~TestEngine() { engine->close(0); }

  std::shared_ptr<Region> memory(std::vector<std::byte>& bytes) {
    return engine->register_memory({.address = bytes.data(), .length = bytes.size()}, 0);
  }
  std::shared_ptr<RemoteKeys> keys(const Region& region) {
    uint64_t id = 0;
    auto blobs = engine->region_keys(region, &id);
    return std::make_shared<RemoteKeys>(id, region.memory.length, std::move(blobs));
  }
  std::shared_ptr<Transfer> write(const std::shared_ptr<Peer>& peer, const std::shared_ptr<Region>& region,
                                  uint64_t from, const std::shared_ptr<RemoteKeys>& remote, uint64_t to,
                                  uint64_t length, int64_t imm) {
    auto transfer = std::make_shared<Transfer>(engine, Transfer::Kind::kWrite, imm);
    transfer->submitted_ns = engine->submission_time();
    transfer->add_lane<PieceSource>(peer, region, std::vector<Piece>{{from, engine->reach(peer, *remote), to, length}},
                                    false, imm, peer->limits());
    engine->submit(transfer);
    return transfer;
  }
  std::shared_ptr<Expectation> expect(uint32_t id, uint64_t arrivals, int64_t timeout = 10 * kSecond) {
    auto expectation =
        std::make_shared<Expectation>(engine, id, arrivals * kUnitsPerArrival, std::vector<uint64_t>{}, timeout);
    engine->submit(expectation);
    return expectation;
  }

  const std::string name;
  EventQueue events, handshakes;
  std::shared_ptr<Engine> engine;
};

// (a's peer b, b's peer a)
inline std::pair<std::shared_ptr<Peer>, std::shared_ptr<Peer>> join(TestEngine& a, TestEngine& b) {
  static std::atomic<uint64_t> connection{1};
  const uint64_t id = connection++;
  const auto plan = [](TestEngine& own, TestEngine& other) {
    const size_t n = own.engine->nics().size(), m = other.engine->nics().size();
    std::vector<LinkPlan> out;
    for (size_t k = 0; k < std::max(n, m); ++k) {
      out.push_back(
          {static_cast<uint32_t>(k % n), static_cast<uint32_t>(k % m), other.engine->nics()[k % m]->address()});
    }
    return out;
  };
  auto at_a = a.engine->create_peer(id, true, b.name, plan(a, b));
  auto at_b = b.engine->create_peer(id, false, a.name, plan(b, a));
  const auto halves_a = a.engine->link_halves(*at_a), halves_b = b.engine->link_halves(*at_b);
  b.engine->activate_peer(*at_b, halves_a, 0, 0);
  a.engine->activate_peer(*at_a, halves_b, 0, 0);
  return {at_a, at_b};
}

// A fabric that is gone at the end of the scope.
class TestFabric {
 public:
  explicit TestFabric(SimulatedSettings settings = {}) : name(unique()) {
    fabric = SimulatedFabric::create(name, settings);
  }
  ~TestFabric() { SimulatedFabric::remove(name); }
  const std::string name;
  std::shared_ptr<SimulatedFabric> fabric;

 private:
  static std::string unique() {
    static std::atomic<int> number{0};
    return "test" + std::to_string(number++);
  }
};

inline std::vector<std::byte> random_bytes(size_t size, std::mt19937_64& random) {
  std::vector<std::byte> out(size);
  for (auto& b : out) b = static_cast<std::byte>(random());
  return out;
}

}  // namespace railwire::testing
