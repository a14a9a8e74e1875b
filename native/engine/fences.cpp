// Fences: after them a peer can no longer write. region.revoke() fences one region from all peers, peer.close() fences
// everything from one peer. Both ask the writers first (a write to a withdrawn key would cost them the connection);
// a writer that does not answer in time is cut off, which is a fence on every NIC but shm.
#include <poll.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/process.h"

namespace railwire {
namespace {

constexpr int64_t kClosedGrace = 1'000'000'000;  // how long a CLOSED is repeated to a peer that does not acknowledge it

Failure not_fenced(const std::vector<std::shared_ptr<Peer>>& peers) {
  std::string names;
  for (const auto& peer : peers) names += (names.empty() ? "" : ", ") + peer->name;
  return {Reason::kNotFenced, peers.front()->id, "",
          "peer " + names +
              " is gone without having confirmed, and writes into our memory by itself (shm): do not reuse this memory "
              "before its process has ended"};
}

}  // namespace

void RevokeOperation::start(Engine& engine, std::shared_ptr<Operation>) { engine.start_revoke(*this); }
void CloseOperation::start(Engine& engine, std::shared_ptr<Operation>) { engine.start_close(*this); }

// Whether its links, closed on our side alone, keep it out. Not known any more once they have been freed.
bool Engine::links_fenced(const Peer& peer) {
  return !peer.in_setup && std::all_of(peer.links.begin(), peer.links.end(), [](const auto& link) {
    const bool closing_fences = link->nic->info().closing_fences;
    if (!link->link) return closing_fences;
    return !link->state.in_setup && (closing_fences ? link->link->shut() : link->link->fenced());
  });
}

// It has ended, and closing our halves will be a fence as soon as the NICs have let go of them.
bool Engine::fence_is_coming(const Peer& peer) {
  return std::all_of(peer.links.begin(), peer.links.end(), [](const auto& link) {
    return link->link && (link->nic->info().closing_fences || link->link->fenced());
  });
}

// Whoever waits for a fence of this peer, which has ended: there is one, or there will be none.
void Engine::tell_of_fence(Peer& peer) {
  const auto keep = peer.shared_from_this();
  const bool fenced = fenced_by_now(peer);
  if (!fenced && fence_is_coming(peer)) {
    look_at(peer, 0);
    return;
  }
  peer.fence_told = true;
  drop_fenced(unfenced_);  // each holds the descriptor of a process
  if (!fenced) unfenced_.push_back(keep);
  revoke_peer_gone(peer, fenced);
  for (auto& closer : std::exchange(peer.closers, {})) {
    if (fenced) {
      closer->finish_done();
    } else {
      closer->finish(State::kFailed,
                     {Reason::kNotFenced, peer.id, "",
                      "peer " + peer.name +
                          " did not confirm and writes into our memory by itself (shm): do not reuse its pages before "
                          "its process has ended"});
    }
  }
}

// Of a peer that has ended: whether nothing of it can land here any more. Its CLOSE says so: it is sent when nothing of
// the sender's is under way.
bool Engine::fenced_by_now(Peer& peer) {
  return peer.confirmed || peer.close_requested || !peer.exposed || process_over(peer) || peer.was_fenced ||
         links_fenced(peer);
}

// By its descriptor; or, where there was none to be had, by its number.
bool Engine::process_over(Peer& peer) {
  if (peer.process_dead) return true;
  if (peer.pid_fd >= 0) {
    pollfd fd{peer.pid_fd, POLLIN, 0};
    peer.process_dead = ::poll(&fd, 1, 0) > 0;
  } else if (peer.pid > 0) {
    peer.process_dead = process_start_ticks(peer.pid) != peer.pid_start_ticks;
  }
  return peer.process_dead;
}

void Engine::drop_fenced(std::vector<std::shared_ptr<Peer>>& peers) {
  std::erase_if(peers, [](const auto& peer) { return fenced_by_now(*peer); });
}

// ---- the writer's side: confirm once nothing of ours can land any more
// -----------------------------------------------
void Engine::check_incoming_revokes(Peer& peer) {
  std::vector<uint64_t> confirmed;
  std::erase_if(peer.incoming_revokes, [&](const Peer::IncomingRevoke& revoke) {
    const bool writing = std::any_of(peer.lanes.begin(), peer.lanes.end(), [&](const Lane* lane) {
      return lane->source && lane->source->touches(revoke.region);
    });
    if (!writing) confirmed.push_back(revoke.request);
    return !writing;
  });
  for (const uint64_t request : confirmed) {
    std::byte body[sizeof request];
    std::memcpy(body, &request, sizeof request);
    send_record(peer, RecordType::kRevoked, body);
  }
}

// ---- the owner's side
// --------------------------------------------------------------------------------------------------
void Engine::start_revoke(RevokeOperation& revoke) {
  if (closed()) {  // nothing lands any more, and nothing is registered anew
    if (revoke.reregister) {
      revoke.finish(State::kFailed, {Reason::kClosed, 0, "", "the engine was closed"});
    } else {
      revoke.finish_done();
    }
    return;
  }
  Region& region = *revoke.region;
  drop_fenced(region.unfenced);
  drop_fenced(unfenced_);
  if (!region.unfenced.empty()) {
    revoke.finish(State::kFailed, not_fenced(region.unfenced));
    return;
  }
  const bool under_way =
      std::any_of(revokes_.begin(), revokes_.end(), [&](const auto& other) { return other->region == revoke.region; });
  if (region.closed.load() && !under_way) {
    revoke.finish_done();
    return;
  }
  revoke.unfenced = unfenced_;
  revoke.request = next_request_++;
  revoke.deadline_ns = now_ns() + revoke.timeout_ns;
  if (!revoke.reregister) revoke.region->closed.store(true);
  std::byte body[16];
  std::memcpy(body, &revoke.region->id, 8);
  std::memcpy(body + 8, &revoke.request, 8);
  const auto peers = peers_;
  for (const auto& peer : peers) {
    // Also one that is being connected: its side may be up before ours. What we say waits for that.
    if (peer->ended() ? peer->fence_told : peer->state.load() == PeerState::kConnecting && !peer->exposed) continue;
    revoke.waiting_for.insert(peer->id);
    send_record(*peer, RecordType::kRevoke, body);
  }
  revokes_.push_back(std::static_pointer_cast<RevokeOperation>(revoke.shared_from_this()));
  next_tick_ = 0;
  finish_revoke(revoke);
}

void Engine::revoke_confirmed(Peer& peer, uint64_t request) {
  const auto revokes = revokes_;
  for (const auto& revoke : revokes) {
    if (revoke->request == request && revoke->waiting_for.erase(peer.id)) finish_revoke(*revoke);
  }
}

void Engine::revoke_peer_gone(Peer& peer, bool fenced) {
  for (const auto& revoke : revokes_) {
    if (revoke->waiting_for.erase(peer.id) && !fenced) revoke->unfenced.push_back(peer.shared_from_this());
  }
  next_tick_ = 0;
}

void Engine::finish_revoke(RevokeOperation& revoke) {
  if (revoke.done()) return;
  if (!revoke.waiting_for.empty() && now_ns() > revoke.deadline_ns) {
    const auto late = revoke.waiting_for;
    const auto peers = peers_;
    for (const auto& peer : peers) {
      if (late.contains(peer->id)) {
        peer_ended(
            *peer, PeerState::kLost,
            {Reason::kPeerLost, peer->id, "", "peer " + peer->name + " did not confirm a revoked region in time"});
      }
    }
  }
  if (!revoke.waiting_for.empty()) return;
  if (revoke.step == RevokeOperation::Step::kAsking) register_anew(revoke);
  if (revoke.step == RevokeOperation::Step::kReady) replace_registrations(revoke);
}

// No peer writes under the old keys any more. The new ones are made before the old ones go: our own transfers may use
// the region all the while.
void Engine::register_anew(RevokeOperation& revoke) {
  revoke.step = RevokeOperation::Step::kReady;
  if (!revoke.reregister || !revoke.unfenced.empty()) return;
  revoke.step = RevokeOperation::Step::kNics;
  const auto keep = std::static_pointer_cast<RevokeOperation>(revoke.shared_from_this());
  setup_thread_.push([this, keep] {
    MemorySpec spec = keep->region->memory;
    // The id doubles as the key hint, so a new one also means new keys; whoever knows the old one must not guess them.
    spec.key_hint = random_u64();
    std::vector<Registration> fresh;
    std::string problem;
    try {
      register_all(spec, fresh);
    } catch (const NicError& error) {
      problem = error.what();
      deregister_all(fresh);
    }
    const auto lock = lock_driver();
    if (keep->done()) {  // the engine is being closed
      deregister_all(fresh);
      return;
    }
    keep->fresh = std::move(fresh);
    keep->fresh_id = spec.key_hint;
    keep->problem = std::move(problem);
    keep->step = RevokeOperation::Step::kReady;
    finish_revoke(*keep);
    if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
  });
}

// Not while a transfer of ours is under way: its work requests name the old ones.
void Engine::replace_registrations(RevokeOperation& revoke) {
  Region& region = *revoke.region;
  if (region.users.load(std::memory_order_acquire) > 0) {
    // Not for ever: a stopped peer may be at our sources, and nobody knows when it goes on.
    if (now_ns() <= revoke.deadline_ns) return;
    std::vector<std::shared_ptr<Peer>> busy;
    for (const auto& peer : peers_) {
      if (peer->ended() && std::any_of(peer->links.begin(), peer->links.end(),
                                       [](const auto& link) { return !link->want_confirmation.empty(); })) {
        busy.push_back(peer);
      }
    }
    if (busy.empty()) return;
    region.closed.store(true);
    const auto keep = std::static_pointer_cast<RevokeOperation>(revoke.shared_from_this());
    std::erase(revokes_, keep);
    auto unused = std::make_shared<std::vector<Registration>>(std::move(revoke.fresh));
    setup_thread_.push([this, unused] { deregister_all(*unused); });
    revoke.finish(State::kFailed, not_fenced(busy));
    return;
  }
  revoke.step = RevokeOperation::Step::kNics;
  const auto keep = std::static_pointer_cast<RevokeOperation>(revoke.shared_from_this());
  const bool renewed = !revoke.fresh.empty();
  if (!renewed) region.closed.store(true);
  region.id = renewed ? revoke.fresh_id : random_u64();
  auto old = std::make_shared<std::vector<Registration>>(std::move(region.registrations));
  region.registrations = std::move(revoke.fresh);
  region.registrations.resize(nics_.size());
  setup_thread_.push([this, keep, old] {
    deregister_all(*old);
    const auto lock = lock_driver();
    revoke_done(*keep);
    if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
  });
}

void Engine::revoke_done(RevokeOperation& revoke) {
  if (revoke.done()) return;
  const auto keep = std::static_pointer_cast<RevokeOperation>(revoke.shared_from_this());
  std::erase(revokes_, keep);
  if (!revoke.unfenced.empty()) {
    revoke.region->unfenced = revoke.unfenced;
    revoke.finish(State::kFailed, not_fenced(revoke.unfenced));
  } else if (!revoke.problem.empty()) {
    revoke.finish(State::kFailed, {Reason::kLocal, 0, "", "cannot register the region again: " + revoke.problem});
  } else {
    revoke.finish_done();
  }
}

// ---- closing a peer
// ----------------------------------------------------------------------------------------------------
void Engine::start_close(CloseOperation& close) {
  Peer& peer = *close.peer;
  if (peer.ended()) {
    if (fenced_by_now(peer)) {
      close.finish_done();
    } else if (!peer.fence_told) {
      peer.closers.push_back(std::static_pointer_cast<CloseOperation>(close.shared_from_this()));
    } else {
      close.finish(State::kFailed, {Reason::kNotFenced, peer.id, "",
                                    "peer " + peer.name + " was lost without a fence; its process must end first"});
    }
    return;
  }
  close.deadline_ns = now_ns() + close.timeout_ns;
  peer.closers.push_back(std::static_pointer_cast<CloseOperation>(close.shared_from_this()));
  look_at(peer, 0);
  if (peer.state.load() == PeerState::kConnecting) {
    peer_ended(peer, PeerState::kClosed, {Reason::kClosed, peer.id, "", "closed before it was connected"});
    return;
  }
  peer.state.store(PeerState::kClosing);
  std::vector<std::shared_ptr<Operation>> alive;
  const auto lanes = peer.lanes;
  for (Lane* lane : lanes) alive.push_back(lane->transfer->shared_from_this());
  for (Lane* lane : lanes) {
    stop_lane(*lane, {Reason::kClosed, peer.id, "", "peer " + peer.name + " was closed while the transfer ran"});
  }
  close_step(peer);
}

void Engine::close_step(Peer& peer) {
  if (peer.ended()) return;
  const int64_t now = now_ns();
  if (!peer.closers.empty() && !peer.close_sent && peer.lanes.empty()) {
    peer.close_sent = true;
    send_record(peer, RecordType::kClose, {});
  }
  if (peer.close_requested && !peer.closed_sent_ns) {
    peer.state.store(PeerState::kClosing);
    std::vector<std::shared_ptr<Operation>> alive;
    const auto lanes = peer.lanes;
    for (Lane* lane : lanes) alive.push_back(lane->transfer->shared_from_this());
    for (Lane* lane : lanes) {
      stop_lane(*lane, {Reason::kPeerLost, peer.id, "", "peer " + peer.name + " has closed the connection"});
    }
    if (peer.lanes.empty()) {
      peer.closed_sent_ns = now;
      for (auto& link : peer.links) {
        link_event(*link, LinkEvent::kLeave);
      }
      send_record(peer, RecordType::kClosed, {});
    }
  }
  if (peer.closed_sent_ns && (peer.unacked.empty() || now - peer.closed_sent_ns > kClosedGrace)) {
    peer_ended(peer, peer.close_sent ? PeerState::kClosed : PeerState::kLost,
               {Reason::kPeerLost, peer.id, "", "peer " + peer.name + " has closed the connection"});
    return;
  }
  const bool late = std::any_of(peer.closers.begin(), peer.closers.end(),
                                [now](const auto& closer) { return now > closer->deadline_ns; });
  if (late) {
    peer_ended(peer, PeerState::kLost,
               {Reason::kPeerLost, peer.id, "", "peer " + peer.name + " did not confirm our close() in time"});
  }
}

}  // namespace railwire
