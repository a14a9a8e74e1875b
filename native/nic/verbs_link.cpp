// Links: RC queue pairs, their states, posting in chains, and taking everything back.
#include <time.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "nic/verbs_internal.h"

namespace railwire {
namespace {

constexpr int64_t kFlushWithin = 2'000'000'000;     // ns; a queue pair in ERR hands its WRs back at once
constexpr int64_t kLastReceiveWithin = 50'000'000;  // the device's word that no more receive WRs are taken
constexpr uint8_t kReadDepth = 16;
constexpr uint8_t kRnrTimer = 12;  // 0.64 ms between tries while the peer's receive queue is empty

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

uint8_t read_depth(int device) { return static_cast<uint8_t>(std::clamp(device, 1, int{kReadDepth})); }

}  // namespace

std::unique_ptr<Link> VerbsNic::create_link() {
  std::lock_guard lock(setup_mutex_);
  reserve_completions(links_open_ + 1);
  return std::make_unique<VerbsLink>(*this);
}

VerbsLink::VerbsLink(VerbsNic& nic) : nic_(nic) {
  const VerbsApi& api = verbs_api();
  const uint32_t depth = nic_.info_.link_depth;
  ibv_qp_init_attr attributes{};
  attributes.send_cq = attributes.recv_cq = nic_.cq_.get();
  attributes.srq = nic_.srq_.get();
  attributes.qp_type = IBV_QPT_RC;
  attributes.cap.max_send_wr = depth;
  attributes.cap.max_send_sge = 1;
  attributes.cap.max_inline_data = nic_.spec_.max_inline;
  qp_.reset(api.create_qp(nic_.pd_.get(), &attributes));
  if (!qp_ && attributes.cap.max_inline_data > 0) {  // a device may have none
    attributes.cap.max_inline_data = 0;
    qp_.reset(api.create_qp(nic_.pd_.get(), &attributes));
  }
  if (!qp_) {
    throw NicError(nic_.prefix() + "creating an RC queue pair of depth " + std::to_string(depth) + " on " +
                   nic_.port_.device + ": " + registration_problem(errno, 0) + "; option link_depth makes it smaller");
  }
  max_inline_ = std::min(attributes.cap.max_inline_data, nic_.spec_.max_inline);
  ibv_qp_attr init{};
  init.qp_state = IBV_QPS_INIT;
  init.port_num = nic_.port_.port;
  init.pkey_index = static_cast<uint16_t>(nic_.spec_.pkey_index);
  init.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  if (const int error =
          api.modify_qp(qp_.get(), &init, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)) {
    throw NicError(nic_.prefix() + "initialising a queue pair of " + nic_.port_.device + ": " + errno_text(error));
  }
  // Late packets of an earlier connection must not fit into this one.
  std::random_device random;
  first_packet_ = random() & 0xffffff;
  size_t ring = 1;
  while (ring < depth) ring *= 2;
  slots_.resize(ring);
  // Often enough that the queue never waits for a completion that is not asked for; the end of a chain always asks.
  signal_every_ = std::clamp(depth / 4, 1u, 32u);
  std::lock_guard lock(nic_.mutex_);
  const auto free = std::find(nic_.links_.begin(), nic_.links_.end(), nullptr);
  id_ = static_cast<uint32_t>(free - nic_.links_.begin());
  if (free == nic_.links_.end()) {
    nic_.links_.push_back(this);
  } else {
    *free = this;
  }
  ++nic_.links_open_;
  qp_number_ = qp_->qp_num;
  nic_.by_qp_[qp_number_] = this;
}

VerbsLink::~VerbsLink() {
  if (abandoned_) return;
  finish_end();
  std::lock_guard lock(nic_.mutex_);
  std::erase(nic_.ready_, this);
  nic_.links_[id_] = nullptr;
  --nic_.links_open_;
}

std::vector<std::byte> VerbsLink::address() const {
  return pack_verbs_address({.ethernet = nic_.port_.ethernet,
                             .mtu = static_cast<uint8_t>(mtu_code(nic_.port_.mtu)),
                             .read_depth = read_depth(nic_.port_.device_attributes.max_qp_rd_atom),
                             .qp_number = qp_number_,
                             .secret = first_packet_,
                             .lid = nic_.port_.port_attributes.lid,
                             .gid = nic_.port_.gid});
}

void VerbsLink::connect(std::span<const std::byte> remote_address) {
  const VerbsApi& api = verbs_api();
  if (closed_) throw NicError(nic_.prefix() + "the link is closed");
  if (connected_) throw NicError(nic_.prefix() + "the link is connected already");
  const VerbsAddress remote = unpack_verbs_address(remote_address, nic_.prefix());
  nic_.check_same_network(remote);
  const std::string what = "connecting a queue pair of " + nic_.port_.device;
  ibv_qp_attr receive{};
  receive.qp_state = IBV_QPS_RTR;
  receive.path_mtu = mtu_code(std::min(nic_.port_.mtu, mtu_bytes(static_cast<ibv_mtu>(remote.mtu))));
  receive.dest_qp_num = remote.qp_number;
  receive.rq_psn = remote.secret & 0xffffff;
  receive.max_dest_rd_atomic = read_depth(nic_.port_.device_attributes.max_qp_rd_atom);
  receive.min_rnr_timer = kRnrTimer;
  receive.ah_attr = nic_.path_to(remote);
  if (const int error = api.modify_qp(qp_.get(), &receive,
                                      IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                          IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)) {
    throw NicError(nic_.prefix() + what + ": " + errno_text(error) +
                   "; is the peer's network reachable from this port (GID index " +
                   std::to_string(nic_.port_.gid_index) + ", option gid_index)?");
  }
  ibv_qp_attr send{};
  send.qp_state = IBV_QPS_RTS;
  send.timeout = static_cast<uint8_t>(nic_.spec_.timeout);
  send.retry_cnt = static_cast<uint8_t>(nic_.spec_.retry_count);
  send.rnr_retry = static_cast<uint8_t>(nic_.spec_.rnr_retry);
  send.sq_psn = first_packet_;
  send.max_rd_atomic = std::min(read_depth(nic_.port_.device_attributes.max_qp_init_rd_atom),
                                static_cast<uint8_t>(std::clamp(int{remote.read_depth}, 1, int{kReadDepth})));
  if (const int error = api.modify_qp(qp_.get(), &send,
                                      IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                          IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC)) {
    throw NicError(nic_.prefix() + what + ": " + errno_text(error));
  }
  connected_ = true;
}

void VerbsLink::fill(ibv_send_wr& wr, ibv_sge& sge, const WorkRequest& request, uint32_t number) {
  const auto* memory = static_cast<const VerbsMemory*>(request.local_key);
  wr.wr_id = make_wr_id(WrKind::kLink, id_, number);
  wr.num_sge = request.length > 0;
  wr.send_flags = 0;
  wr.wr.rdma.remote_addr = request.remote;
  wr.wr.rdma.rkey = static_cast<uint32_t>(request.rkey);
  sge.addr = reinterpret_cast<uint64_t>(request.local);
  sge.length = static_cast<uint32_t>(request.length);
  sge.lkey = memory ? memory->lkey : 0;
  if (request.flags & WorkRequest::kRead) {
    wr.opcode = IBV_WR_RDMA_READ;
    return;
  }
  if (request.flags & WorkRequest::kImmediate) {
    wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    wr.imm_data = __builtin_bswap32(request.immediate);
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "immediates travel in network order");
  } else {
    wr.opcode = IBV_WR_RDMA_WRITE;
  }
  if (request.length <= max_inline_ && memory && memory->host) wr.send_flags = IBV_SEND_INLINE;
}

