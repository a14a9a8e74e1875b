// How links and peers end: broken connections, silence, death of the process, and the timers behind all waits.
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/process.h"

namespace railwire {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int64_t kLookEvery = 50 * kMillisecond;
constexpr int64_t kLookAtNumber = 1'000 * kMillisecond;  // at processes of which we have no descriptor
constexpr int64_t kPingAgain = 20 * kMillisecond;        // after the NIC had no room for one
constexpr int64_t kDeathGrace = 50 * kMillisecond;       // what a dead process had sent is still taken in
constexpr int64_t kSendErrorGrace = 300 * kMillisecond;  // of control messages, before they count as a broken link
constexpr int64_t kSuspended = 1'000 * kMillisecond;     // a gap between ticks: it was we who were stopped
constexpr int64_t kBreakGrace = 50 * kMillisecond;       // for the first WR of a broken link to say what broke it

}  // namespace

// Without it the peer is lost.
bool Engine::only_link(const PeerLink& link) {
  return std::none_of(link.peer->links.begin(), link.peer->links.end(),
                      [&](const auto& other) { return other.get() != &link && other->reachable; });
}

// The link's own half is closed at once: that takes back every WR and, where the NIC can, keeps the peer from writing.
void Engine::link_down(PeerLink& link, Failure failure, LinkEvent why, bool silent) {
  if (!link.up()) return;
  Peer& peer = *link.peer;
  const auto keep = peer.shared_from_this();
  const bool resumable = link.nic->info().resumable;
  peer.last_up = peer.sets[link.set].last_up = now_ns();  // perhaps no tick has seen it up
  const uint32_t actions = move_on(link, why);
  link.reachable = resumable && !silent;
  link.link->close();
  const bool alone = !link.reachable && only_link(link);
  if (alone) failure.reason = Reason::kPeerLost;
  link.failure = failure;
  const bool resume = !alone && can_resume(link);
  link.resuming = resume;
  carry_out(link, actions & kRetryLater);

  std::vector<std::shared_ptr<Operation>> alive;
  std::vector<Lane*> hit;
  std::vector<LaneLink*> unflushed;
  unflushed.swap(link.in_flush);
  unflushed.insert(unflushed.end(), link.want_flush.begin(), link.want_flush.end());
  link.want_flush.clear();
  std::unordered_set<const Lane*> unproven;
  for (const LaneLink* share : unflushed) unproven.insert(share->lane);
  for (Lane* lane : peer.lanes) {
    if (lane->set != link.set) continue;
    const LaneLink& share = lane->links[link.place];
    if ((share.outstanding > 0 && !resume) || unproven.contains(lane)) {
      hit.push_back(lane);
      alive.push_back(lane->transfer->shared_from_this());
    }
  }
  if (!resume) {
    // What waited for links that broke before has nowhere to go any more.
    for (const auto& other : peer.links) {
      if (other->set != link.set) continue;
      for (const Orphan& orphan : other->orphans) {
        if (!orphan.share) continue;
        hit.push_back(orphan.share->lane);
        alive.push_back(orphan.share->lane->transfer->shared_from_this());
      }
    }
  }
  for (Lane* lane : hit) stop_lane(*lane, failure);
  if (resume) {
    move_stash(link);
  } else {
    link.stash.clear();
  }
  // Unproven landings now hang on the peer's word that it has closed its half, too.
  for (LaneLink* share : unflushed) link.want_confirmation.push_back(share);

  if (alone) {
    peer_ended(peer, PeerState::kLost, failure);
    return;
  }
  carry_out(link, actions & ~(kCloseHalf | kTakeBack | kRetryLater));
  look_if_shut(link);
  orphans_due_ = true;
  // Links of a kind that is not made anew: what waits for them would wait for ever.
  if (!resumable && !another_is_up(link)) rails_down(peer, link.set);
}

