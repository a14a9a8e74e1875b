// Reading the completion queue, and sleeping on it.
#include <time.h>

#include <algorithm>

#include "nic/libfabric_internal.h"

namespace railwire {
namespace {

constexpr size_t kBatch = 64;
constexpr int64_t kStarvedFor = 5'000'000;        // ns; whoever wants to post tries again sooner
constexpr int64_t kQuietWithin = 30'000'000'000;  // a closed link's WRs are back, or never will be
constexpr uint32_t kLookEvery = 4096;             // polls

}  // namespace

int64_t LibfabricNic::now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

Status status_of_libfabric(int error) {
  switch (error) {
    case 0:
      return Status::kOk;
    case FI_EACCES:
    case FI_EPERM:
    case FI_ENOKEY:
    case FI_EKEYREJECTED:
    case FI_EREMOTEIO:
      return Status::kRemoteAccess;
    case FI_ECANCELED:  // the connection under it went
    case FI_ECONNABORTED:
    case FI_ECONNREFUSED:
    case FI_ECONNRESET:
    case FI_EHOSTDOWN:
    case FI_EHOSTUNREACH:
    case FI_ENETDOWN:
    case FI_ENETUNREACH:
    case FI_ENOTCONN:
    case FI_ESHUTDOWN:
    case FI_ETIMEDOUT:
    case ENETRESET:
    case ENXIO:
    case EPIPE:
    case ESRCH:  // shm: the other process is no more
      return Status::kUnreachable;
    case FI_EFAULT:
    case FI_EINVAL:
    case FI_EMSGSIZE:
    case FI_ETOOSMALL:
      return Status::kLocal;
    default:
      return Status::kOther;
  }
}

size_t LibfabricNic::poll(std::span<Completion> out) {
  std::lock_guard lock(mutex_);
  if (!consumed_.empty()) [[unlikely]]
    post_receives();
  if (!unsent_.empty()) [[unlikely]]
    post_unsent();
  if (++polls_ % kLookEvery == 0) look_for_overdue();
  size_t filled = 0;
  if (has_held()) [[unlikely]] {
    filled = hand_out_held(out);
  } else if (piece_payload_ != 0) {
    assembler_.let_go();
  }
  if (filled < out.size()) filled += read_queue(out.subspan(filled));
  if (filled > 0 && !bells_.empty()) {
    // What we have just taken in may be what a sleeper waits for to see done.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (HostBell* bell : bells_) bell->ring_if_asleep();
  }
  return filled;
}

// Returns with less than `out` holds only when the queue had no more.
size_t LibfabricNic::read_queue(std::span<Completion> out) {
  fi_cq_data_entry entries[kBatch];
  fid_cq* cq = cq_.get();
  size_t filled = 0;
  while (filled < out.size() && gave_up_ == 0) {
    const size_t room = std::min(kBatch, out.size() - filled);
    const ssize_t got = fi_cq_read(cq, entries, room);
    if (got > 0) {
      for (ssize_t i = 0; i < got; ++i) filled += translate(entries[i], out[filled]) ? 1 : 0;
      if (static_cast<size_t>(got) < room) break;
    } else if (got == -FI_EAVAIL) {
      Padded<fi_cq_err_entry> error;
      if (fi_cq_readerr(cq, &error.value, 0) != 1) break;
      filled += translate_error(error.value, out[filled]) ? 1 : 0;
    } else {
      // Overrun, or dead: it never says anything again.
      if (got != -FI_EAGAIN && got != -FI_EINTR) [[unlikely]]
        give_up(static_cast<int>(-got));
      break;
    }
  }
  return filled;
}

bool LibfabricNic::translate(const fi_cq_data_entry& entry, Completion& out, int error) {
  constexpr uint64_t kMessageArrived = FI_MSG | FI_RECV;
  if ((entry.flags & kMessageArrived) == kMessageArrived) {
    auto* slot = static_cast<ReceiveSlot*>(entry.op_context);
    slot->busy = false;
    consumed_.push_back(slot);
    std::span<const std::byte> message(slot->buffer, entry.len);
    if (piece_payload_ != 0 && assembler_.take(message, message) == PieceAssembler::kNothing) return false;
    out = {};
    out.kind = Completion::kMessage;
    out.data = message;
    return true;
  }
  if (entry.flags & FI_REMOTE_CQ_DATA) {
    if (recv_consumed_by_writes_ && owns(entry.op_context)) {
      auto* slot = static_cast<ReceiveSlot*>(entry.op_context);
      slot->busy = false;
      consumed_.push_back(slot);
    }
    out.kind = Completion::kImmediate;
    out.status = Status::kOk;
    out.immediate = static_cast<uint32_t>(entry.data);
    out.provider_error = 0;
    out.context = nullptr;
    out.link = nullptr;
    return true;
  }
  auto* context = static_cast<OpContext*>(entry.op_context);
  if (!context || !context->busy) [[unlikely]]
    return false;
  if (context->kind == OpContext::kWorkRequest) {
    out.status = status_of_libfabric(error);
    out.provider_error = error;
    auto* slot = static_cast<WrSlot*>(context);
    LibfabricLink* link = slot->link;
    if (!link) [[unlikely]] {  // its link did not wait for it
      slot->busy = false;
      --in_send_queue_;
      return false;
    }
    if (!own_endpoint_) --in_send_queue_;
    out.kind = Completion::kWorkRequest;
    out.context = slot->context;
    out.link = link;
    link->slots_->give_back(slot);
    --link->in_provider_;
    --link->outstanding_;
    return true;
  }
  if (context->kind == OpContext::kSend) {
    return send_ended(static_cast<SendSlot*>(context), error, out);
  }
  return false;
}

bool LibfabricNic::translate_error(const fi_cq_err_entry& entry, Completion& out) {
  // The provider also reports what went wrong on our side of a peer's operation; that is no WR of ours.
  if (!owns(entry.op_context)) return false;
  auto* context = static_cast<OpContext*>(entry.op_context);
  if (!context->busy) return false;
  if (context->kind == OpContext::kReceive) {
    // Such as a message that is longer than anything we send: dropped.
    context->busy = false;
    consumed_.push_back(static_cast<ReceiveSlot*>(context));
    return false;
  }
  LibfabricLink* link = context->kind == OpContext::kWorkRequest ? static_cast<WrSlot*>(context)->link : nullptr;
  fi_cq_data_entry plain{};
  plain.op_context = entry.op_context;
  if (!translate(plain, out, entry.err)) return false;
  if (link) {
    if (out.status == Status::kUnreachable) {
      // libfabric would connect again by itself at the next post, to whoever listens there by then.
      link->broken_ = true;
      if (link->closed_) out.status = Status::kFlushed;
    }
  }
  return true;
}

bool LibfabricNic::owns(const void* context) const {
  if (!context) return false;
  if (context >= receives_.data() && context < receives_.data() + receives_.size()) return true;
  if (sends_->owns(context)) return true;
  for (const LibfabricLink* link : links_) {
    if (link->slots_->owns(context)) return true;
  }
  return std::any_of(orphans_.begin(), orphans_.end(), [&](const auto& pool) { return pool->owns(context); });
}

void LibfabricNic::hold(Completion completion) {
  if (completion.kind == Completion::kWorkRequest) ++static_cast<LibfabricLink*>(completion.link)->outstanding_;
  if (completion.kind == Completion::kMessage) {
    // The buffer must not be posted again before its message has been handed out.
    completion.context = consumed_.back();
    consumed_.pop_back();
  }
  held_.push_back(completion);
}

size_t LibfabricNic::hand_out_held(std::span<Completion> out) {
  size_t filled = 0;
  while (filled < out.size() && has_held()) {
    Completion& completion = out[filled++] = held_[next_held_++];
    if (completion.kind == Completion::kWorkRequest) --static_cast<LibfabricLink*>(completion.link)->outstanding_;
    if (completion.kind == Completion::kMessage) {
      consumed_.push_back(static_cast<ReceiveSlot*>(completion.context));
      completion.context = nullptr;
    }
  }
  if (!has_held()) {
    held_.clear();
    next_held_ = 0;
  }
  return filled;
}

bool LibfabricNic::drain(size_t at_most) {
  bool any = false;
  Completion completions[1];
  // One at a time: hold() takes back the buffer of the very message that was read last.
  for (size_t i = 0; i < at_most && read_queue(completions) > 0; ++i) {
    hold(completions[0]);
    any = true;
  }
  return any;
}

void LibfabricNic::drop_held(const LibfabricLink* link) {
  // Before next_held_ they are handed out already.
  const auto first = held_.begin() + static_cast<ptrdiff_t>(next_held_);
  held_.erase(std::remove_if(first, held_.end(), [&](const Completion& c) { return c.link == link; }), held_.end());
}

// The NIC has ended: nothing is known any more of what its queue would have said. Without endpoints the device and the
// library touch nothing of ours, so all that was posted is back.
void LibfabricNic::give_up(int error) {
  if (gave_up_ != 0) return;
  gave_up_ = error;
  control_.ep.reset();
  for (LibfabricLink* link : links_) {
    link->own_.ep.reset();
    link->ep_ = nullptr;
    link->broken_ = true;
    link->take_back(link->closed_ ? Status::kFlushed : Status::kUnreachable, error);
  }
  orphans_.clear();
  in_send_queue_ = 0;
  unsent_.clear();
  std::vector<SendSlot*> sends;
  sends_->for_each_busy([&](SendSlot& slot) { sends.push_back(&slot); });
  for (SendSlot* slot : sends) {
    Completion end;
    if (send_ended(slot, error, end)) hold(end);
  }
  for (ReceiveSlot& slot : receives_) slot.busy = false;
}

// Software in the provider may wait for a peer that will never come again. Nothing but the end of the endpoint takes
// such work requests back, and all links share it.
void LibfabricNic::look_for_overdue() {
  if (own_endpoint_ || in_send_queue_ == 0) return;
  const int64_t now = now_ns();
  for (const LibfabricLink* link : links_) {
    if (link->closed_ && link->in_provider_ > 0 && now - link->closed_at_ > kQuietWithin) return give_up(FI_ETIMEDOUT);
  }
}

void LibfabricNic::starved() { starved_until_ns_ = now_ns() + kStarvedFor; }

bool LibfabricNic::arm() {
  std::lock_guard lock(mutex_);
  look_for_overdue();
  if (has_held() || !unsent_.empty() || (!consumed_.empty() && gave_up_ == 0)) return false;
  if (gave_up_ != 0) return true;
  if (starved_until_ns_ != 0) {
    if (now_ns() < starved_until_ns_) return false;
    starved_until_ns_ = 0;
  }
  if (!wakeup_) {
    if (cq_fd_ < 0 || naps_) return true;  // the caller naps
    fid* queue = &cq_->fid;
    return fi_trywait(fabric_.get(), &queue, 1) == 0;
  }
  // A long write is carried out by its target, without a completion there: nobody rings when it is done.
  const bool busy = std::any_of(links_.begin(), links_.end(), [](const auto* link) { return link->in_provider_ > 0; });
  if (busy) return false;
  wakeup_->announce();
  if (drain(1)) {
    wakeup_->awake();
    return false;
  }
  return true;
}

void LibfabricNic::disarm() {
  if (wakeup_) wakeup_->awake();
}

}  // namespace railwire
