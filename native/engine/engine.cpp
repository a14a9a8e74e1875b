// Set-up, tear-down and the calls that Python makes once per connection or region.
#include "engine/engine.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <sstream>
#include <utility>

#include "engine/clock.h"
#include "engine/fork.h"

namespace railwire {
namespace {

// Field 22 of /proc/PID/stat: tells a process from a later one with the same number. 0: no such process.
uint64_t start_ticks(int64_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return 0;
  const size_t after_name = line.rfind(')');
  if (after_name == std::string::npos) return 0;
  std::istringstream rest(line.substr(after_name + 2));
  std::string field;
  for (int i = 3; i <= 22 && rest >> field; ++i) {
    if (i == 22) return std::strtoull(field.c_str(), nullptr, 10);
  }
  return 0;
}

}  // namespace

uint64_t random_u64() {
  static thread_local std::random_device device;
  return uint64_t{device()} << 32 | device();
}

Region::~Region() {
  if (const auto engine = engine_.lock()) engine->retire_region(*this);
}

Engine::Engine(EngineOptions options, std::vector<std::unique_ptr<Nic>> nics)
    : options_(options), nics_(std::move(nics)), pads_(nics_.size()), nic_stats_(nics_.size()) {
  for (size_t i = 0; i < nics_.size(); ++i) {
    pad_registrations_.push_back(
        nics_[i]->register_memory({.address = pads_[i].data(), .length = pads_[i].size(), .key_hint = random_u64()}));
  }
  note_engine(*this);
}

Engine::~Engine() {
  forget_engine(*this);
  close(0);
}

std::shared_ptr<Region> Engine::register_memory(MemorySpec memory, uint64_t owner) {
  memory.key_hint = random_u64();
  const auto lock = lock_driver();
  if (closed()) throw NicError("the engine is closed");
  auto region = std::make_shared<Region>(weak_from_this(), memory, owner);
  region->id = memory.key_hint;
  {
    std::lock_guard guard(retired_mutex_);
    live_regions_.insert(region.get());
  }
  // On failure ~Region hands back what has been registered so far.
  for (auto& nic : nics_) region->registrations.push_back(nic->register_memory(memory));
  return region;
}

std::vector<Registration> Engine::region_keys(const Region& region, uint64_t* id) {
  const auto lock = lock_driver();
  *id = region.id;
  return region.registrations;
}

void Engine::retire_region(Region& region) {
  if (inherited_) return;
  {
    std::lock_guard lock(retired_mutex_);
    live_regions_.erase(&region);
    // Any thread may be here, also one that drives or closes the engine: nothing is waited for.
    if (!nics_gone_) {
      retired_.push_back({std::move(region.registrations), region.owner});
      any_retired_.store(true, std::memory_order_seq_cst);
    } else {
      events().push({Event::kRelease, options_.event_tag, region.owner, {}});
    }
  }
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
}

void Engine::release_retired() {
  std::vector<Retired> retired;
  {
    std::lock_guard lock(retired_mutex_);
    retired.swap(retired_);
    any_retired_.store(false, std::memory_order_relaxed);
  }
  for (auto& region : retired) {
    for (size_t i = 0; i < region.registrations.size(); ++i) nics_[i]->deregister(region.registrations[i]);
    events().push({Event::kRelease, options_.event_tag, region.owner, {}});
  }
}

std::shared_ptr<Peer> Engine::create_peer(uint64_t connection, bool initiator, std::string name,
                                          const std::vector<LinkPlan>& plan) {
  const auto lock = lock_driver();
  if (closed()) throw NicError("the engine is closed");
  if (plan.empty()) throw NicError("no NIC of ours can reach peer " + name);
  auto& ends = by_connection_[connection];
  if (ends[initiator]) throw NicError("connection is already known");
  auto peer = std::make_shared<Peer>();
  peer->id = next_peer_++;
  peer->connection = connection;
  peer->initiator = initiator;
  peer->name = std::move(name);
  peer->limits.links = static_cast<uint32_t>(plan.size());
  peer->limits.max_write_bytes = UINT64_MAX;
  try {
    for (const LinkPlan& wanted : plan) {
      if (wanted.local_nic >= nics_.size()) throw NicError("no such NIC: " + std::to_string(wanted.local_nic));
      auto link = std::make_unique<PeerLink>();
      link->wr_kind = WrContext::kFlush;
      link->peer = peer.get();
      link->index = static_cast<uint32_t>(peer->links.size());
      link->nic = nics_[wanted.local_nic].get();
      link->ends.local_nic = wanted.local_nic;
      link->ends.remote_nic = wanted.remote_nic;
      link->control = control_handle(wanted.local_nic, wanted.remote_control);
      link->link = link->nic->create_link();
      peer->limits.max_write_bytes = std::min(peer->limits.max_write_bytes, link->nic->info().max_write_bytes);
      peer->all_links_fence &= link->nic->info().closing_fences;
      peer->links.push_back(std::move(link));
    }
  } catch (...) {
    if (!ends[0] && !ends[1]) by_connection_.erase(connection);
    throw;
  }
  ends[initiator] = peer.get();
  peers_.push_back(peer);
  return peer;
}

std::vector<Engine::LinkHalf> Engine::link_halves(Peer& peer) {
  const auto lock = lock_driver();
  std::vector<LinkHalf> halves;
  for (const auto& link : peer.links) {
    if (!link->link) throw NicError("peer " + peer.name + " has ended");
    const auto& pad = pad_registrations_[link->ends.local_nic];
    halves.push_back({link->link->address(), pad.remote_base, pad.rkey});
  }
  return halves;
}

void Engine::activate_peer(Peer& peer, const std::vector<LinkHalf>& remote, int64_t pid, uint64_t pid_start_ticks) {
  const auto lock = lock_driver();
  if (peer.state.load() != PeerState::kConnecting) throw NicError("peer " + peer.name + " is not being connected");
  if (remote.size() != peer.links.size()) throw NicError("peer " + peer.name + " offers another number of links");
  for (size_t i = 0; i < remote.size(); ++i) {
    PeerLink& link = *peer.links[i];
    link.link->connect(remote[i].address);
    link.ends.pad_address = remote[i].pad_address;
    link.ends.pad_rkey = remote[i].pad_rkey;
  }
  const int64_t now = now_ns();
  for (auto& link : peer.links) {
    link->up = link->reachable = link->ever_up = true;
    link->last_heard = link->last_progress = link->up_since = now;
  }
  peer.last_up = now;
  peer.same_process = pid == getpid();
  if (pid > 0 && !peer.same_process && pid_start_ticks && start_ticks(pid) == pid_start_ticks) {
    peer.pid_fd = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
  }
  peer.state.store(PeerState::kConnected);
  next_tick_ = 0;
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
}

void Engine::abandon_peer(Peer& peer, const std::string& why) {
  const auto lock = lock_driver();
  if (peer.state.load() != PeerState::kConnecting) return;
  peer_ended(peer, PeerState::kClosed, {Reason::kClosed, peer.id, "", why});
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
}

Failure Engine::peer_failure(Peer& peer) {
  const auto lock = lock_driver();
  return peer.end_reason;
}

std::shared_ptr<Watcher> Engine::watch() {
  const auto lock = lock_driver();
  auto watcher = std::make_shared<Watcher>(next_request_++);
  watchers_.push_back(watcher);
  watcher_activity_ns_ = now_ns();
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
  return watcher;
}

void Engine::unwatch(Watcher& watcher) {
  const auto lock = lock_driver();
  std::erase_if(watchers_, [&](const auto& other) { return other.get() == &watcher; });
}

uint64_t Engine::counter_units(uint32_t id) {
  const auto lock = lock_driver();
  return counters_.units(id);
}

void Engine::reset_counter(uint32_t id) {
  const auto lock = lock_driver();
  counters_.reset(id);
}

void Engine::start_expectation(std::shared_ptr<Expectation> expectation) {
  if (closed()) {
    expectation->finish(State::kFailed, {Reason::kClosed, 0, "", "the engine was closed"});
    return;
  }
  for (const uint64_t id : expectation->peers) {
    const auto peer = std::find_if(peers_.begin(), peers_.end(), [=](const auto& p) { return p->id == id; });
    if (peer != peers_.end() && !(*peer)->ended()) continue;
    // What has landed before the peer went still counts.
    if (counters_.units(expectation->id) >= expectation->units) continue;
    const std::string why = peer != peers_.end() ? (*peer)->end_reason.message : "the peer is gone";
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
    std::lock_guard guard(retired_mutex_);
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

  const auto lock = lock_driver();
  take_commands();
  const auto peers = peers_;
  for (const auto& peer : peers) peer_ended(*peer, PeerState::kClosed, reason);
  let_in();  // what no peer is left for fails now
  // Closing the links has brought every WR back; hand the last ones to their transfers.
  const int64_t last = now_ns() + 1'000'000'000;
  while (!active_.empty() && now_ns() < last) poll_nics();
  counters_.fail_all(reason);
  const auto revokes = revokes_;
  for (const auto& revoke : revokes) revoke->finish(State::kFailed, reason);
  revokes_.clear();
  closed_.store(true, std::memory_order_release);
  take_commands();
  for (const auto& peer : peers) release_links(*peer);
  peers_.clear();
  by_connection_.clear();
  {
    // Regions that Python still holds lose their registrations; their destructors find nothing to give back.
    std::lock_guard guard(retired_mutex_);
    for (Region* region : live_regions_) {
      for (size_t i = 0; i < region->registrations.size(); ++i) nics_[i]->deregister(region->registrations[i]);
      region->registrations.clear();
    }
    nics_gone_ = true;
  }
  release_retired();  // what has come since
  for (size_t i = 0; i < nics_.size(); ++i) nics_[i]->deregister(pad_registrations_[i]);
  nics_.clear();
  inline_bell_.ring();  // a waiting thread may sleep as the driver: what it waits for has ended
}

}  // namespace railwire