// Nothing of the set is up, nor will be soon: what waits for it fails, and others go over another set.
void Engine::rails_down(Peer& peer, uint32_t set) {
  RailSet& rails = peer.sets[set];
  rails.usable.store(false);
  std::vector<std::shared_ptr<Operation>> alive;
  std::vector<Lane*> waiting;
  for (const auto* queue : {&rails.ready, &rails.ready_short}) {
    for (Lane* lane = queue->front(); lane; lane = lane->behind) waiting.push_back(lane);
  }
  for (Lane* lane : waiting) alive.push_back(lane->transfer->shared_from_this());
  const Failure why = peer.links[rails.first]->failure;
  for (Lane* lane : waiting) stop_lane(*lane, why);
}

void Engine::look_at_rails(Peer& peer, int64_t now) {
  for (uint32_t set = 0; set < peer.sets.size(); ++set) {
    RailSet& rails = peer.sets[set];
    const auto first = peer.links.begin() + rails.first;
    if (std::any_of(first, first + rails.count, [](const auto& link) { return link->up(); })) {
      rails.last_up = now;
    } else if (rails.any_ready() && now - rails.last_up > options_.liveness_ns) {
      rails_down(peer, set);
    }
  }
}

// Whoever finds a link broken only knows that. The WRs that come back know why: the first of them is the reason that
// all get to see, so they are waited for. Not for ever: not everything that ends a queue pair ends its WRs.
bool Engine::break_will_be_told(PeerLink& link) {
  if (!link.nic->info().resumable || link.link->outstanding() == 0) return false;
  const int64_t now = now_ns();
  if (!link.broken_since) {
    link.broken_since = now;
    look_at(*link.peer, now + kBreakGrace);
  }
  return now - link.broken_since < kBreakGrace;
}

// A port of ours that is down for a moment sends no datagrams. Where there is another pair, that one takes over at
// once; where there is none, only silence tells whether the peer is there.
bool Engine::messages_are_refused(const PeerLink& link, int64_t now) {
  if (!link.first_send_error || link.send_errors < 3 || now - link.first_send_error <= kSendErrorGrace) return false;
  return !link.nic->info().datagrams || !only_link(link);
}

// Nothing is heard any more between the two NICs, so no message can set things right there either.
void Engine::pair_silent(PeerLink& link, Failure failure) {
  if (link.up()) {
    link_down(link, std::move(failure), LinkEvent::kBroke, true);
    return;
  }
  link.reachable = false;
  if (!link.failure.message.empty()) failure.message += "; before that: " + link.failure.message;
  if (only_link(link)) {
    peer_ended(*link.peer, PeerState::kLost, std::move(failure));
  } else {
    move_stash(link);
  }
}

void Engine::peer_ended(Peer& peer, PeerState state, Failure failure) {
  if (peer.ended()) return;
  const auto keep = peer.shared_from_this();
  failure.peer = peer.id;
  if (state == PeerState::kLost) failure.reason = Reason::kPeerLost;
  peer.end_reason = failure;
  const bool was_connected = peer.state.load() != PeerState::kConnecting;
  peer.state.store(state);
  for (auto& link : peer.links) {
    if (link->up()) link->failure = failure;
    link->reachable = link->resuming = false;
    link->offer.clear();
    link_event(*link, LinkEvent::kPeerEnded);
  }
  std::vector<std::shared_ptr<Operation>> alive;
  for (Lane* lane : peer.lanes) alive.push_back(lane->transfer->shared_from_this());
  const auto lanes = peer.lanes;
  for (Lane* lane : lanes) stop_lane(*lane, failure);
  for (auto& link : peer.links) {
    std::vector<LaneLink*> waiting;
    waiting.swap(link->want_flush);
    waiting.insert(waiting.end(), link->in_flush.begin(), link->in_flush.end());
    waiting.insert(waiting.end(), link->want_confirmation.begin(), link->want_confirmation.end());
    link->in_flush.clear();
    link->want_confirmation.clear();
    link->stash.clear();
    link->orphans.clear();
    for (LaneLink* share : waiting) {
      const ShareFacts facts = facts_of(*share);
      share->lane->may_still_land |= may_still_land(facts) && state == PeerState::kLost;
      if (end_of_share(facts) == ShareEnd::kConfirm) {
        link->want_confirmation.push_back(share);  // until its process has ended, or it has said that it is gone
      } else {
        one_more_proven(*share);
      }
    }
  }
  settle_doubts(peer, now_ns());
  counters_.peer_lost(peer.id, failure.message, !was_connected);  // it never could write
  for (auto& record : peer.unacked) {
    if (record.operation) record.operation->finish(State::kFailed, failure);
  }
  for (auto& send : peer.held) send->finish(State::kFailed, failure);
  peer.held.clear();
  peer.unacked.clear();
  peer.answers_unacked = 0;
  peer.early.clear();
  peer.partial_message = {};
  tell_of_fence(peer);
  events().push({Event::kPeerLost, options_.event_tag, peer.id, {}});
  // Its side may be up already, and is not to wait for us.
  if (!was_connected && peer.exposed && !peer.in_setup) say_gone(peer, *peer.links.front());
  look_at(peer, 0);  // its links are released there
}

