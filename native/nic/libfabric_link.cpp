// Links: posting work requests, and taking them back.
#include <algorithm>

#include "nic/libfabric_internal.h"

namespace railwire {

std::unique_ptr<Link> LibfabricNic::create_link() {
  std::lock_guard lock(mutex_);
  if (gave_up_ != 0) throw NicError(failure());
  return std::make_unique<LibfabricLink>(*this);
}

LibfabricLink::LibfabricLink(LibfabricNic& nic)
    : nic_(nic), slots_(std::make_unique<SlotPool<WrSlot>>(nic.info_.link_depth)) {
  if (nic_.own_endpoint_) {
    own_ = nic_.open_endpoint(nic_.link_fi_.get());
    ep_ = own_.ep.get();
    name_ = nic_.endpoint_name(ep_);
  } else {
    ep_ = nic_.control_.ep.get();
    name_ = nic_.control_name_;
  }
  nic_.links_.push_back(this);
}

LibfabricLink::~LibfabricLink() {
  std::lock_guard lock(nic_.mutex_);
  close_locked();
  nic_.drop_held(this);
  std::erase(nic_.links_, this);
  if (in_provider_ == 0 && peer_ != 0) nic_.let_peer_go(peer_);
  if (in_provider_ > 0) {
    // Only where links share an endpoint, and only if the owner did not wait: the provider still writes there.
    slots_->for_each_busy([](WrSlot& slot) { slot.link = nullptr; });
    nic_.orphans_.push_back(std::move(slots_));
  }
}

std::vector<std::byte> LibfabricLink::address() const { return nic_.pack(name_); }

void LibfabricLink::connect(std::span<const std::byte> remote_address) {
  std::lock_guard lock(nic_.mutex_);
  if (closed_) throw NicError(nic_.prefix() + "the link is closed");
  if (remote_ != FI_ADDR_UNSPEC) throw NicError(nic_.prefix() + "the link is connected already");
  if (nic_.own_endpoint_) {
    const EndpointAddress address = nic_.unpack(remote_address);
    bell_ = nic_.bell_of(address.wakeup);
    remote_ = nic_.insert(own_.av.get(), address);
  } else {
    peer_ = nic_.take_peer(remote_address);
    remote_ = reinterpret_cast<ControlPeer*>(peer_)->address;
  }
}

// The plain calls are a little faster than fi_writemsg, which only a flush needs, for its flag.
ssize_t LibfabricLink::post_one(const WorkRequest& wr, WrSlot* slot) {
  void* local = wr.local;
  void* key = wr.local_key;
  if (wr.length == 0 && !key) {
    // A bare immediate. efa-direct wants a descriptor all the same: 2.0 and 2.1 crash without, 2.2 to 2.4 refuse.
    local = nic_.arena_;
    key = nic_.arena_desc_;
  }
  if (wr.flags & WorkRequest::kFlush) [[unlikely]] {
    const iovec source{local, wr.length};
    const fi_rma_iov remote{wr.remote, wr.length, wr.rkey};
    const fi_msg_rma message{&source, &key, 1, remote_, &remote, 1, slot, wr.immediate};
    const uint64_t immediate = wr.flags & WorkRequest::kImmediate ? FI_REMOTE_CQ_DATA : 0;
    return fi_writemsg(ep_, &message, FI_COMPLETION | FI_DELIVERY_COMPLETE | immediate);
  }
  if (wr.flags & WorkRequest::kImmediate) {
    return fi_writedata(ep_, local, wr.length, key, wr.immediate, remote_, wr.remote, wr.rkey, slot);
  }
  if (wr.flags & WorkRequest::kRead) {
    return fi_read(ep_, local, wr.length, key, remote_, wr.remote, wr.rkey, slot);
  }
  return fi_write(ep_, local, wr.length, key, remote_, wr.remote, wr.rkey, slot);
}

// How many WRs it may post now. One send queue serves all peers: whoever has less in it than is free may post, so a
// peer that has died leaves half to the others, two leave a third, and so on.
size_t LibfabricLink::room() const {
  if (nic_.send_queue_ == 0) return SIZE_MAX;
  const size_t free = nic_.send_queue_ - std::min(nic_.in_send_queue_, nic_.send_queue_);
  return free > in_provider_ ? (free - in_provider_ + 1) / 2 : 0;
}

// All that the provider held is back: its endpoint is gone.
void LibfabricLink::take_back(Status status, int error) {
  slots_->for_each_busy([&](WrSlot& slot) {
    slots_->give_back(&slot);
    --in_provider_;
    --outstanding_;  // hold() counts it again
    nic_.hold({.kind = Completion::kWorkRequest,
               .status = status,
               .provider_error = error,
               .context = slot.context,
               .link = this});
  });
}

size_t LibfabricLink::post(std::span<const WorkRequest> batch) {
  std::lock_guard lock(nic_.mutex_);
  if (broken_ || remote_ == FI_ADDR_UNSPEC) return 0;
  size_t taken = 0;
  bool starved = false;
  if (const size_t most = room(); most < batch.size()) batch = batch.first(most);
  for (const WorkRequest& wr : batch) {
    WrSlot* slot = slots_->take();
    if (!slot) break;
    slot->context = wr.context;
    slot->link = this;
    const ssize_t code = post_one(wr, slot);
    if (code == 0) [[likely]] {
      ++taken;
      continue;
    }
    slots_->give_back(slot);
    if (code != -FI_EAGAIN) {
      // Its owner hears of it as of any other WR that failed. Nothing can be said of the link any more.
      broken_ = true;
      nic_.hold({.kind = Completion::kWorkRequest,
                 .status = status_of_libfabric(static_cast<int>(-code)),
                 .provider_error = static_cast<int32_t>(-code),
                 .context = wr.context,
                 .link = this});
      in_provider_ += taken;
      outstanding_ += taken;
      if (!nic_.own_endpoint_) nic_.in_send_queue_ += taken;
      return taken + 1;
    }
    starved = in_provider_ + taken == 0;
    break;
  }
  in_provider_ += taken;
  outstanding_ += taken;
  if (!nic_.own_endpoint_) nic_.in_send_queue_ += taken;
  if (starved) nic_.starved();
  if (bell_ && (taken > 0 || starved)) nic_.ring(*bell_);
  return taken;
}

void LibfabricLink::close() {
  std::lock_guard lock(nic_.mutex_);
  close_locked();
}

void LibfabricLink::close_locked() {
  if (closed_) return;
  closed_ = broken_ = true;
  closed_at_ = LibfabricNic::now_ns();
  if (nic_.own_endpoint_) {
    own_.ep.reset();
    ep_ = nullptr;
    // What ended before the endpoint did is in the queue; peers may be adding to it all the while.
    nic_.drain(4 * nic_.cq_size_);
    take_back(Status::kFlushed, 0);
    own_.av.reset();
  }
  remote_ = FI_ADDR_UNSPEC;
  bell_.reset();
  if (nic_.wakeup_) nic_.refresh_bells();
}

}  // namespace railwire
