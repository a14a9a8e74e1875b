// The states of links (link_state.h) carried out: closing a half, telling the peer, and making a broken link anew.
//
// Settled, the initiator of the connection makes a new half and offers it; the acceptor connects a half of its own and
// answers; the initiator connects, and says so: neither writes before the other's queue pair can take it. Halves are
// made, connected and freed by the set-up thread: a NIC may take its time for each.
#include <algorithm>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr int64_t kFirstRebuild = 10'000'000;  // ns after a link broke; doubles with every try up to
constexpr int64_t kLongestRebuild = 1'000'000'000;
constexpr size_t kLongestAddress = 128;

}  // namespace

uint32_t Engine::move_on(PeerLink& link, LinkEvent event) {
  const LinkStep next = step(link.state, event);
  if (next.state.phase != link.state.phase) link.phase_since = now_ns();
  link.state = next.state;
  return next.actions;
}

// kTakeBack, kUseHalf, kDropHalf and kFreeHalf are for whoever raised the event: link_down(), half_made() and
// release_links() hold what these are about.
void Engine::carry_out(PeerLink& link, uint32_t actions) {
  Peer& peer = *link.peer;
  if ((actions & kCloseHalf) && link.link && !peer.in_setup) link.link->close();
  if (actions & kRetryLater) rebuild_later(link);
  if (actions & kConfirmed) confirmed(link);
  if (actions & kSayDown) send_link_record(peer, link, RecordType::kLinkDown);
  if (actions & kSayClosed) send_link_record(peer, link, RecordType::kLinkClosed);
  if (actions & kMakeHalf) make_half(link);
  if (actions & kSayOffer) send_link_record(peer, link, RecordType::kLinkOffer, link.own_address);
  if (actions & kSayAnswer) send_link_record(peer, link, RecordType::kLinkAnswer, link.own_address);
  if (actions & kSayRefused) send_link_record(peer, link, RecordType::kLinkAnswer);
  if (actions & kJoin) join_half(link);
  if (actions & kSayReady) send_link_record(peer, link, RecordType::kLinkReady);
  if (actions & kServe) link_up(link);
  if (actions & kLosePeer) link_is_late(link);
  if (actions & kCloseHalf) look_if_shut(link);
}

void Engine::look_if_shut(PeerLink& link) {
  const LinkPhase phase = link.state.phase;
  if (link.state.shut || (phase != LinkPhase::kClosing && phase != LinkPhase::kLeaving)) return;
  if (link.link->shut()) {
    link_event(link, LinkEvent::kShut);
  } else {
    look_at(*link.peer, 0);
  }
}

void Engine::look_at_link(PeerLink& link, int64_t now) {
  const LinkState& state = link.state;
  look_if_shut(link);
  if (state.phase == LinkPhase::kDown) {
    resolve_orphans(link);
    if (link.link->closed() && !link.resuming && link.want_confirmation.empty()) link_event(link, LinkEvent::kDrained);
  }
  if (state.phase == LinkPhase::kSettled && link.peer->connected() && link.reachable && now >= link.rebuild_after &&
      (state.initiator || !link.offer.empty())) {
    link_event(link, LinkEvent::kTurn);
  }
  const int limit = deadline(state.phase);
  if (limit && now - link.phase_since > limit * options_.liveness_ns) link_event(link, LinkEvent::kLate);
}

// A peer that is heard, and does not do its part: without an end to that, what waits for it would wait for ever.
void Engine::link_is_late(PeerLink& link) {
  Peer& peer = *link.peer;
  const std::string what =
      link.state.phase == LinkPhase::kClosing ? "our half of " + link_name(link) + " does not close"
      : link.state.remote_closed ? "work requests of " + link_name(link) + " do not come back, which is closed"
                                 : "it does not confirm the end of " + link_name(link);
  peer_ended(peer, PeerState::kLost,
             {Reason::kPeerLost, peer.id, "", "peer " + peer.name + " is lost: it answers, but " + what});
}

// The peer's word that its half is closed has come.
void Engine::confirmed(PeerLink& link) {
  std::vector<LaneLink*> waiting;
  waiting.swap(link.want_confirmation);
  for (LaneLink* share : waiting) one_more_proven(*share);
  orphans_due_ = true;
  look_at(*link.peer, 0);
}

// ---- what the two sides say of their halves
// --------------------------------------------------------------------------
void Engine::send_link_record(Peer& peer, const PeerLink& link, RecordType type, std::span<const std::byte> address) {
  const auto index = static_cast<uint16_t>(link.index);
  const bool closed = type == RecordType::kLinkDown || type == RecordType::kLinkClosed;
  const uint64_t landed = closed && link.link ? link.link->immediates_landed() : 0;
  std::vector<std::byte> body;
  const auto put = [&body](const auto& value) {
    const auto* p = reinterpret_cast<const std::byte*>(&value);
    body.insert(body.end(), p, p + sizeof value);
  };
  put(index);
  put(link.generation);
  if (closed) put(landed);
  body.insert(body.end(), address.begin(), address.end());
  send_record(peer, type, body);
}

