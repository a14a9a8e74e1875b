// Progress: what has arrived in the rings, what is still to be copied, and going to sleep.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/host_internal.h"

namespace railwire {
namespace {

constexpr uint32_t kPollsPerLook = 128;        // at the sockets, while nobody sleeps
constexpr size_t kAlwaysHot = 16;              // rings, however silent
constexpr uint32_t kCoolAfter = 4096;          // polls that brought nothing
constexpr uint32_t kPollsPerSleep = 1024;      // what a sleep counts as
constexpr uint64_t kLandAtOnce = 128 << 10;    // bytes of one link's short writes, before the next link's turn
constexpr uint64_t kCopyPerTurn = 256 << 10;   // the same of its long ones
constexpr uint64_t kCopyPerPoll = 1ull << 20;  // while nothing has ended

}  // namespace

// Takes what the peer's half has put into its ring: arrivals into `out`, short writes into our memory.
size_t HostLink::consume(std::span<Completion> out) {
  size_t filled = 0;
  uint64_t landed = 0;
  RingConsumer::Record record;
  while (filled < out.size() && landed < kLandAtOnce) {
    const auto next = in_.next(&record);
    if (next == RingConsumer::Next::kGarbage) {
      break_now(EPROTO);
      break;
    }
    if (next == RingConsumer::Next::kNone) break;
    const RecordKind kind = record.head.kind();
    if (kind == RecordKind::kMessage) {
      break_now(EPROTO);
      break;
    }
    if (kind != RecordKind::kImmediate) {
      RegionRange range;
      const uint32_t length = record.head.length();
      if (!nic_.table_.view().allows(record.target.rkey, record.target.remote, length, true, &range)) {
        in_.refuse();
        continue;
      }
      if (range.flags & RegionSlot::kGpu) {
        in_.refuse();  // a writer of ours never sends it so
        continue;
      }
      std::memcpy(reinterpret_cast<void*>(record.target.remote), record.payload, length);
      landed += length;
      if (kind == RecordKind::kWrite) continue;
    }
    out[filled++] = {.kind = Completion::kImmediate, .immediate = record.head.immediate};
  }
  if (!in_.finish()) {
    // The ring is empty: now the end of the peer, or of its half, is the end of ours.
    if (up_ && filled == 0 && (peer_->dead || in_.header().producer_closed.load(std::memory_order_acquire)) &&
        in_.empty()) {
      break_now(ECONNRESET);
    }
    return filled;
  }
  idle_polls_ = 0;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  RingHeader& header = in_.header();
  if (header.producer_asleep.load(std::memory_order_relaxed) &&
      header.producer_asleep.exchange(0, std::memory_order_relaxed)) {
    nic_.ring(*peer_);
  }
  return filled;
}

// ---- hot and cold rings ------------------------------------------------------------------------------------------
void HostNic::heat(HostLink& link) {
  link.idle_polls_ = 0;
  if (link.hot_ || !link.up_) return;
  link.hot_ = true;
  link.in_.header().consumer_asleep.store(0, std::memory_order_relaxed);
  hot_links_.push_back(&link);
}

void HostNic::heat(Caller& caller) {
  caller.idle_polls = 0;
  if (caller.hot) return;
  caller.hot = true;
  caller.messages.header().consumer_asleep.store(0, std::memory_order_relaxed);
  hot_callers_.push_back(&caller);
}

void HostNic::heat_links(const HostToken& peer) {
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return;
  for (HostLink* link : found->second->links) heat(*link);
}

// Takes rings that have long been silent out of the turn, if there are many.
void HostNic::cool_down() {
  if (hot_links_.size() + hot_callers_.size() <= kAlwaysHot) return;
  // Whoever puts something into the ring sees that the word is set, or we see what it has put there.
  const auto cold = [](RingConsumer& ring) {
    ring.header().consumer_asleep.store(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return ring.empty() && !ring.header().producer_closed.load(std::memory_order_relaxed);
  };
  std::erase_if(hot_links_, [&](HostLink* link) {
    const bool silent = link->first_ == link->end_ && link->idle_polls_ > kCoolAfter;
    link->hot_ = link->up_ && !(silent && cold(link->in_) && !link->peer_->dead);
    return !link->hot_;
  });
  std::erase_if(hot_callers_, [&](Caller* caller) {
    caller->hot = caller->ended || caller->idle_polls <= kCoolAfter || !cold(caller->messages);
    return !caller->hot;
  });
}

size_t HostNic::take_messages(std::span<Completion> out) {
  size_t filled = 0, used = 0;
  for (size_t turn = 0; turn < hot_callers_.size() && filled < out.size(); ++turn) {
    next_caller_ = next_caller_ + 1 < hot_callers_.size() ? next_caller_ + 1 : 0;
    Caller& caller = *hot_callers_[next_caller_];
    ++caller.idle_polls;
    bool garbage = false;
    while (filled < out.size() && used + kLongestMessage <= arena_.size()) {
      RingConsumer::Record record;
      const auto next = caller.messages.next(&record);
      if (next == RingConsumer::Next::kNone) break;
      const uint32_t length = record.head.length();
      if (next == RingConsumer::Next::kGarbage || record.head.kind() != RecordKind::kMessage ||
          length > kLongestMessage) {
        garbage = true;
        break;
      }
      // A copy: what stays in the ring could be changed while it is read.
      if (length > 0) std::memcpy(arena_.data() + used, record.payload, length);
      out[filled++] = {.kind = Completion::kMessage, .data = {arena_.data() + used, length}};
      used += length;
    }
    if (!garbage && caller.messages.finish()) {
      caller.idle_polls = 0;
      std::atomic_thread_fence(std::memory_order_seq_cst);
      RingHeader& header = caller.messages.header();
      if (header.producer_asleep.load(std::memory_order_relaxed) &&
          header.producer_asleep.exchange(0, std::memory_order_relaxed) && !caller.ended) {
        const std::byte bell{1};
        (void)caller.socket.send({&bell, 1});
      }
    } else if (garbage || (caller.ended && caller.messages.empty())) {
      drop_caller(caller.event);
      break;  // the list has changed
    }
  }
  return filled;
}

size_t HostNic::poll(std::span<Completion> out) {
  std::lock_guard lock(mutex_);
  if (look_now_ || ++polls_ % kPollsPerLook == 0) {
    look_at_events();
    cool_down();
  }
  std::erase_if(draining_links_, [](HostLink* link) {
    link->take_back(Status::kFlushed, 0);
    return !link->draining_;
  });
  size_t filled = 0;
  uint64_t copied = 0;
  bool again = true;
  while (again) {
    again = false;
    for (size_t turn = 0; turn < hot_links_.size() && filled < out.size(); ++turn) {
      next_link_ = next_link_ + 1 < hot_links_.size() ? next_link_ + 1 : 0;
      HostLink& link = *hot_links_[next_link_];
      if (!link.up_) continue;
      ++link.idle_polls_;
      filled += link.consume(out.subspan(filled));
      if (link.first_ == link.end_ || !link.up_) continue;
      if (link.has_to_copy()) {
        const uint64_t more = link.advance(kCopyPerTurn);
        copied += more;
        again |= more > 0;
      } else {
        link.complete();
      }
    }
    // Only copies come here twice: a long one ends after many turns, and nobody is to take us for idle meanwhile.
    copying_ = again;
    again = again && filled == 0 && held_.empty() && copied < kCopyPerPoll;
  }
  if (filled < out.size() && !hot_callers_.empty()) filled += take_messages(out.subspan(filled));
  while (filled < out.size() && next_held_ < held_.size()) {
    Completion& completion = out[filled++] = held_[next_held_++];
    if (completion.kind == Completion::kWorkRequest) --static_cast<HostLink*>(completion.link)->outstanding_;
  }
  if (next_held_ == held_.size()) {
    held_.clear();
    next_held_ = 0;
  }
  return filled;
}

bool HostNic::nothing_to_do() {
  if (look_now_ || !held_.empty()) return false;
  if (!draining_links_.empty()) return false;
  for (HostLink* link : hot_links_) {
    if (link->last_batch_ && link->gpu_under_way()) return false;
    if (!link->up_) continue;
    // What a GPU has just copied has to be told: nothing else would wake us for it.
    if (link->first_ != link->next_ && link->at(link->first_).batch) return false;
    if (!link->in_.empty() || link->peer_->dead) return false;
    if (link->in_.header().producer_closed.load(std::memory_order_relaxed)) return false;
    if (link->has_to_copy() && !link->blocked_) return false;
    if (link->first_ != link->end_ &&
        link->out_.header().tail.load(std::memory_order_acquire) != link->out_.consumed()) {
      return false;
    }
  }
  return std::all_of(hot_callers_.begin(), hot_callers_.end(),
                     [](const Caller* caller) { return caller->messages.empty() && !caller->ended; });
}

bool HostNic::arm() {
  std::lock_guard lock(mutex_);
  if (!nothing_to_do()) return false;
  for (HostLink* link : hot_links_) {
    link->idle_polls_ += kPollsPerSleep;
    if (!link->up_) continue;
    link->in_.header().consumer_asleep.store(1, std::memory_order_relaxed);
    if (link->first_ != link->end_) link->out_.header().producer_asleep.store(1, std::memory_order_relaxed);
  }
  for (Caller* caller : hot_callers_) {
    caller->idle_polls += kPollsPerSleep;
    caller->messages.header().consumer_asleep.store(1, std::memory_order_relaxed);
  }
  for (const auto& [event, peer] : peer_events_) {
    if (peer->wants_room && !peer->dead) {
      peer->wants_room = false;
      peer->messages.header().producer_asleep.store(1, std::memory_order_relaxed);
      if (peer->messages.header().tail.load() != peer->messages.consumed()) look_now_ = true;
    }
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return nothing_to_do();
}

void HostNic::disarm() {
  std::lock_guard lock(mutex_);
  for (HostLink* link : hot_links_) {
    if (!link->up_) continue;
    link->in_.header().consumer_asleep.store(0, std::memory_order_relaxed);
    link->out_.header().producer_asleep.store(0, std::memory_order_relaxed);
  }
  for (Caller* caller : hot_callers_) caller->messages.header().consumer_asleep.store(0, std::memory_order_relaxed);
  look_now_ = true;
}

}  // namespace railwire