// Frees what an ended peer still holds, once no WR of it is in a NIC's hands.
void Engine::release_links(Peer& peer) {
  if (peer.in_setup || !peer.lanes.empty() || !peer.fence_told) return;
  for (const auto& link : peer.links) {
    if (link->state.in_setup || (link->link && !link->link->closed())) return;
  }
  peer.was_fenced |= links_fenced(peer);
  struct Rest {
    std::unique_ptr<Link> link;
    uint32_t nic;
    std::vector<std::byte> address;
    std::vector<std::shared_ptr<const ImportedMemory>> imported;
  };
  auto rests = std::make_shared<std::vector<Rest>>();
  for (const auto& link : peer.links) {
    if (!(move_on(*link, LinkEvent::kReleased) & kFreeHalf)) continue;
    rests->push_back(
        {std::move(link->link), link->ends.local_nic, std::move(link->control_address), std::move(link->imported_pad)});
  }
  setup_thread_.push([this, rests] {
    for (Rest& rest : *rests) {
      rest.link.reset();
      control_addresses_.let_go(rest.nic, rest.address);
    }
  });
  // Lost without a fence: only the end of its process will be one, so that is kept in sight.
  if (fenced_by_now(peer)) peer.forget_process();
  auto entry = by_connection_.find(peer.connection);
  if (entry != by_connection_.end()) {
    entry->second[peer.initiator] = nullptr;
    if (!entry->second[0] && !entry->second[1]) by_connection_.erase(entry);
  }
  by_id_.erase(peer.id);
  std::erase(due_, &peer);
  std::erase_if(peers_, [&](const auto& other) { return other.get() == &peer; });
}

// A driver that sleeps is woken by the death of a peer's process; one that never sleeps has to look.
void Engine::look_at_processes(int64_t now) {
  next_look_ = now + kLookEvery;
  epoll_event ended[16];
  for (int count; (count = epoll_wait(processes_, ended, std::size(ended), 0)) > 0;) {
    for (int i = 0; i < count; ++i) {
      const int fd = ended[i].data.fd;
      epoll_ctl(processes_, EPOLL_CTL_DEL, fd, nullptr);
      for (const auto& peer : peers_) {
        if (peer->pid_fd != fd) continue;
        peer->death_seen = now;
        look_at(*peer, now + kDeathGrace);
      }
    }
  }
}

// What a dead process had sent is taken in first.
bool Engine::process_has_died(Peer& peer, int64_t now) {
  if (peer.pid > 0 && peer.pid_fd < 0 && !peer.death_seen && now - peer.process_looked > kLookAtNumber) {
    peer.process_looked = now;
    if (process_start_ticks(peer.pid) != peer.pid_start_ticks) peer.death_seen = now;
  }
  if (!peer.death_seen || now - peer.death_seen <= kDeathGrace) return false;
  peer.process_dead = true;
  peer_ended(peer, PeerState::kLost,
             {Reason::kPeerLost, peer.id, "", "peer " + peer.name + " is lost: its process has ended"});
  return true;
}