void Engine::link_record_arrived(Peer& peer, RecordType type, std::span<const std::byte> body) {
  FrameReader reader(body);
  const auto index = reader.get<uint16_t>();
  const auto generation = reader.get<uint32_t>();
  if (!reader.ok() || index >= peer.links.size()) {
    ++totals_.bad_frames;
    return;
  }
  PeerLink& link = *peer.links[index];
  if (type == RecordType::kLinkDown || type == RecordType::kLinkClosed) {
    const auto landed = reader.get<uint64_t>();
    if (!reader.ok()) {
      ++totals_.bad_frames;
      return;
    }
    if (generation != link.generation) return;  // of a half that is no more
    if (!link.state.remote_closed) link.remote_landed = landed;
    const LinkEvent event = type == RecordType::kLinkDown ? LinkEvent::kPeerDown : LinkEvent::kPeerClosed;
    if (link.up()) {
      link_down(link,
                {Reason::kLinkFailed, peer.id, link_name(link), "peer " + peer.name + " reports that the link broke"},
                event);
    } else {
      link_event(link, event);
    }
    return;
  }
  const auto address = reader.rest();
  if (!link.state.resumable || link.up() || address.size() > kLongestAddress) return;
  switch (type) {
    case RecordType::kLinkOffer:
      if (peer.initiator || address.empty() || generation <= link.generation) break;
      link.offer.assign(address.begin(), address.end());
      link.offered = generation;
      link_event(link, LinkEvent::kOffer);
      look_at(peer, 0);
      break;
    case RecordType::kLinkAnswer:
      if (generation != link.generation) break;
      if (address.empty() && link.state.phase == LinkPhase::kOffered) {
        link.failure.message = "peer " + peer.name + " cannot make its half now";
      }
      link.answer.assign(address.begin(), address.end());
      link_event(link, address.empty() ? LinkEvent::kRefused : LinkEvent::kAnswer);
      break;
    case RecordType::kLinkReady:
      if (generation == link.generation) link_event(link, LinkEvent::kReady);
      break;
    default:
      break;
  }
}

// ---- making it anew
// --------------------------------------------------------------------------------------------------
void Engine::link_up(PeerLink& link) {
  link.reachable = true;
  link.failure = {};
  link.broken_since = 0;
  link.up_since = link.last_progress = link.last_heard = now_ns();
  link.first_send_error = 0;
  link.send_errors = 0;
  link.peer->sets[link.set].usable.store(true);
  ++link.peer->stats.links_rebuilt;
  note_due(*link.peer);
  for (const auto& other : link.peer->links) {
    if (!other->up() && other->set == link.set) move_stash(*other);
  }
}

// A message has come over a pair of NICs that was given up.
void Engine::heard_again(PeerLink& link) {
  if (link.reachable || !link.state.resumable) return;
  link.reachable = true;
  look_at(*link.peer, 0);
}

void Engine::rebuild_later(PeerLink& link) {
  const int64_t now = now_ns();
  const bool worked = link.link && link.link->worked();
  if (link.state.ever_up && (worked || now - link.up_since > options_.liveness_ns)) link.rebuild_tries = 0;
  link.rebuild_after = now + std::min(kFirstRebuild << std::min(link.rebuild_tries++, 10u), kLongestRebuild);
}

void Engine::make_half(PeerLink& link) {
  if (!link.state.initiator) link.generation = link.offered;
  setup_thread_.push([this, &link, keep = link.peer->shared_from_this(), offer = std::exchange(link.offer, {})] {
    std::unique_ptr<Link> made;
    std::vector<std::byte> address;
    std::string problem;
    try {
      made = link.nic->create_link();
      if (!offer.empty()) made->connect(offer);
      address = made->address();
    } catch (const NicError& error) {
      problem = error.what();
      made.reset();
    }
    {
      const auto lock = lock_driver();
      half_made(link, made, std::move(address), std::move(problem));
      wake();
    }
    // What is left over, the old half or the new one, goes here, without the lock.
  });
}

void Engine::half_made(PeerLink& link, std::unique_ptr<Link>& made, std::vector<std::byte> address,
                       std::string problem) {
  if (!made) link.failure.message = std::move(problem);
  const uint32_t actions = move_on(link, made ? LinkEvent::kMade : LinkEvent::kNotMade);
  if (actions & kUseHalf) {
    std::swap(link.link, made);
    link.own_address = std::move(address);
    if (link.state.initiator) ++link.generation;
    link.remote_landed = 0;
    link.resuming = link.flushing = false;
  }
  carry_out(link, actions);
  if (!link.offer.empty()) link_event(link, LinkEvent::kOffer);  // newer than the one that this answers
  look_at(*link.peer, 0);
}

void Engine::join_half(PeerLink& link) {
  setup_thread_.push([this, &link, keep = link.peer->shared_from_this(), half = link.link.get(),
                      answer = std::exchange(link.answer, {})] {
    std::string problem;
    bool joined = true;
    try {
      half->connect(answer);
    } catch (const NicError& error) {
      problem = error.what();
      joined = false;
    }
    const auto lock = lock_driver();
    if (!joined && !link.peer->ended()) link.failure.message = std::move(problem);
    link_event(link, joined ? LinkEvent::kJoined : LinkEvent::kNotJoined);
    look_at(*link.peer, 0);
    wake();
  });
}

}  // namespace railwire
