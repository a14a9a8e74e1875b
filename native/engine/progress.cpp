// Lanes and links: posting and completions.
#include <algorithm>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr size_t kLinkTurn = 16;                    // short WRs a link takes before the next link's turn
constexpr uint64_t kLinkBacklogBytes = 512 * 1024;  // of long WRs, per link of several

Reason reason_of(Status status) {
  switch (status) {
    case Status::kRemoteAccess:
      return Reason::kRemoteAccess;
    case Status::kLocal:
      return Reason::kLocal;
    default:
      return Reason::kLinkFailed;
  }
}

}  // namespace

void Transfer::start(Engine& engine, std::shared_ptr<Operation> self) {
  engine.start_transfer(std::static_pointer_cast<Transfer>(std::move(self)));
}
void Transfer::stop(Engine& engine) { engine.stop_transfer(*this); }

bool Engine::touches_revoked(const Lane& lane) {
  const auto& revoked = lane.peer->revoked_regions;
  return !revoked.empty() && lane.source->touches_any(revoked);
}

void Engine::start_transfer(std::shared_ptr<Transfer> self) {
  if (self->after) {
    if (hold(self)) return;
    self->after.reset();
  }
  Transfer& transfer = *self;
  transfer.lanes_left = transfer.lanes.size() + 1;
  for (Lane& lane : transfer.lanes) {
    Peer& peer = *lane.peer;
    const RailSet& rails = peer.rails(lane);
    lane.links.resize(rails.count);
    size_t index = rails.first;
    for (LaneLink& share : lane.links) {
      share.wr_kind = WrContext::kLane;
      share.lane = &lane;
      share.link = peer.links[index++].get();
    }
    // The doorbell first: what has to be written down besides has all the time that the wire takes.
    const bool posted = !transfer.cancelled && !transfer.refused && post_at_once(lane);
    if (self) active_.insert(std::move(self));
    peer.lanes.insert(&lane);
    if (posted) {
      touched_.push_back(&peer);
      after_posting(lane);
      continue;
    }
    if (!peer.connected()) {
      const bool ended = peer.ended();
      stop_lane(lane, ended ? peer.end_reason
                            : Failure{Reason::kClosed, peer.id, "", "peer " + peer.name + " is being closed"});
      continue;
    }
    if (transfer.refused) {
      stop_lane(lane, *transfer.first_failure);
    } else if (transfer.cancelled) {
      stop_lane(lane, {Reason::kCancelled, peer.id, "", "the transfer was cancelled"});
    } else if (touches_revoked(lane)) {
      stop_lane(lane, {Reason::kRevoked, peer.id, "",
                       "peer " + peer.name + " has revoked the region; ask it for a new descriptor"});
    } else if (lane.source->exhausted()) {
      advance(lane);
    } else {
      make_ready(lane);
    }
  }
  if (self) active_.insert(std::move(self));  // to nobody
  ++totals_.submitted;
  let_go(transfer);
}

void Engine::stop_transfer(Transfer& transfer) {
  transfer.cancelled = true;
  if (transfer.after && let_in()) return;  // it had not begun: it has ended now
  const auto self = transfer.shared_from_this();
  for (Lane& lane : transfer.lanes) {
    if (lane.phase != Lane::Phase::kFinished) {
      stop_lane(lane, {Reason::kCancelled, lane.peer->id, "", "the transfer was cancelled"});
    }
  }
  for (Lane& lane : transfer.lanes) settle_doubts(*lane.peer, now_ns());
}

void Engine::make_ready(Lane& lane) {
  lane.phase = Lane::Phase::kReady;
  lane.in_ready_list = true;
  touched_.push_back(lane.peer.get());
  note_due(*lane.peer);
  lane.peer->rails(lane).queue_of(lane).push_back(&lane);
}

