// Control messages: peers, buffers, sends. Their completions are read in libfabric_poll.cpp.
#include <sys/mman.h>

#include "nic/libfabric_internal.h"

namespace railwire {
namespace {

constexpr size_t kReceives = 64;
constexpr size_t kSends = 512;
constexpr size_t kSendsRegistered = 128;  // where buffers are pinned, and cost real memory

}  // namespace

void LibfabricNic::open_messages() {
  const size_t bytes = info_.max_message_bytes;
  const bool pinned = (mr_mode_ & FI_MR_LOCAL) != 0;
  const size_t sends = pinned ? kSendsRegistered : kSends;
  arena_bytes_ = (kReceives + sends) * bytes;
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
  receives_.resize(kReceives);
  for (size_t i = 0; i < kReceives; ++i) {
    receives_[i].kind = OpContext::kReceive;
    receives_[i].buffer = arena_ + i * bytes;
    consumed_.push_back(&receives_[i]);
  }
  sends_.emplace(sends);
  for (size_t i = sends; i-- > 0;) send_buffers_.push_back(arena_ + (kReceives + i) * bytes);
  post_receives();
  if (consumed_.size() == kReceives) throw NicError(prefix() + "the provider takes no receive buffers");
}

// What the provider does not take now stays for the next poll().
void LibfabricNic::post_receives() {
  while (!consumed_.empty()) {
    ReceiveSlot* slot = consumed_.back();
    const ssize_t code =
        fi_recv(control_.ep.get(), slot->buffer, info_.max_message_bytes, arena_desc_, FI_ADDR_UNSPEC, slot);
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
  if (message.size() > info_.max_message_bytes || send_buffers_.empty()) return false;
  auto* peer = reinterpret_cast<ControlPeer*>(handle);
  SendSlot* slot = sends_->take();
  if (!slot) return false;
  slot->kind = OpContext::kSend;
  slot->context = context;
  slot->peer = peer;
  slot->buffer = send_buffers_.back();
  if (!message.empty()) std::memcpy(slot->buffer, message.data(), message.size());
  const ssize_t code = fi_send(control_.ep.get(), slot->buffer, message.size(), arena_desc_, peer->address, slot);
  if (code == -FI_EAGAIN) {
    sends_->give_back(slot);
    starved();
    if (peer->bell) ring(*peer->bell);
    return false;
  }
  if (code != 0) {
    sends_->give_back(slot);
    hold({.kind = Completion::kSend,
          .status = status_of_libfabric(static_cast<int>(-code)),
          .provider_error = static_cast<int32_t>(-code),
          .context = context});
    return true;
  }
  send_buffers_.pop_back();
  ++peer->outstanding;
  if (peer->bell) ring(*peer->bell);
  return true;
}

}  // namespace railwire