size_t VerbsLink::post(std::span<const WorkRequest> batch) {
  size_t taken = 0;
  while (taken < batch.size() && connected_ && !broken_) {
    const size_t room = nic_.info_.link_depth - std::min<size_t>(outstanding(), nic_.info_.link_depth);
    const size_t wanted = std::min({batch.size() - taken, room, VerbsNic::kChain});
    if (wanted == 0) break;
    const size_t posted = post_chain(batch.subspan(taken, wanted));
    taken += posted;
    if (posted < wanted) break;
  }
  return taken;
}

// One doorbell.
size_t VerbsLink::post_chain(std::span<const WorkRequest> chain) {
  const size_t mask = slots_.size() - 1;
  auto number = static_cast<uint32_t>(posted_);
  uint32_t unsignalled = 0;
  for (size_t i = 0; i < chain.size(); ++i, ++number) {
    fill(nic_.wrs_[i], nic_.sges_[i], chain[i], number);
    if (++unsignalled == signal_every_) {
      nic_.wrs_[i].send_flags |= IBV_SEND_SIGNALED;
      unsignalled = 0;
    }
  }
  ibv_send_wr& last = nic_.wrs_[chain.size() - 1];
  last.send_flags |= IBV_SEND_SIGNALED;
  ibv_send_wr* const next = std::exchange(last.next, nullptr);
  ibv_send_wr* bad = nullptr;
  const int error = ibv_post_send(qp_.get(), nic_.wrs_.data(), &bad);
  last.next = next;
  // Nobody looks at the queue before we return: what is to be known when a WR is back can be written while it travels.
  number = static_cast<uint32_t>(posted_);
  for (const WorkRequest& request : chain) {
    Slot& slot = slots_[number++ & mask];
    slot.request = request;
    slot.wc_status = IBV_WC_SUCCESS;
  }
  if (error == 0) [[likely]] {
    posted_ += chain.size();
    return chain.size();
  }
  // The queue has room by our own count, so this is no back-pressure. What was taken may end in a WR that nobody would
  // hear of: closing the link brings it back.
  broken_ = true;
  const size_t taken = bad >= nic_.wrs_.data() && bad < nic_.wrs_.data() + chain.size()
                           ? static_cast<size_t>(bad - nic_.wrs_.data())
                           : 0;
  posted_ += taken;
  return taken;
}