bool Engine::pump(Peer& peer, uint64_t byte_budget) {
  bool any = false;
  for (RailSet& rails : peer.sets) {
    const size_t count = rails.count;
    const size_t first = count > 1 ? rails.next_link++ % count : 0;
    for (size_t i = 0; i < count; ++i) {
      PeerLink& link = *peer.links[rails.first + (first + i) % count];
      if (!link.up()) continue;
      if (!link.want_flush.empty() && !link.flushing) maybe_flush(link);
      if (!link.up()) continue;  // the flush has found it broken
      if (!rails.any_ready() && link.stash.empty()) continue;
      uint64_t budget = byte_budget;
      any |= pump_link(rails, link, budget);
    }
  }
  return any;
}

void Engine::count_posted(PeerLink& link, std::span<const WorkRequest> taken, uint64_t& byte_budget) {
  NicStats& stats = nic_stats_[link.ends.local_nic];
  Peer::Stats& of_peer = link.peer->stats;
  uint64_t written = 0, read = 0;
  for (const WorkRequest& wr : taken) (wr.flags & WorkRequest::kRead ? read : written) += wr.length;
  stats.work_requests += taken.size();
  of_peer.work_requests += taken.size();
  stats.bytes_written += written;
  stats.bytes_read += read;
  of_peer.bytes_written += written;
  of_peer.bytes_read += read;
  byte_budget -= std::min(byte_budget, written + read);
}

// Posts at most so many WRs of the lane and returns how many the link took; the rest of them wait in its stash.
size_t Engine::post_some(PeerLink& link, Lane& lane, size_t most, uint64_t& byte_budget) {
  const bool alone = link.peer->sets[link.set].count == 1;
  const NicInfo& nic = link.nic->info();
  LaneLink& share = lane.links[link.place];
  const size_t filled = lane.source->fill(link.ends, &share, {batch_.data(), most});
  share.outstanding += static_cast<uint32_t>(filled);
  lane.outstanding += static_cast<uint32_t>(filled);
  share.used |= filled > 0;
  if (filled > 0 && !nic.completion_proves_landing && alone && !lane.is_short && lane.source->exhausted() &&
      batch_[filled - 1].length > 0 && !(batch_[filled - 1].flags & WorkRequest::kRead)) {
    // A flush of its own would queue behind all that later lanes have posted by then.
    batch_[filled - 1].flags |= WorkRequest::kFlush;
    share.last_proves = true;
  }
  // With several links what is posted to one may have to go over another, where it is no longer behind the rest.
  if (filled > 1 && alone && nic.resumable) gather_immediates({batch_.data(), filled});
  const size_t taken = link.link->post({batch_.data(), filled});
  count_posted(link, {batch_.data(), taken}, byte_budget);
  if (lane.transfer->submitted_ns && taken > 0) {
    const int64_t latency = now_ns() - std::exchange(lane.transfer->submitted_ns, 0);
    post_latency_[post_samples_++ % post_latency_.size()] =
        static_cast<uint32_t>(std::min<int64_t>(latency, UINT32_MAX));
  }
  if (taken < filled) {
    link.stash.assign(batch_.data() + taken, batch_.data() + filled);
    note_due(*link.peer);
  }
  return taken;
}

// All of the lane has been handed to links.
void Engine::all_posted(Lane& lane) {
  lane.in_ready_list = false;
  lane.phase = Lane::Phase::kDraining;
  if (lane.outstanding == 0) advance(lane);
}

// A link that took less than it was given is full, or has broken, which something else may tell soon.
void Engine::look_for_break(PeerLink& link) {
  if (!link.link->broken() || break_will_be_told(link)) return;
  link_down(link, {Reason::kLinkFailed, link.peer->id, link_name(link), link_name(link) + " broke while posting"});
}

