// The control endpoint: a UD queue pair that takes messages from anyone who knows its address.
//
// A datagram holds one packet, a message may be longer: it travels in pieces. A piece may be lost, and then its message
// is; the engine repeats what must arrive. Everything here comes from the network and is checked.
#include <algorithm>
#include <cstring>
#include <random>

#include "nic/verbs_internal.h"

namespace railwire {
namespace {

constexpr size_t kGrhBytes = 40;  // room that every datagram's buffer has before the payload
constexpr uint32_t kGenerations = 256;

}  // namespace

void VerbsNic::open_messages() {
  const VerbsApi& api = verbs_api();
  std::random_device random;
  qkey_ = random() & 0x7fffffff;  // the top bit would mean: use the queue pair's own
  sender_ = uint64_t{random()} << 32 | random();
  next_message_ = random();
  payload_ = port_.mtu - static_cast<uint32_t>(sizeof(PieceHeader));
  info_.max_message_bytes = std::min(kLongestMessage, kSends / 2 * payload_);
  receive_stride_ = (kGrhBytes + port_.mtu + 63) / 64 * 64;
  receive_bytes_.resize(kReceives * receive_stride_);
  send_bytes_.resize(size_t{kSends} * port_.mtu);
  receive_mr_.reset(api.reg_mr(pd_.get(), receive_bytes_.data(), receive_bytes_.size(), IBV_ACCESS_LOCAL_WRITE));
  if (!receive_mr_) throw NicError(prefix() + registration_problem(errno, receive_bytes_.size()));
  send_mr_.reset(api.reg_mr(pd_.get(), send_bytes_.data(), send_bytes_.size(), 0));
  if (!send_mr_) throw NicError(prefix() + registration_problem(errno, send_bytes_.size()));

  ibv_qp_init_attr attributes{};
  attributes.send_cq = attributes.recv_cq = cq_.get();
  attributes.qp_type = IBV_QPT_UD;
  attributes.cap.max_send_wr = kSends;
  attributes.cap.max_recv_wr = kReceives;
  attributes.cap.max_send_sge = attributes.cap.max_recv_sge = 1;
  message_qp_.reset(api.create_qp(pd_.get(), &attributes));
  if (!message_qp_) {
    throw NicError(prefix() + "creating a UD queue pair on " + port_.device + ": " + registration_problem(errno, 0));
  }
  ready_messages();
}

// The queue pair keeps its number through RESET, so peers need not learn a new address when it has failed.
void VerbsNic::ready_messages() {
  const VerbsApi& api = verbs_api();
  const auto step = [&](ibv_qp_attr attributes, int mask, const char* state) {
    if (const int error = api.modify_qp(message_qp_.get(), &attributes, mask)) {
      throw NicError(prefix() + "moving the UD queue pair of " + port_.device + " to " + state + ": " +
                     errno_text(error));
    }
  };
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RESET;
  if (generation_ > 0) step(attributes, IBV_QP_STATE, "RESET");
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = port_.port;
  attributes.pkey_index = static_cast<uint16_t>(spec_.pkey_index);
  attributes.qkey = qkey_;
  step(attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY, "INIT");
  // RESET has forgotten all that was posted, without a word.
  ++generation_;
  free_sends_.clear();
  for (uint32_t i = 0; i < kSends; ++i) free_sends_.push_back(kSends - 1 - i);
  used_receives_.clear();
  for (uint32_t i = 0; i < kReceives; ++i) {
    if (std::find(lent_receives_.begin(), lent_receives_.end(), i) == lent_receives_.end()) used_receives_.push_back(i);
  }
  recycle_receives();
  attributes.qp_state = IBV_QPS_RTR;
  step(attributes, IBV_QP_STATE, "RTR");
  attributes.qp_state = IBV_QPS_RTS;
  attributes.sq_psn = static_cast<uint32_t>(sender_) & 0xffffff;
  step(attributes, IBV_QP_STATE | IBV_QP_SQ_PSN, "RTS");
  messages_broken_ = false;
}

std::vector<std::byte> VerbsNic::address() const {
  return pack_verbs_address({.ethernet = port_.ethernet,
                             .mtu = static_cast<uint8_t>(mtu_code(port_.mtu)),
                             .qp_number = message_qp_->qp_num,
                             .secret = qkey_,
                             .lid = port_.port_attributes.lid,
                             .gid = port_.gid});
}

uint64_t VerbsNic::resolve(std::span<const std::byte> address) {
  const VerbsAddress remote = unpack_verbs_address(address, prefix());
  check_same_network(remote);
  ibv_ah_attr path = path_to(remote);
  ControlPeer peer;
  peer.route.reset(verbs_api().create_ah(pd_.get(), &path));
  if (!peer.route) {
    throw NicError(prefix() + "no way from " + port_.device + " to a peer: " + errno_text(errno) +
                   "; is its network reachable from GID index " + std::to_string(port_.gid_index) +
                   " (option gid_index)?");
  }
  peer.qp_number = remote.qp_number;
  peer.qkey = remote.secret & 0x7fffffff;
  peer.payload =
      std::min(port_.mtu, mtu_bytes(static_cast<ibv_mtu>(remote.mtu))) - static_cast<uint32_t>(sizeof(PieceHeader));
  std::lock_guard lock(mutex_);
  peers_.emplace(next_peer_, std::move(peer));
  return next_peer_++;
}

void VerbsNic::forget(uint64_t peer) {
  std::lock_guard lock(mutex_);
  peers_.erase(peer);
}

bool VerbsNic::send(uint64_t to, std::span<const std::byte> message, void* context) {
  std::lock_guard lock(mutex_);
  const auto found = peers_.find(to);
  if (found == peers_.end() || message_qp_ == nullptr) return true;
  if (messages_broken_) return false;  // poll() mends it
  const ControlPeer& peer = found->second;
  const size_t pieces = pieces_of(message.size(), peer.payload);
  if (pieces > free_sends_.size()) {
    if (pieces <= kSends) return false;
    return true;  // cannot be: longer than max_message_bytes allows even a peer with the smallest packets
  }
  const uint32_t number = next_message_++;
  for (size_t i = 0; i < pieces; ++i) {
    const uint32_t slot = free_sends_.back();
    std::byte* buffer = send_bytes_.data() + size_t{slot} * port_.mtu;
    const size_t bytes = write_piece(buffer, message, sender_, number, i, peer.payload);
    ibv_sge sge{reinterpret_cast<uint64_t>(buffer), static_cast<uint32_t>(bytes), send_mr_->lkey};
    ibv_send_wr wr{};
    wr.wr_id = make_wr_id(WrKind::kMessageSend, generation_ % kGenerations, slot);
    wr.sg_list = &sge;
    wr.num_sge = 1;
    wr.opcode = IBV_WR_SEND;
    wr.send_flags = IBV_SEND_SIGNALED;
    wr.wr.ud.ah = peer.route.get();
    wr.wr.ud.remote_qpn = peer.qp_number;
    wr.wr.ud.remote_qkey = peer.qkey;
    ibv_send_wr* bad = nullptr;
    if (ibv_post_send(message_qp_.get(), &wr, &bad) != 0) {
      // Lost, as a datagram may be. Whoever must know repeats it.
      messages_broken_ = true;
      hold({.kind = Completion::kSend,
            .status = Status::kUnreachable,
            .provider_error = IBV_WC_LOC_QP_OP_ERR,
            .context = context});
      return true;
    }
    free_sends_.pop_back();
    sends_[slot] = {context, i + 1 == pieces, false};
  }
  return true;
}

bool VerbsNic::post_receive(uint32_t slot) {
  ibv_sge sge{reinterpret_cast<uint64_t>(receive_buffer(slot)), static_cast<uint32_t>(kGrhBytes + port_.mtu),
              receive_mr_->lkey};
  ibv_recv_wr wr{};
  wr.wr_id = make_wr_id(WrKind::kMessageReceive, generation_ % kGenerations, slot);
  wr.sg_list = &sge;
  wr.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  return ibv_post_recv(message_qp_.get(), &wr, &bad) == 0;
}

void VerbsNic::recycle_receives() {
  while (!used_receives_.empty() && post_receive(used_receives_.back())) used_receives_.pop_back();
}

bool VerbsNic::send_ended(const ibv_wc& wc, uint32_t slot, Completion& out) {
  if (slot >= kSends) return false;
  const Send send = std::exchange(sends_[slot], {});
  free_sends_.push_back(slot);
  if (wc.status != IBV_WC_SUCCESS) messages_broken_ = true;
  if (!send.last) return false;
  out = {.kind = Completion::kSend,
         .status = status_of_wc(wc.status),
         .provider_error = wc.status,
         .context = send.context};
  return true;
}

// A piece has come in; true if it makes a message whole.
bool VerbsNic::message_piece(const ibv_wc& wc, uint32_t slot, Completion& out) {
  if (slot >= kReceives) return false;
  if (wc.status != IBV_WC_SUCCESS || wc.byte_len < kGrhBytes || wc.byte_len > kGrhBytes + port_.mtu) {
    used_receives_.push_back(slot);
    if (wc.status != IBV_WC_SUCCESS) messages_broken_ = true;
    return false;
  }
  std::span<const std::byte> message;
  const auto taken = assembler_.take({receive_buffer(slot) + kGrhBytes, wc.byte_len - kGrhBytes}, message);
  (taken == PieceAssembler::kInPlace ? lent_receives_ : used_receives_).push_back(slot);
  if (taken == PieceAssembler::kNothing) return false;
  out = {.kind = Completion::kMessage, .data = message};
  return true;
}

}  // namespace railwire
