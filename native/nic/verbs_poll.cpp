// Reading the completion queue, keeping receive WRs posted, and sleeping.
#include <fcntl.h>

#include <algorithm>

#include "nic/verbs_internal.h"

namespace railwire {
namespace {

constexpr size_t kBatch = 64;
constexpr uint32_t kLookEvery = 4096;        // polls between looks at the device's events while nobody sleeps
constexpr uint32_t kAcknowledgeAtOnce = 64;  // each acknowledgement takes a lock

}  // namespace

Status status_of_wc(int wc_status) {
  switch (wc_status) {
    case IBV_WC_SUCCESS:
      return Status::kOk;
    case IBV_WC_WR_FLUSH_ERR:
      return Status::kFlushed;
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
      return Status::kRemoteAccess;
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
    case IBV_WC_RESP_TIMEOUT_ERR:
      return Status::kUnreachable;
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_ACCESS_ERR:
      return Status::kLocal;
    default:  // IBV_WC_LOC_QP_OP_ERR too: Soft-RoCE says so when the interface under it is down
      return Status::kOther;
  }
}

size_t VerbsNic::poll(std::span<Completion> out) {
  std::lock_guard lock(mutex_);
  if (!lent_receives_.empty()) {
    used_receives_.insert(used_receives_.end(), lent_receives_.begin(), lent_receives_.end());
    lent_receives_.clear();
  }
  lent_messages_.clear();
  assembler_.let_go();
  if (messages_broken_) [[unlikely]] {
    try {
      ready_messages();
    } catch (const NicError&) {  // the next poll tries again; silence meanwhile is the engine's to judge
    }
  } else if (!used_receives_.empty()) {
    recycle_receives();
  }
  if (++polls_ % kLookEvery == 0 || !closing_.empty()) look_at_events();
  size_t filled = 0;
  while (!held_.empty() && filled < out.size()) {
    Held& first = held_.front();
    Completion& completion = out[filled++] = first.completion;
    if (completion.kind == Completion::kMessage) {
      lent_messages_.push_back(std::move(first.message));
      completion.data = lent_messages_.back();
    }
    held_.pop_front();
  }
  filled += hand_out(out.subspan(filled));
  if (filled < out.size()) {
    size_t polled = 0;
    const size_t room = std::min(kBatch, out.size() - filled);
    filled += pull(out.subspan(filled), &polled);
    if (!closing_.empty() && polled < room) [[unlikely]]
      advance_ends();
    filled += hand_out(out.subspan(filled));
  }
  if (receives_missing_ >= refill_at_) refill();
  return filled;
}

// At most as many completions as there is room for what they bring; WRs are left for hand_out().
size_t VerbsNic::pull(std::span<Completion> out, size_t* polled) {
  ibv_wc entries[kBatch];
  const int got = ibv_poll_cq(cq_.get(), static_cast<int>(std::min(kBatch, out.size())), entries);
  *polled = got > 0 ? static_cast<size_t>(got) : 0;
  size_t filled = 0;
  for (int i = 0; i < got; ++i) filled += take(entries[i], out[filled]) ? 1 : 0;
  return filled;
}

// True if there is something to hand out in `out`.
bool VerbsNic::take(const ibv_wc& wc, Completion& out) {
  const auto owner = static_cast<uint32_t>(wc.wr_id >> 32) & 0xffffff;
  const auto number = static_cast<uint32_t>(wc.wr_id);
  switch (static_cast<WrKind>(wc.wr_id >> 56)) {
    case WrKind::kLink:
      if (owner < links_.size() && links_[owner]) links_[owner]->ended(number, wc.status);
      return false;
    case WrKind::kSharedReceive:
      ++receives_missing_;
      if (wc.status != IBV_WC_SUCCESS) [[unlikely]] {
        if (VerbsLink* link = link_of(wc.qp_num)) link->broken_ = true;
        return false;
      }
      if (!(wc.wc_flags & IBV_WC_WITH_IMM)) return false;  // a SEND, which no Railwire posts there
      immediate_through(wc.qp_num);
      out.kind = Completion::kImmediate;
      out.status = Status::kOk;
      out.immediate = __builtin_bswap32(wc.imm_data);
      out.provider_error = 0;
      out.context = nullptr;
      out.link = nullptr;
      return true;
    case WrKind::kMessageSend:
      return owner == generation_ % 256 && send_ended(wc, number, out);
    case WrKind::kMessageReceive:
      return owner == generation_ % 256 && message_piece(wc, number, out);
  }
  return false;
}

void VerbsNic::immediate_through(uint32_t qp_number) {
  if (qp_number != last_qp_ || !last_link_) {
    last_qp_ = qp_number;
    last_link_ = link_of(qp_number);
    if (!last_link_) return;
  }
  ++last_link_->landed_;
}

VerbsLink* VerbsNic::link_of(uint32_t qp_number) {
  const auto found = by_qp_.find(qp_number);
  return found == by_qp_.end() ? nullptr : found->second;
}

void VerbsNic::note_ready(VerbsLink& link) {
  if (link.in_ready_) return;
  link.in_ready_ = true;
  ready_.push_back(&link);
}

size_t VerbsNic::hand_out(std::span<Completion> out) {
  size_t filled = 0;
  while (!ready_.empty() && filled < out.size()) {
    VerbsLink* link = ready_.back();
    filled += link->hand_out(out.subspan(filled));
    if (link->handed_ < link->done_) break;
    link->in_ready_ = false;
    ready_.pop_back();
  }
  return filled;
}

void VerbsNic::drain() {
  Completion completions[kBatch];
  // Peers may be adding to the queue all the while, but no further than the receive WRs that are posted.
  for (size_t rounds = cq_room_ / kBatch + 2; rounds > 0; --rounds) {
    size_t polled = 0;
    const size_t filled = pull(completions, &polled);
    for (size_t i = 0; i < filled; ++i) hold(completions[i]);
    if (polled < kBatch) return;
  }
}

void VerbsNic::advance_ends() {
  const auto links = closing_;
  for (VerbsLink* link : links) link->advance_end();
}

void VerbsNic::hold(const Completion& completion) {
  held_.push_back({completion, {}});
  if (completion.kind == Completion::kMessage) {
    held_.back().message.assign(completion.data.begin(), completion.data.end());
  }
}

void VerbsNic::refill() {
  while (receives_missing_ > 0) {
    const size_t count = std::min<size_t>(receives_missing_, kChain);
    ibv_recv_wr& last = receive_wrs_[count - 1];
    ibv_recv_wr* const next = std::exchange(last.next, nullptr);
    ibv_recv_wr* bad = nullptr;
    const int error = ibv_post_srq_recv(srq_.get(), receive_wrs_.data(), &bad);
    last.next = next;
    if (error != 0) {
      const bool ours = bad >= receive_wrs_.data() && bad < receive_wrs_.data() + count;
      receives_missing_ -= ours ? static_cast<uint32_t>(bad - receive_wrs_.data()) : 0;
      return;
    }
    receives_missing_ -= static_cast<uint32_t>(count);
  }
}

void VerbsNic::look_at_events() {
  const VerbsApi& api = verbs_api();
  ibv_async_event event{};
  while (api.get_async_event(port_.context.get(), &event) == 0) {
    const auto link = std::find_if(links_.begin(), links_.end(), [&](const VerbsLink* one) {
      return one && one->qp_ && one->qp_.get() == event.element.qp;
    });
    switch (event.event_type) {
      case IBV_EVENT_QP_LAST_WQE_REACHED:
        if (link != links_.end()) (*link)->broken_ = (*link)->last_receive_ = true;
        break;
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        if (link != links_.end()) (*link)->broken_ = true;
        if (event.element.qp == message_qp_.get()) messages_broken_ = true;
        break;
      case IBV_EVENT_CQ_ERR:
      case IBV_EVENT_DEVICE_FATAL:
        for (VerbsLink* one : links_) {
          if (one) one->broken_ = true;
        }
        break;
      default:  // a port that goes down: queue pairs survive a short loss, and tell of a long one themselves
        break;
    }
    api.ack_async_event(&event);
  }
}

void VerbsNic::drain_notifications() {
  const VerbsApi& api = verbs_api();
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  while (api.get_cq_event(channel_.get(), &cq, &context) == 0) {
    armed_ = false;
    if (++unacknowledged_ == kAcknowledgeAtOnce) {
      api.ack_cq_events(cq_.get(), unacknowledged_);
      unacknowledged_ = 0;
    }
  }
}

bool VerbsNic::arm() {
  std::lock_guard lock(mutex_);
  look_at_events();
  drain_notifications();
  if (!held_.empty() || !ready_.empty() || messages_broken_) return false;
  if (receives_missing_ > 0) refill();
  if (!used_receives_.empty()) recycle_receives();
  if (!armed_) {
    if (ibv_req_notify_cq(cq_.get(), 0) != 0) return false;
    armed_ = true;
  }
  // What came in before the request was heard would wake nobody.
  drain();
  return held_.empty() && ready_.empty();
}

void VerbsNic::disarm() {
  std::lock_guard lock(mutex_);
  drain_notifications();
  look_at_events();
}

}  // namespace railwire