// A short lane that finds nothing before it goes out at once, without the queues. If so, after_posting() must follow.
bool Engine::post_at_once(Lane& lane) {
  Peer& peer = *lane.peer;
  const RailSet& rails = peer.rails(lane);
  if (!lane.is_short || rails.count != 1 || !peer.connected() || rails.any_ready()) return false;
  PeerLink& link = *peer.links[rails.first];
  if (!link.up() || !link.stash.empty() || touches_revoked(lane) || lane.source->exhausted()) return false;
  const size_t depth = link.nic->info().link_depth, outstanding = link.link->outstanding();
  if (outstanding >= depth) return false;
  uint64_t budget = kShortBytes;
  post_some(link, lane, std::min(kBatch, depth - outstanding), budget);
  return true;
}

void Engine::after_posting(Lane& lane) {
  PeerLink& link = *lane.links[0].link;
  if (!lane.source->exhausted()) {
    make_ready(lane);
  } else {
    all_posted(lane);
  }
  if (!link.stash.empty()) look_for_break(link);
}

// Posts to one link until it is full, nothing is ready, or the budget is spent.
bool Engine::pump_link(RailSet& rails, PeerLink& link, uint64_t& byte_budget) {
  bool any = false;
  if (!link.stash.empty()) {
    const size_t taken = link.link->post(link.stash);
    count_posted(link, {link.stash.data(), taken}, byte_budget);
    link.stash.erase(link.stash.begin(), link.stash.begin() + static_cast<ptrdiff_t>(taken));
    if (!link.stash.empty()) {
      look_for_break(link);
      return taken > 0;
    }
    any = true;
  }
  const size_t depth = link.nic->info().link_depth;
  while (rails.any_ready() && byte_budget > 0) {
    const size_t outstanding = link.link->outstanding();
    if (outstanding >= depth) break;
    Chain<Lane>& queue = rails.next_queue();
    Lane& lane = *queue.front();
    size_t most = std::min(kBatch, depth - outstanding);
    if (rails.count > 1) {
      // The links take turns, and a link that still has enough to do leaves the rest to faster ones.
      const uint64_t length = lane.source->next_length();
      const bool large = length >= kStripeBytes;
      if (large && outstanding >= 2 + kLinkBacklogBytes / length) break;
      most = std::min<size_t>(most, large ? 1 : kLinkTurn);
    }
    any |= post_some(link, lane, most, byte_budget) > 0;
    if (lane.source->exhausted()) {
      queue.pop_front();
      all_posted(lane);
    }
    if (!link.stash.empty()) {
      look_for_break(link);
      break;
    }
    if (rails.count > 1) break;
  }
  return any;
}

Engine::Polled Engine::poll_nics() {
  Polled polled;
  for (uint32_t i = 0; i < nics_.size(); ++i) {
    const size_t n = nics_[i]->poll(completions_);
    if (n == 0) {
      polled.any |= nics_[i]->working();
      continue;
    }
    polled.any = true;
    NicStats& stats = nic_stats_[i];
    for (size_t k = 0; k < n; ++k) {
      Completion& completion = completions_[k];
      switch (completion.kind) {
        case Completion::kImmediate:
          ++stats.immediates;
          counters_.arrive(completion.immediate);
          continue;
        case Completion::kWorkRequest:
          ++stats.completions;
          work_request_done(completion, i);
          break;
        case Completion::kMessage:
          ++stats.messages;
          message_arrived(i, completion.data);
          break;
        case Completion::kSend:
          // What is wrong with our own side of a message says nothing of the peer.
          if (completion.status != Status::kOk && completion.status != Status::kLocal) {
            const auto tag = reinterpret_cast<uintptr_t>(completion.context);
            if (tag) send_failed(tag >> 8, static_cast<uint32_t>(tag & 255), completion.provider_error, i);
          }
          break;
      }
      polled.only_arrivals = false;
      completion = {};  // so that nothing of it is taken for a later one's, of another NIC
    }
  }
  if (orphans_due_) [[unlikely]]
    resolve_all_orphans();
  if (questions_due_) [[unlikely]]
    ask_questions();
  return polled;
}