// A peer that has ended, and may still be at our sources: its word is asked for, and its process looked at.
void Engine::tick_ended(Peer& peer, int64_t now) {
  const bool waiting = std::any_of(peer.links.begin(), peer.links.end(),
                                   [](const auto& link) { return !link->want_confirmation.empty(); });
  if (waiting && (peer.confirmed || process_over(peer))) {
    all_quiet(peer);
  } else if (waiting && now - peer.last_gone > options_.liveness_ns / kPingsPerLiveness) {
    peer.last_gone = now;
    for (const auto& link : peer.links) say_gone(peer, *link);
  }
  if (!peer.fence_told) tell_of_fence(peer);
  release_links(peer);
}

// A peer that is heard, and does nothing of what it is asked: without an end to that, what waits for it would wait for
// ever.
void Engine::stands_still(Peer& peer, int64_t now) {
  const int64_t limit = kStallFactor * options_.liveness_ns;
  if (peer.unacked.empty() || !peer.unacked.front().first_ns || now - peer.unacked.front().first_ns <= limit) return;
  peer_ended(peer, PeerState::kLost,
             {Reason::kPeerLost, peer.id, "", "peer " + peer.name + " is lost: it answers, but acknowledges nothing"});
}

void Engine::tick_peer(Peer& peer, int64_t now) {
  if (peer.state.load() == PeerState::kConnecting) return;
  if (peer.ended()) {
    tick_ended(peer, now);
    return;
  }
  if (process_has_died(peer, now)) return;
  const int64_t ping_every = options_.liveness_ns / kPingsPerLiveness;
  for (size_t i = 0; i < peer.links.size() && !peer.ended(); ++i) {
    PeerLink& link = *peer.links[i];
    look_at_link(link, now);
    if (peer.ended()) return;
    if (!link.reachable && !link.nic->info().resumable) continue;
    // Also over a pair that is silent: it may be heard again, and then gets a new link.
    if (now - link.last_ping >= ping_every) {
      if (send_simple(peer, link, FrameType::kPing, static_cast<uint64_t>(now))) {
        link.last_ping = now;
      } else {
        link.last_ping = std::max(link.last_ping, now - ping_every + kPingAgain);  // the NIC has no room
      }
    }
    if (!link.reachable) continue;
    char seconds[32];
    if (now - link.last_heard > options_.liveness_ns) {
      std::snprintf(seconds, sizeof seconds, "%.1f", static_cast<double>(now - link.last_heard) * 1e-9);
      pair_silent(link, {Reason::kLinkFailed, peer.id, link_name(link),
                         "peer " + peer.name + " has not been heard over " + link_name(link) + " for " + seconds +
                             " s (liveness= sets the limit)"});
      continue;
    }
    if (messages_are_refused(link, now)) {
      pair_silent(link, {Reason::kLinkFailed, peer.id, link_name(link),
                         "peer " + peer.name + " refuses messages over " + link_name(link) +
                             ": its process has probably ended"});
      continue;
    }
    if (!link.up()) continue;
    if (peer.connected() && link.nic->info().resumable && link.link->broken() && !break_will_be_told(link)) {
      link_down(link, {Reason::kLinkFailed, peer.id, link_name(link), "the connection broke while it was idle"});
      continue;
    }
    // WRs in the stash count too: a link that takes nothing any more stands still as well.
    if ((link.link->outstanding() == 0 && link.stash.empty()) || link.last_progress == 0) {
      link.last_progress = now;
    } else if (now - link.last_progress > kStallFactor * options_.liveness_ns) {
      link_down(link, {Reason::kLinkFailed, peer.id, link_name(link),
                       "work requests on " + link_name(link) + " made no progress although the peer is alive"});
    }
  }
  if (!peer.ended()) look_at_rails(peer, now);
  if (!peer.ended()) stands_still(peer, now);
  if (peer.ended()) return;
  if (std::any_of(peer.links.begin(), peer.links.end(), [](const auto& link) { return link->up(); })) {
    peer.last_up = now;
  } else if (now - peer.last_up > options_.liveness_ns && peer.connected()) {
    peer_ended(peer, PeerState::kLost,
               {Reason::kPeerLost, peer.id, "",
                "peer " + peer.name + " is lost: it answers, but no link to it could be made anew: " +
                    peer.links.front()->failure.message});
    return;
  }
  send_due_records(peer, now);
  settle_doubts(peer, now);
  check_incoming_revokes(peer);
  close_step(peer);
}

