// What becomes of a link that breaks although its peer is alive, on NICs that are `resumable` (nic.h).
//
//   up --breaks--> down --both halves closed--> settled --offer, answer, ready--> up (the next generation)
//
// Down, each side has closed its half and told the other how many immediates had landed through it. As a link lands
// its WRs in the order of posting, that count tells the sender which of those that came back unfinished (orphans) had
// landed all the same: they are done. The others are posted again over the links that are up. Nothing is lost, and
// nothing is counted twice: an immediate is counted either by the closed half, before it gave its count, or by another
// link. A plain write before the last landed immediate has landed, too; one behind it may have, and writing the same
// bytes again does no harm while its transfer is not done. Reads are always made again.
//
// Without another link that is up, what is to be sent again waits for this one to be made anew, in its old order, or
// for the first other that comes up. Transfers fail with the peer: when no message passes any more, when no link could
// be made for a liveness time, or when links break again and again as soon as they are made.
//
// Settled, the initiator of the connection makes a new half and offers it; the acceptor connects a half of its own and
// answers; the initiator connects, and says so: neither writes before the other's queue pair can take it.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr int64_t kFirstRebuild = 10'000'000;  // ns after a link broke; doubles with every try up to
constexpr int64_t kLongestRebuild = 1'000'000'000;
constexpr uint32_t kMostRebuilds = 8;  // in a row of a link that carries nothing, before transfers fail with it
constexpr size_t kLongestAddress = 128;

}  // namespace

bool Engine::another_is_up(const PeerLink& link) {
  return std::any_of(link.peer->links.begin(), link.peer->links.end(),
                     [&](const auto& other) { return other.get() != &link && other->up && other->set == link.set; });
}

// What the link had not landed has somewhere to go, now or soon. `link` is no longer up, or about to be down.
bool Engine::can_resume(const PeerLink& link) {
  if (!link.nic->info().resumable || !link.peer->connected()) return false;
  return std::any_of(link.peer->links.begin(), link.peer->links.end(), [&](const auto& other) {
    if (other->set != link.set) return false;  // keys of one kind of NIC say nothing to another
    if (other.get() != &link && other->up) return true;
    return other->reachable && other->nic->info().resumable && other->rebuild_tries < kMostRebuilds;
  });
}

// A WR that was refused, or is wrong in itself, would be so again.
bool Engine::resendable(Status status) { return status != Status::kRemoteAccess && status != Status::kLocal; }

void Engine::keep_orphan(PeerLink& link, LaneLink& share, const WorkRequest& request) {
  const bool wanted = !share.lane->stopping;
  link.orphans.push_back({request, wanted ? &share : nullptr});
  if (!wanted) {
    --share.outstanding;
    --share.lane->outstanding;
  }
}

// The lane is stopping: whether they landed does not matter any more, but their places in the order do.
void Engine::drop_orphans(Lane& lane) {
  for (auto& link : lane.peer->links) {
    for (Orphan& orphan : link->orphans) {
      if (!orphan.share || orphan.share->lane != &lane) continue;
      --orphan.share->outstanding;
      --lane.outstanding;
      orphan.share = nullptr;
    }
  }
}

// Not in the middle of a batch of completions: those that the NIC has handed out count as back already.
void Engine::resolve_all_orphans() {
  orphans_due_ = false;
  const auto peers = peers_;
  for (const auto& peer : peers) {
    for (const auto& link : peer->links) {
      if (link->resuming) resolve_orphans(*link);
    }
  }
}