void Engine::work_request_done(const Completion& completion, uint32_t nic) {
  auto* context = static_cast<WrContext*>(completion.context);
  if (context->wr_kind == WrContext::kFlush) {
    flush_done(*static_cast<PeerLink*>(context), completion.status);
    return;
  }
  auto& share = *static_cast<LaneLink*>(context);
  Lane& lane = *share.lane;
  PeerLink& link = *share.link;
  --share.outstanding;
  --lane.outstanding;
  if (completion.status != Status::kOk) {
    ++nic_stats_[nic].errors;
    ++lane.peer->stats.errors;
    share.taken_back |= completion.status == Status::kFlushed || completion.status == Status::kUnreachable;
    if (completion.request && resendable(completion.status) && link.resuming) {
      ++share.outstanding;
      ++lane.outstanding;
      keep_orphan(link, share, *completion.request);
      if (lane.outstanding == 0 && lane.stopping) advance(lane);
      orphans_due_ = true;
      return;
    }
    Failure failure = link.failure;  // why the link went down, if it did
    if (link.up() || failure.reason == Reason::kNone || !resendable(completion.status)) {
      std::string what = std::string(to_string(completion.status)) + " from " + link_name(link);
      if (completion.provider_error) what += ": " + nics_[nic]->describe(completion.provider_error);
      if (const std::string ended = nics_[nic]->failure(); !ended.empty()) what = ended;
      failure = {reason_of(completion.status), lane.peer->id, link_name(link), what};
    }
    const auto keep = lane.transfer->shared_from_this();
    const bool breaks = link.up() && link.link->broken();
    const bool resumable = link.nic->info().resumable && completion.request;
    if (breaks && resumable && can_resume(link)) {
      // The first error: all that follows on this link comes back as well, and its place in the order counts.
      const WorkRequest request = *completion.request;
      if (!resendable(completion.status)) stop_lane(lane, failure);
      ++share.outstanding;
      ++lane.outstanding;
      keep_orphan(link, share, request);
      link_down(link, failure);
      if (lane.stopping && lane.outstanding == 0) advance(lane);
      return;
    }
    if (breaks && only_link(link) && !resumable) failure.reason = Reason::kPeerLost;
    stop_lane(lane, failure);
    if (breaks) link_down(link, failure);
    return;
  }
  link.last_progress = 0;
  if (lane.outstanding == 0 && (lane.stopping || lane.phase == Lane::Phase::kDraining)) advance(lane);
}

// Takes everything of the lane that no NIC has seen yet off the queues, and moves on if nothing is outstanding.
void Engine::stop_lane(Lane& lane, Failure failure) {
  if (lane.phase == Lane::Phase::kFinished) return;
  if (!lane.stopping) {
    lane_failed(lane, std::move(failure));
    if (lane.in_ready_list) {
      lane.peer->rails(lane).queue_of(lane).erase(&lane);
      lane.in_ready_list = false;
    }
    drop_stash(lane);
    drop_orphans(lane);
    if (lane.phase == Lane::Phase::kReady) lane.phase = Lane::Phase::kDraining;
  }
  if (lane.outstanding == 0 && lane.phase == Lane::Phase::kDraining) advance(lane);
}

void Engine::drop_stash(Lane& lane) {
  for (auto& link : lane.peer->links) {
    std::erase_if(link->stash, [&](const WorkRequest& wr) {
      auto* context = static_cast<WrContext*>(wr.context);
      if (context->wr_kind != WrContext::kLane || static_cast<LaneLink*>(context)->lane != &lane) return false;
      --static_cast<LaneLink*>(context)->outstanding;
      --lane.outstanding;
      return true;
    });
  }
}

std::string Engine::link_name(const PeerLink& link) const {
  return link.nic->info().name + " -> " + link.peer->name + "#" + std::to_string(link.ends.remote_nic);
}

}  // namespace railwire
