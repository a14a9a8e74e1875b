// The proof that what a lane has written has landed (phase "proving", transfer.h), and what may only be sent then.
#include <algorithm>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr int64_t kLazyFlush = 100'000;  // ns that a landing which nobody waits for may stay unproven
constexpr size_t kFlushAtOnce = 256;     // unproven shares that are flushed without further delay

}  // namespace

// All WRs of the lane are back: find out whether what they carried has landed.
void Engine::advance(Lane& lane) {
  if (lane.phase == Lane::Phase::kProving || lane.phase == Lane::Phase::kFinished) return;
  lane.phase = Lane::Phase::kProving;
  Peer& peer = *lane.peer;
  lane.unproven = 1;  // held until every link has been looked at
  for (LaneLink& share : lane.links) {
    if (!share.used || share.landed) continue;
    PeerLink& link = *share.link;
    const ShareFacts facts = facts_of(share);
    if (lost_its_proof(facts) && !lane.stopping) lane_failed(lane, link.failure);
    lane.may_still_land |= may_still_land(facts);
    switch (end_of_share(facts)) {
      case ShareEnd::kProven:
        share.landed = true;
        break;
      case ShareEnd::kFlush:
        ++lane.unproven;
        if (link.want_flush.empty()) link.flush_due = now_ns() + kLazyFlush;
        link.want_flush.push_back(&share);
        note_due(peer);
        break;
      case ShareEnd::kConfirm:
        ++lane.unproven;
        link.want_confirmation.push_back(&share);
        break;
    }
  }
  for (LaneLink& share : lane.links) {
    if (share.link->up() && !share.link->want_flush.empty()) maybe_flush(*share.link);
  }
  if (--lane.unproven == 0) landing_proven(lane);
}

ShareFacts Engine::facts_of(const LaneLink& share) {
  const PeerLink& link = *share.link;
  const NicInfo& nic = link.nic->info();
  return {.read = share.lane->transfer->kind == Transfer::Kind::kRead,
          .stopping = share.lane->stopping,
          .last_proves = share.last_proves,
          .taken_back = share.taken_back,
          .completion_proves_landing = nic.completion_proves_landing,
          .closing_quiets = nic.closing_quiets,
          .up = link.up(),
          .ever_up = link.state.ever_up,
          .remote_closed = link.state.remote_closed,
          .confirmed = link.peer->confirmed,
          .process_dead = link.peer->process_dead,
          .peer_ended = link.peer->ended()};
}

// The peer has ended, and its word or the end of its process has come.
void Engine::all_quiet(Peer& peer) {
  const auto keep = peer.shared_from_this();
  for (auto& link : peer.links) {
    std::vector<LaneLink*> waiting;
    waiting.swap(link->want_confirmation);
    for (LaneLink* share : waiting) one_more_proven(*share);
  }
  look_at(peer, 0);
}

void Engine::maybe_flush(PeerLink& link) {
  if (link.flushing || link.want_flush.empty() || !link.up()) return;
  // A flush costs as much as a short write: one that nobody waits for is put off, and then serves many.
  const auto wanted = [](const LaneLink* share) { return share->lane->transfer->wanted() || share->lane->stopping; };
  if (link.want_flush.size() < kFlushAtOnce && std::none_of(link.want_flush.begin(), link.want_flush.end(), wanted) &&
      now_ns() < link.flush_due) {
    return;
  }
  const uint32_t nic = link.ends.local_nic;
  const WorkRequest flush{.local = pads_[nic].data() + 8,
                          .local_key = pad_registrations_[nic].local,
                          .remote = link.ends.pad_address,
                          .rkey = link.ends.pad_rkey,
                          .length = 8,
                          .flags = WorkRequest::kFlush,
                          .context = static_cast<WrContext*>(&link)};
  // One flush proves the landing of everything that had completed before it.
  if (link.link->post({&flush, 1}) == 1) {
    link.flushing = true;
    link.in_flush.swap(link.want_flush);
  } else if (link.link->broken()) {
    link_down(link, {Reason::kLinkFailed, link.peer->id, link_name(link), "the connection broke"});
  }
}

void Engine::flush_done(PeerLink& link, Status status) {
  link.flushing = false;
  link.last_progress = 0;
  if (status != Status::kOk) {
    if (link.up()) {
      link_down(link, {Reason::kLinkFailed, link.peer->id, link_name(link),
                       std::string("a flush of ") + link_name(link) + " ended with: " + to_string(status)});
    }
    return;  // link_down has taken in_flush over
  }
  std::vector<LaneLink*> proven;
  proven.swap(link.in_flush);
  for (LaneLink* share : proven) one_more_proven(*share);
  maybe_flush(link);
}

void Engine::one_more_proven(LaneLink& share) {
  share.landed = true;
  if (--share.lane->unproven == 0) landing_proven(*share.lane);
}

void Engine::landing_proven(Lane& lane) {
  if (lane.stopping || lane.trailing_units == 0) {
    finish_lane(lane);
    return;
  }
  lane.source.emplace<TrailingSource>(std::exchange(lane.trailing_units, 0), static_cast<uint32_t>(lane.immediate_id));
  for (LaneLink& share : lane.links) share.used = share.landed = share.last_proves = share.taken_back = false;
  make_ready(lane);
}

size_t TrailingSource::fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) {
  size_t n = 0;
  for (; n < out.size() && units_ > 0; ++n) {
    const auto weight = static_cast<uint32_t>(std::min<uint64_t>(units_, kMaxWeight));
    units_ -= weight;
    out[n] = {.remote = ends.pad_address,
              .rkey = ends.pad_rkey,
              .flags = WorkRequest::kImmediate,
              .immediate = encode_immediate(immediate_id_, weight),
              .context = context};
  }
  return n;
}

}  // namespace railwire