// Once the peer has given its count and every WR is back.
void Engine::resolve_orphans(PeerLink& link) {
  if (!link.resuming || !link.remote_closed || link.link->outstanding() > 0) return;
  link.resuming = false;
  std::vector<Orphan> orphans;
  orphans.swap(link.orphans);
  const uint64_t completed = link.link->immediates_completed();
  const auto carries = [](const Orphan& orphan) { return (orphan.request.flags & WorkRequest::kImmediate) != 0; };
  const auto with_immediate = static_cast<uint64_t>(std::count_if(orphans.begin(), orphans.end(), carries));
  std::vector<std::shared_ptr<Operation>> alive;
  for (const Orphan& orphan : orphans) {
    if (orphan.share) alive.push_back(orphan.share->lane->transfer->shared_from_this());
  }
  if (link.remote_landed < completed || link.remote_landed - completed > with_immediate) {
    // Not what an honest peer can have counted: nothing can be said of these any more.
    ++totals_.bad_frames;
    link.orphans.swap(orphans);
    std::vector<Lane*> lanes;
    for (const Orphan& orphan : link.orphans) {
      if (orphan.share) lanes.push_back(orphan.share->lane);
    }
    for (Lane* lane : lanes) {
      stop_lane(*lane, {Reason::kLinkFailed, link.peer->id, link_name(link),
                        link.failure.message + "; and peer " + link.peer->name + " counts " +
                            std::to_string(link.remote_landed) + " arrivals that cannot be"});
    }
    link.orphans.clear();
    return;
  }
  uint64_t landed = link.remote_landed - completed;
  size_t last = 0;  // orphans before this place have landed
  for (size_t i = 0; i < orphans.size() && landed > 0; ++i) {
    if (!carries(orphans[i])) continue;
    last = i + 1;
    --landed;
  }
  std::vector<WorkRequest> unposted;  // behind the orphans, if those stay with this link
  unposted.swap(link.stash);
  for (size_t i = 0; i < orphans.size(); ++i) {
    const auto& [request, share] = orphans[i];
    if (!share) continue;
    Lane& lane = *share->lane;
    if (lane.stopping) {  // by what was done for one of the others just now
      --share->outstanding;
      if (--lane.outstanding == 0) advance(lane);
    } else if (i < last && !(request.flags & WorkRequest::kRead)) {
      --share->outstanding;
      if (--lane.outstanding == 0 && lane.phase == Lane::Phase::kDraining) advance(lane);
    } else {
      send_again(link, request, *share);
    }
  }
  link.stash.insert(link.stash.end(), unposted.begin(), unposted.end());
}

void Engine::send_again(PeerLink& from, const WorkRequest& request, LaneLink& share) {
  Peer& peer = *from.peer;
  Lane& lane = *share.lane;
  PeerLink* to = nullptr;
  for (const auto& link : peer.links) {
    if (link->up && link->set == from.set && (!to || link->stash.size() < to->stash.size())) to = link.get();
  }
  if (!to && can_resume(from)) to = &from;  // it waits there
  --share.outstanding;
  if (!to) {
    --lane.outstanding;
    stop_lane(lane, from.failure);
    return;
  }
  LaneLink& other = lane.links[to->place];
  WorkRequest wr = request;
  lane.source->redirect(wr, from.ends, to->ends);
  wr.context = static_cast<WrContext*>(&other);
  ++other.outstanding;
  other.used = true;
  other.landed = other.last_proves = false;
  to->stash.push_back(wr);
  note_due(peer);
  ++peer.stats.work_requests_resent;
}

void Engine::remote_half_closed(PeerLink& link, uint32_t generation, uint64_t landed) {
  if (generation != link.generation || link.remote_closed) return;
  link.remote_closed = true;
  link.remote_landed = landed;
  std::vector<LaneLink*> confirmed;
  confirmed.swap(link.want_confirmation);
  for (LaneLink* share : confirmed) one_more_proven(*share);
  orphans_due_ = true;
  next_tick_ = 0;
}

// ---- making it anew
// --------------------------------------------------------------------------------------------------
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
    if (generation != link.generation) return;  // of a link that is no more
    link_down(link,
              {Reason::kLinkFailed, peer.id, link_name(link), "peer " + peer.name + " reports that the link broke"},
              false);
    if (peer.ended()) return;
    if (type == RecordType::kLinkDown) send_link_record(peer, link, RecordType::kLinkClosed);
    remote_half_closed(link, generation, landed);
    return;
  }
  const auto address = reader.rest();
  if (!link.nic->info().resumable || link.up || address.size() > kLongestAddress) return;
  switch (type) {
    case RecordType::kLinkOffer:
      if (peer.initiator || address.empty() || generation <= link.generation) break;
      link.offer.assign(address.begin(), address.end());
      link.offered = generation;
      if (link.rebuild == PeerLink::Rebuild::kAnswered) link.link->close();  // the older offer leads nowhere
      link.rebuild = PeerLink::Rebuild::kIdle;
      next_tick_ = 0;
      break;
    case RecordType::kLinkAnswer:
      if (!peer.initiator || link.rebuild != PeerLink::Rebuild::kOffered || generation != link.generation) break;
      try {
        if (address.empty()) throw NicError("peer " + peer.name + " cannot make its half now");
        link.link->connect(address);
        send_link_record(peer, link, RecordType::kLinkReady);
        link_up(link);
      } catch (const NicError& error) {
        link.failure.message = error.what();
        rebuild_later(link);
      }
      break;
    case RecordType::kLinkReady:
      if (link.rebuild == PeerLink::Rebuild::kAnswered && generation == link.generation) link_up(link);
      break;
    default:
      break;
  }
}

