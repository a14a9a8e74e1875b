// Beginning and end of an engine, and the small calls that Python makes.
#include "engine/engine.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <utility>

#include "engine/clock.h"
#include "engine/fork.h"
#include "engine/watched_words.h"

namespace railwire {

uint64_t random_u64() {
  static thread_local std::random_device device;
  return uint64_t{device()} << 32 | device();
}

Engine::Engine(EngineOptions options, std::vector<std::unique_ptr<Nic>> nics)
    : options_(options),
      nics_(std::move(nics)),
      control_addresses_(nics_),
      pads_(nics_.size()),
      nic_stats_(nics_.size()) {
  for (size_t i = 0; i < nics_.size(); ++i) {
    pad_registrations_.push_back(
        nics_[i]->register_memory({.address = pads_[i].data(), .length = pads_[i].size(), .key_hint = random_u64()}));
  }
  processes_ = epoll_create1(EPOLL_CLOEXEC);
  note_engine(*this);
}

Engine::~Engine() {
  forget_engine(*this);
  close(0);
  if (processes_ >= 0) ::close(processes_);
}

Failure Engine::peer_failure(Peer& peer) {
  const auto lock = lock_driver();
  return peer.end_reason;
}

void Engine::peer_rails(Peer& peer, std::vector<std::tuple<std::string, bool, uint32_t, uint32_t>>& out) {
  const auto lock = lock_driver();
  for (const RailSet& rails : peer.sets) {
    const auto first = peer.links.begin() + rails.first;
    const auto up = std::count_if(first, first + rails.count, [](const auto& link) { return link->up(); });
    out.emplace_back(rails.kind, rails.usable.load(), rails.count, static_cast<uint32_t>(up));
  }
}

uint64_t Engine::counter_units(uint32_t id) {
  const auto lock = lock_driver();
  return counters_.units(id);
}

void Engine::reset_counter(uint32_t id) {
  const auto lock = lock_driver();
  counters_.reset(id);
}

bool Engine::follow(std::shared_ptr<ArrivalWords> words) {
  const auto lock = lock_driver();
  if (closed()) throw NicError("the engine is closed");
  return counters_.follow(std::move(words));
}

void Engine::unfollow(const ArrivalWords& words) {
  if (inherited_) return;
  const auto lock = lock_driver();
  counters_.unfollow(words);
}

std::optional<uint32_t> Engine::find_unused_ids(uint32_t first, uint32_t count) {
  const auto lock = lock_driver();
  return counters_.find_unused(first, count);
}

void Engine::start_expectation(std::shared_ptr<Expectation> expectation) {
  if (closed()) {
    expectation->finish(State::kFailed, {Reason::kClosed, 0, "", "the engine was closed"});
    return;
  }
  for (const uint64_t id : expectation->peers) {
    const auto known = by_id_.find(id);
    const Peer* peer = known == by_id_.end() ? nullptr : known->second;
    if (peer && !peer->ended()) continue;
    // What has landed before the peer went still counts.
    if (counters_.units(expectation->id) >= expectation->units) continue;
    const std::string why = peer ? peer->end_reason.message : "the peer is gone";
    expectation->finish(State::kFailed, {Reason::kPeerLost, id, "", why});
    return;
  }
  next_tick_ = std::min(next_tick_, expectation->deadline_ns);
  counters_.expect(std::move(expectation));
}

Engine::Stats Engine::stats() {
  const auto lock = lock_driver();
  Stats out = totals_;
  out.nics = nic_stats_;
  for (const auto& peer : peers_) out.peers.emplace_back(peer, peer->stats);
  out.active = active_.size();
  out.units = counters_.units_seen();
  out.pending_expectations = counters_.pending();
  {
    std::lock_guard guard(memory_mutex_);
    out.control_addresses = control_addresses_.size();
    out.regions = live_regions_.size();
  }
  const size_t samples = std::min<uint64_t>(post_samples_, post_latency_.size());
  out.post_latency_ns.assign(post_latency_.begin(), post_latency_.begin() + static_cast<ptrdiff_t>(samples));
  return out;
}

void Engine::close(int64_t timeout_ns) {
  if (inherited_) return;
  std::lock_guard closing(close_mutex_);
  if (closed()) return;
  closing_.store(true);
  const int64_t deadline = now_ns() + timeout_ns;
  const Failure reason{Reason::kClosed, 0, "", "the engine was closed"};
  if (timeout_ns > 0 && worker_.joinable()) {
    // Politely: everything stops, and the peers confirm that they have, too.
    std::vector<std::shared_ptr<Peer>> peers;
    std::vector<std::shared_ptr<Transfer>> transfers;
    {
      const auto lock = lock_driver();
      peers = peers_;
      transfers.assign(active_.begin(), active_.end());
      transfers.insert(transfers.end(), held_.begin(), held_.end());
      counters_.fail_all(reason);  // first: it is we who end, not the writers
    }
    for (const auto& transfer : transfers) transfer->cancel();
    std::vector<std::shared_ptr<CloseOperation>> closes;
    for (const auto& peer : peers) {
      if (peer->ended()) continue;
      closes.push_back(std::make_shared<CloseOperation>(weak_from_this(), peer, timeout_ns));
      submit(closes.back());
    }
    for (const auto& close : closes) wait_for(*close, std::max<int64_t>(deadline - now_ns(), 0));
    for (const auto& transfer : transfers) wait_for(*transfer, std::max<int64_t>(deadline - now_ns(), 0));
  }
  stop_worker_.store(true);
  worker_bell_.ring();
  if (worker_.joinable()) worker_.join();

  std::vector<std::unique_ptr<Link>> links;
  {
    const auto lock = lock_driver();
    take_commands();
    const auto peers = peers_;
    for (const auto& peer : peers) peer_ended(*peer, PeerState::kClosed, reason);
    let_in();  // what no peer is left for fails now
    // Closing the links brings every WR back; hand the last ones to their transfers.
    const int64_t last = now_ns() + 1'000'000'000;
    while (!active_.empty() && now_ns() < last) poll_nics();
    counters_.fail_all(reason);
    const auto revokes = revokes_;
    for (const auto& revoke : revokes) revoke->finish(State::kFailed, reason);
    revokes_.clear();
    // As in submit(): either we find what it has pushed, or it sees that we have closed.
    closed_.store(true, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    take_commands();
    for (const auto& peer : peers_) {
      for (const auto& link : peer->links) {
        if (link->link) links.push_back(std::move(link->link));
      }
    }
  }
  // Set-up calls that are under way end first, and no other begins; then what they have left to be done.
  std::unique_lock setup(setup_gate_);
  setup_thread_.finish();
  links.clear();  // waits for the provider to give everything back
  std::vector<std::shared_ptr<Watcher>> watchers;
  {
    const auto lock = lock_driver();
    end_stuck_transfers(reason);
    for (const auto& peer : peers_) {
      if (!peer->fence_told) tell_of_fence(*peer);  // with their links gone
    }
    watchers = watchers_;
    end_watchers();
    due_.clear();
    peers_.clear();
    by_id_.clear();
    by_connection_.clear();
  }
  {
    // Regions that Python still holds lose their registrations; their destructors find nothing to give back.
    std::lock_guard guard(memory_mutex_);
    for (Region* region : live_regions_) deregister_all(region->registrations);
    for (ImportedMemory* imported : live_imports_) nics_[imported->nic]->release_memory(imported->memory);
    live_imports_.clear();
    nics_gone_ = true;
  }
  for (const auto& watcher : watchers) events().words().remove(*watcher);
  deregister_all(pad_registrations_);
  control_addresses_.forget_all();
  nics_.clear();
  inline_bell_.ring();  // a waiting thread may sleep as the driver: what it waits for has ended
}

// Of which WRs had not come back when the engine was closed. Their links are gone: no provider has any of them.
void Engine::end_stuck_transfers(const Failure& reason) {
  while (!active_.empty()) {
    const std::shared_ptr<Transfer> transfer = *active_.begin();
    active_.erase(*transfer);
    for (Lane& lane : transfer->lanes) {
      if (lane.phase != Lane::Phase::kFinished) lane.peer->lanes.erase(lane);
      lane.phase = Lane::Phase::kFinished;
      lane.source.reset();
    }
    ++totals_.failed;
    transfer->finish(State::kFailed, reason, true);
  }
}

}  // namespace railwire
