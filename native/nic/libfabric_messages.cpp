// Control messages: peers, buffers, sends. Their completions are read in libfabric_poll.cpp.
#include <sys/mman.h>

#include "nic/libfabric_internal.h"

namespace railwire {
namespace {

constexpr size_t kReceives = 64;
constexpr size_t kReceivesOfPieces = 512;
constexpr size_t kReceiveBytes = 64 << 20;  // where writes with immediates use up receives: as many as this holds
constexpr size_t kSends = 512;
constexpr size_t kSendsRegistered = 128;  // where buffers are pinned, and cost real memory

}  // namespace

void LibfabricNic::open_messages() {
  const size_t bytes = piece_payload_ ? piece_payload_ + sizeof(PieceHeader) : info_.max_message_bytes;
  buffer_bytes_ = bytes;
  const bool pinned = (mr_mode_ & FI_MR_LOCAL) != 0;
  const size_t sends = pinned && !piece_payload_ ? kSendsRegistered : kSends;
  size_t receives = piece_payload_ ? kReceivesOfPieces : kReceives;
  if (recv_consumed_by_writes_) receives = std::max(receives, kReceiveBytes / bytes);
  if (const size_t most = fi_->rx_attr->size; most > 0) receives = std::min(receives, std::max(most, size_t{1}));
  arena_bytes_ = (receives + sends) * bytes;
  // Untouched pages cost nothing, and few messages are long.
  void* memory =
      mmap(nullptr, arena_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw NicError(prefix() + "no memory for message buffers");
  arena_ = static_cast<std::byte*>(memory);
  if (pinned) {
    uint64_t key = 0;
    std::memcpy(&key, "messages", sizeof key);
    arena_mr_ = register_range({.address = arena_, .length = arena_bytes_, .key_hint = key});
    if (mr_mode_ & FI_MR_ENDPOINT) {
      check(fi_mr_bind(arena_mr_.get(), &control_.ep->fid, 0), "binding message buffers to the endpoint");
      check(fi_mr_enable(arena_mr_.get()), "enabling message buffers");
    }
    arena_desc_ = fi_mr_desc(arena_mr_.get());
  }
  receives_.resize(receives);
  for (size_t i = 0; i < receives; ++i) {
    receives_[i].kind = OpContext::kReceive;
    receives_[i].buffer = arena_ + i * bytes;
    consumed_.push_back(&receives_[i]);
  }
  sends_.emplace(sends);
  for (size_t i = sends; i-- > 0;) send_buffers_.push_back(arena_ + (receives + i) * bytes);
  post_receives();
  if (consumed_.size() == receives) throw NicError(prefix() + "the provider takes no receive buffers");
  if (recv_consumed_by_writes_) consumed_.clear();  // what it did not take now, it has no room for
}

// What the provider does not take now stays for the next poll().
void LibfabricNic::post_receives() {
  if (gave_up_ != 0) return;
  while (!consumed_.empty()) {
    ReceiveSlot* slot = consumed_.back();
    const ssize_t code = fi_recv(control_.ep.get(), slot->buffer, buffer_bytes_, arena_desc_, FI_ADDR_UNSPEC, slot);
    if (code != 0) return;
    slot->busy = true;
    consumed_.pop_back();
  }
}

uint64_t LibfabricNic::resolve(std::span<const std::byte> blob) {
  std::lock_guard lock(mutex_);
  return take_peer(blob);
}

void LibfabricNic::forget(uint64_t handle) {
  std::lock_guard lock(mutex_);
  let_peer_go(handle);
}

uint64_t LibfabricNic::take_peer(std::span<const std::byte> blob) {
  const EndpointAddress address = unpack(blob);
  std::unique_ptr<ControlPeer>& peer = peers_[address.name];
  if (!peer) {
    auto made = std::make_unique<ControlPeer>();
    made->name = address.name;
    try {
      made->bell = bell_of(address.wakeup);
      made->address = insert(control_.av.get(), address);
    } catch (...) {
      peers_.erase(address.name);
      made.reset();
      refresh_bells();
      throw;
    }
    peer = std::move(made);
  }
  ++peer->references;
  return reinterpret_cast<uint64_t>(peer.get());
}

void LibfabricNic::let_peer_go(uint64_t handle) {
  auto* peer = reinterpret_cast<ControlPeer*>(handle);
  --peer->references;
  release_peer(peer);
}

// An address must not go while sends to it are under way: some providers still look at it.
void LibfabricNic::release_peer(ControlPeer* peer) {
  if (peer->references > 0 || peer->outstanding > 0) return;
  fi_av_remove(control_.av.get(), &peer->address, 1, 0);
  const std::string name = peer->name;
  peers_.erase(name);
  if (wakeup_) refresh_bells();
}

bool LibfabricNic::send(uint64_t handle, std::span<const std::byte> message, void* context) {
  std::lock_guard lock(mutex_);
  if (message.size() > info_.max_message_bytes) return false;
  if (gave_up_ != 0) {
    hold({.kind = Completion::kSend, .status = Status::kUnreachable, .provider_error = gave_up_, .context = context});
    return true;
  }
  if (!unsent_.empty()) post_unsent();
  const size_t pieces = piece_payload_ ? pieces_of(message.size(), piece_payload_) : 1;
  if (!unsent_.empty() || send_buffers_.size() < pieces) return false;
  auto* peer = reinterpret_cast<ControlPeer*>(handle);
  auto group = pieces > 1 ? std::make_shared<SendGroup>(SendGroup{pieces, 0}) : nullptr;
  const uint32_t number = next_message_++;
  for (size_t i = 0; i < pieces; ++i) {
    SendSlot* slot = sends_->take();  // there are as many as there are buffers
    slot->kind = OpContext::kSend;
    slot->context = context;
    slot->peer = peer;
    slot->buffer = send_buffers_.back();
    slot->length = message.size();
    slot->group = group;
    send_buffers_.pop_back();
    ++peer->outstanding;
    if (piece_payload_) {
      slot->length = write_piece(slot->buffer, message, sender_, number, i, piece_payload_);
    } else if (!message.empty()) {
      std::memcpy(slot->buffer, message.data(), message.size());
    }
    unsent_.push_back(slot);
  }
  post_unsent();
  if (peer->bell) ring(*peer->bell);
  if (pieces > 1 || unsent_.empty()) return true;
  // Nothing of it has gone out: its caller tries again.
  SendSlot* slot = unsent_.front();
  unsent_.clear();
  send_buffers_.push_back(slot->buffer);
  --peer->outstanding;
  sends_->give_back(slot);
  starved();
  return false;
}

void LibfabricNic::post_unsent() {
  while (!unsent_.empty() && gave_up_ == 0) {
    SendSlot* slot = unsent_.front();
    const ssize_t code = fi_send(control_.ep.get(), slot->buffer, slot->length, arena_desc_, slot->peer->address, slot);
    if (code == -FI_EAGAIN) return;
    unsent_.pop_front();
    if (code == 0) continue;
    Completion end;
    if (send_ended(slot, static_cast<int>(-code), end)) hold(end);
  }
}

// True if its message has ended with it.
bool LibfabricNic::send_ended(SendSlot* slot, int error, Completion& out) {
  const auto group = std::move(slot->group);
  out.kind = Completion::kSend;
  out.context = slot->context;
  out.link = nullptr;
  send_buffers_.push_back(slot->buffer);
  ControlPeer* peer = slot->peer;
  sends_->give_back(slot);
  --peer->outstanding;
  if (peer->references == 0) release_peer(peer);
  if (group) {
    if (error != 0) group->error = error;
    if (--group->left > 0) return false;
    error = group->error;
  }
  out.provider_error = error;
  out.status = status_of_libfabric(error);
  return true;
}

}  // namespace railwire