void Engine::link_up(PeerLink& link) {
  link.rebuild = PeerLink::Rebuild::kIdle;
  link.up = link.reachable = link.ever_up = true;
  link.failure = {};
  link.broken_since = 0;
  link.up_since = link.last_progress = link.last_heard = now_ns();
  link.first_send_error = 0;
  link.send_errors = 0;
  link.peer->sets[link.set].usable.store(true);
  ++link.peer->stats.links_rebuilt;
  note_due(*link.peer);
  for (const auto& other : link.peer->links) {
    if (!other->up && other->set == link.set) move_stash(*other);
  }
}

// What waits for a link that is down goes to one that is up, if there is one.
void Engine::move_stash(PeerLink& from) {
  std::vector<WorkRequest> waiting;
  waiting.swap(from.stash);
  for (const WorkRequest& wr : waiting) {
    send_again(from, wr, *static_cast<LaneLink*>(static_cast<WrContext*>(wr.context)));
  }
}

// A message has come over a pair of NICs that was given up.
void Engine::heard_again(PeerLink& link) {
  if (link.reachable || !link.nic->info().resumable) return;
  link.reachable = true;
  next_tick_ = 0;
}

void Engine::rebuild_later(PeerLink& link) {
  link.rebuild = PeerLink::Rebuild::kIdle;
  bool carried = false;  // something, so that whatever breaks it is not what it carries
  if (link.link) {
    link.link->close();
    carried = link.link->immediates_completed() + link.link->immediates_landed() > 0;
  }
  const int64_t now = now_ns();
  if (link.ever_up && (carried || now - link.up_since > options_.liveness_ns)) link.rebuild_tries = 0;
  link.rebuild_after = now + std::min(kFirstRebuild << std::min(link.rebuild_tries++, 10u), kLongestRebuild);
}

// The old half is closed and empty. Throws NicError.
void Engine::make_new_half(PeerLink& link) {
  auto made = link.nic->create_link();
  link.link = std::move(made);
  link.ever_up = link.remote_closed = false;
  link.remote_landed = 0;
  link.resuming = false;
  link.flushing = false;
}

void Engine::try_rebuild(Peer& peer, PeerLink& link, int64_t now) {
  if (link.up || !link.nic->info().resumable || !peer.connected()) return;
  resolve_orphans(link);
  if (link.rebuild == PeerLink::Rebuild::kOffered && now - link.offered_at > options_.liveness_ns) {
    rebuild_later(link);  // the peer could not even answer: begin again
  }
  const bool settled = link.rebuild == PeerLink::Rebuild::kIdle && link.link->outstanding() == 0 && !link.resuming &&
                       link.want_confirmation.empty();
  const bool confirmed = link.remote_closed || !link.ever_up;
  if (!settled || !link.reachable || now < link.rebuild_after) return;
  if (peer.initiator) {
    if (!confirmed) return;
    try {
      make_new_half(link);
      ++link.generation;
      link.rebuild = PeerLink::Rebuild::kOffered;
      link.offered_at = now;
      send_link_record(peer, link, RecordType::kLinkOffer, link.link->address());
    } catch (const NicError& error) {
      link.failure.message = error.what();
      rebuild_later(link);
    }
  } else if (!link.offer.empty()) {
    const auto offer = std::exchange(link.offer, {});
    link.generation = link.offered;
    try {
      make_new_half(link);
      link.link->connect(offer);
      link.rebuild = PeerLink::Rebuild::kAnswered;
      send_link_record(peer, link, RecordType::kLinkAnswer, link.link->address());
    } catch (const NicError& error) {
      link.failure.message = error.what();
      rebuild_later(link);
      send_link_record(peer, link, RecordType::kLinkAnswer);
    }
  }
}

}  // namespace railwire