void Engine::tick(int64_t now) {
  if (last_tick_ && now - last_tick_ > std::max(kSuspended, options_.liveness_ns / 2)) {
    // This process was stopped, or its machine slept: silence meanwhile was ours, not the peers'.
    for (auto& peer : peers_) {
      peer->last_up += now - last_tick_;
      for (RailSet& rails : peer->sets) rails.last_up += now - last_tick_;
      for (auto& record : peer->unacked) record.first_ns += record.first_ns ? now - last_tick_ : 0;
      for (auto& link : peer->links) {
        link->last_heard = std::min(link->last_heard + now - last_tick_, now);  // it may have been heard since
        link->last_progress = 0;
        link->phase_since += now - last_tick_;
      }
      for (Lane* lane : peer->doubts) lane->doubt_until += now - last_tick_;
    }
  }
  last_tick_ = now;
  if (questions_due_) ask_questions();
  due_ticks_.clear();
  while (!ticks_.empty() && ticks_.front().first <= now) {
    std::pop_heap(ticks_.begin(), ticks_.end(), std::greater<>());
    due_ticks_.push_back(ticks_.back());
    ticks_.pop_back();
  }
  for (const auto& [when, id] : due_ticks_) {
    const auto known = by_id_.find(id);
    if (known == by_id_.end() || known->second->tick_at != when) continue;  // it was looked at earlier
    const auto peer = known->second->shared_from_this();
    peer->tick_at = kNever;
    ++totals_.peer_looks;
    tick_peer(*peer, now);
    if (by_id_.contains(id)) look_at(*peer, next_look_at(*peer, now));
  }
  const auto revokes = revokes_;
  for (const auto& revoke : revokes) finish_revoke(*revoke);
  int64_t next = now + options_.liveness_ns / kPingsPerLiveness;
  if (!revokes_.empty()) next = std::min(next, now + 5 * kMillisecond);
  if (!ticks_.empty()) next = std::min(next, ticks_.front().first);
  next = std::min(next, counters_.expire(now));
  next_tick_ = std::max(next, now + kMillisecond);
}

// A look at this peer alone is due then, or earlier.
void Engine::look_at(Peer& peer, int64_t when) {
  next_tick_ = std::min(next_tick_, when);
  if (peer.tick_at <= when) return;
  peer.tick_at = when;  // an entry for later is passed over when its time comes
  ticks_.emplace_back(when, peer.id);
  std::push_heap(ticks_.begin(), ticks_.end(), std::greater<>());
}

int64_t Engine::next_look_at(const Peer& peer, int64_t now) const {
  const int64_t ping_every = options_.liveness_ns / kPingsPerLiveness;
  const int64_t grid = std::max<int64_t>(1, ping_every / kPingShares);
  int64_t next = now + ping_every;
  const bool busy = !peer.unacked.empty() || peer.death_seen || !peer.closers.empty() || peer.ended() ||
                    peer.close_requested || !peer.incoming_revokes.empty() || peer.ack_due;
  if (busy) next = now + 10 * kMillisecond;
  if (peer.ended() && !peer.fence_told) next = now;  // soon
  if (peer.pid > 0 && peer.pid_fd < 0) next = std::min(next, now + kLookAtNumber);
  for (const auto& link : peer.links) {
    if (link->reachable || link->state.resumable) {
      // On a grid of few moments: many idle peers are asked in one turn, not each by waking for it.
      const int64_t ping = link->last_ping + ping_every;
      next = std::min(next, (ping / grid + 1) * grid);
    }
    if (!link->up() && link->reachable && peer.connected()) next = std::min(next, now + 10 * kMillisecond);
    if (link->state.phase == LinkPhase::kClosing) next = now;  // soon
    if (link->first_send_error) next = std::min(next, now + 50 * kMillisecond);
    if (link->up() && link->broken_since) next = std::min(next, now + 10 * kMillisecond);
  }
  return std::max(next, now + kMillisecond);
}

}  // namespace railwire