// WR `number` is back, and with it all before it that were not signalled.
void VerbsLink::ended(uint32_t number, int wc_status) {
  const uint64_t at = done_ + static_cast<uint32_t>(number - static_cast<uint32_t>(done_));
  if (at >= posted_) return;  // no WR of ours
  if (wc_status != IBV_WC_SUCCESS) {
    slots_[at & (slots_.size() - 1)].wc_status = wc_status;
    broken_ = true;  // the first error moves an RC queue pair to ERR
  }
  done_ = at + 1;
  nic_.note_ready(*this);
}

size_t VerbsLink::hand_out(std::span<Completion> out) {
  const size_t mask = slots_.size() - 1;
  size_t n = 0;
  for (; n < out.size() && handed_ < done_; ++n, ++handed_) {
    const Slot& slot = slots_[handed_ & mask];
    Completion& completion = out[n];
    completion.kind = Completion::kWorkRequest;
    completion.context = slot.request.context;
    completion.link = this;
    completion.provider_error = slot.wc_status;
    if (slot.wc_status == IBV_WC_SUCCESS) [[likely]] {
      completion.status = Status::kOk;
      completion.request = nullptr;
      completed_ += (slot.request.flags & WorkRequest::kImmediate) != 0;
    } else {
      completion.status = status_of_wc(slot.wc_status);
      completion.request = &slot.request;
    }
  }
  return n;
}

// ERR takes back what is posted and refuses what the peer still sends. That, and the queue pair's end, may take a
// device long, so a thread of the NIC's own makes these calls; what comes back meanwhile is taken off the queue by
// poll().
void VerbsLink::close() {
  std::lock_guard lock(nic_.mutex_);
  if (closed_) return;
  closed_ = true;
  broken_.store(true, std::memory_order_relaxed);
  nic_.closing_.push_back(this);
  if (!nic_.closer_.push([this] { begin_end(); })) begin_end_locked(false);
}

void VerbsLink::begin_end() {
  ibv_qp_attr error_state{};
  error_state.qp_state = IBV_QPS_ERR;
  const bool in_error = verbs_api().modify_qp(qp_.get(), &error_state, IBV_QP_STATE) == 0;
  std::lock_guard lock(nic_.mutex_);
  begin_end_locked(in_error);
}

void VerbsLink::begin_end_locked(bool in_error) {
  end_ = End::kFlushing;
  end_since_ = in_error ? now_ns() : 0;  // nothing comes back of a queue pair that could not be moved
}

// Of a link that is being closed: one step further, if there is one. The NIC's mutex is held, and the completion queue
// has just been found empty.
void VerbsLink::advance_end() {
  if (end_ == End::kFlushing) {
    const int64_t passed = now_ns() - end_since_;
    const bool flushed = done_ == posted_ || passed > kFlushWithin;
    // Some providers throw a queue pair's completions away when it is destroyed: the last must be out before.
    const bool last = !nic_.port_.hardware || !connected_ || last_receive_ || passed > kLastReceiveWithin;
    if (!flushed || !last) return;
    end_ = End::kDestroying;
    // Where the NIC ends, too, its thread may have ended before.
    if (!nic_.closer_.push([this] { destroy(); })) {
      qp_.reset();
      end_ = End::kDestroyed;
    }
  }
  if (end_ != End::kDestroyed) return;
  end_ = End::kOver;
  if (nic_.link_of(qp_number_) == this) nic_.by_qp_.erase(qp_number_);  // a new one may have the number by now
  if (nic_.last_link_ == this) nic_.last_link_ = nullptr;
  for (; done_ < posted_; ++done_) slots_[done_ & (slots_.size() - 1)].wc_status = IBV_WC_WR_FLUSH_ERR;
  if (handed_ < done_) nic_.note_ready(*this);
  std::erase(nic_.closing_, this);
  shut_.store(true, std::memory_order_release);
}

void VerbsLink::destroy() {
  QpOwner gone;
  {
    std::lock_guard lock(nic_.mutex_);
    gone = std::move(qp_);
  }
  gone.reset();  // now no packet can touch our memory, nor any completion be made
  std::lock_guard lock(nic_.mutex_);
  end_ = End::kDestroyed;
}

// For who frees a link, or the NIC, and cannot leave it to poll(). What has posted is freed when nobody posts any more.
void VerbsLink::finish_end() {
  close();
  while (!shut()) {
    {
      std::lock_guard lock(nic_.mutex_);
      nic_.look_at_events();
      if (posted_ > 0) nic_.drain();
      advance_end();
    }
    if (!shut()) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

}  // namespace railwire
