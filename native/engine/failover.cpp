// What becomes of a link that breaks although its peer is alive, on NICs that are `resumable` (nic.h).
//
// The states of a link, and how it is made anew: link_state.h.
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
#include <algorithm>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr uint32_t kMostRebuilds = 8;  // in a row of a link that carries nothing, before transfers fail with it

}  // namespace

bool Engine::another_is_up(const PeerLink& link) {
  return std::any_of(link.peer->links.begin(), link.peer->links.end(),
                     [&](const auto& other) { return other.get() != &link && other->up() && other->set == link.set; });
}

// What the link had not landed has somewhere to go, now or soon. `link` is no longer up, or about to be down.
bool Engine::can_resume(const PeerLink& link) {
  if (!link.nic->info().resumable || !link.peer->connected()) return false;
  return std::any_of(link.peer->links.begin(), link.peer->links.end(), [&](const auto& other) {
    if (other->set != link.set) return false;  // keys of one kind of NIC say nothing to another
    if (other.get() != &link && other->up()) return true;
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
  if (!link.resuming || !link.state.remote_closed || link.link->outstanding() > 0) return;
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
    if (link->up() && link->set == from.set && (!to || link->stash.size() < to->stash.size())) to = link.get();
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

// What waits for a link that is down goes to one that is up, if there is one.
void Engine::move_stash(PeerLink& from) {
  std::vector<WorkRequest> waiting;
  waiting.swap(from.stash);
  for (const WorkRequest& wr : waiting) {
    send_again(from, wr, *static_cast<LaneLink*>(static_cast<WrContext*>(wr.context)));
  }
}

}  // namespace railwire
