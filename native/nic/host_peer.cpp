// NICs that we talk to: dialling them, whether we may copy to their process, messages and packets to them.
#include <poll.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/host_internal.h"

namespace railwire {
namespace {

constexpr int kDialPatience = 1000;  // ms that a listener's queue may stay full

HostAddress parse(std::span<const std::byte> blob, uint64_t own_kernel) {
  HostAddress address;
  if (blob.size() < 6) throw NicError("shm: malformed address of a peer");
  std::memcpy(&address, blob.data(), std::min(blob.size(), sizeof address));
  if (address.magic != kHostMagic) throw NicError("shm: malformed address of a peer");
  if (address.version != kHostVersion) {
    throw NicError("shm: the peer's shm NIC speaks version " + std::to_string(address.version) + ", ours " +
                   std::to_string(kHostVersion) + ": use the same railwire on both sides");
  }
  if (blob.size() != sizeof address) throw NicError("shm: malformed address of a peer");
  if (address.kernel != own_kernel) throw NicError("shm: the peer runs on another host; use tcp between them");
  return address;
}

}  // namespace

std::shared_ptr<HostPeer> HostNic::dial(const HostAddress& address) const {
  const std::string who = "shm: the peer (process " + std::to_string(address.pid) + " in its own numbering)";
  auto peer = std::make_shared<HostPeer>();
  peer->name = address.name;
  const int error = HostSocket::dial("railwire-shm-" + to_hex(address.name), kDialPatience, &peer->socket);
  if (error == ECONNREFUSED) {
    throw NicError(who +
                   " cannot be reached: it has ended, or is in another network namespace (containers: "
                   "share one, or use tcp)");
  }
  if (error != 0) throw NicError(who + " cannot be reached: " + std::strerror(error));
  const PeerCredentials credentials = peer->socket.credentials();
  if (credentials.uid != geteuid()) {
    throw NicError(who + " belongs to user " + std::to_string(credentials.uid) + ", this process to user " +
                   std::to_string(geteuid()) + "; use tcp between them");
  }
  const std::string why = why_no_cma(credentials.pid, address.probe, bytes_of(address.name));
  if (!why.empty()) throw NicError(who + " cannot be used: " + why + "; or use tcp between them");
  peer->pid = credentials.pid;
  if (peer->pid != getpid()) {
    // A kernel before 5.3 has none: the socket tells the end, too, but later if a child holds it.
    peer->pidfd.reset(static_cast<int>(::syscall(SYS_pidfd_open, peer->pid, 0)));
  }
  peer->message_memory = SharedMemory::create("railwire-messages", ring_bytes(kMessageRingBytes));
  peer->messages = RingProducer(peer->message_memory.data(), kMessageRingBytes);
  const HostFrame hello{.type = HostFrame::kHello, .from = name_};
  const int descriptors[] = {peer->message_memory.fd()};
  if (peer->socket.send(bytes_of(hello), descriptors) != HostSocket::Result::kDone) {
    throw NicError(who + " does not take our introduction: " + std::strerror(errno));
  }
  peer->message_memory.drop_fd();
  return peer;
}

// With one reference more. Called without the lock.
std::shared_ptr<HostPeer> HostNic::find_or_dial(const HostAddress& address) {
  {
    std::lock_guard lock(mutex_);
    if (const auto found = peers_.find(address.name); found != peers_.end()) {
      ++found->second->references;
      return found->second;
    }
  }
  std::shared_ptr<HostPeer> made = dial(address);
  std::lock_guard lock(mutex_);
  const auto [place, fresh] = peers_.try_emplace(address.name, made);
  if (fresh) {
    made->event = watch(made->socket.fd());
    if (made->pidfd) {
      epoll_event event{.events = EPOLLIN, .data = {.u64 = made->event}};
      epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, made->pidfd.get(), &event);
    }
    peer_events_[made->event] = made;
  }
  ++place->second->references;
  return place->second;
}

uint64_t HostNic::resolve(std::span<const std::byte> blob) {
  const HostAddress address = parse(blob, own_address().kernel);
  return reinterpret_cast<uintptr_t>(find_or_dial(address).get());
}

void HostNic::forget(uint64_t handle) {
  std::shared_ptr<HostPeer> keep;  // it goes after the lock
  std::lock_guard lock(mutex_);
  auto& peer = *reinterpret_cast<HostPeer*>(handle);
  keep = peer_events_.at(peer.event);
  let_go(peer);
}

void HostNic::let_go(HostPeer& peer) {
  if (--peer.references > 0) return;
  unwatch(peer.socket.fd());
  unwatch(peer.pidfd.get());
  // What it has not taken yet it still takes: the ring stays until it has let go of it, too.
  if (peer.messages) peer.messages.header().producer_closed.store(1, std::memory_order_release);
  peer.socket.close();
  mapped_ -= peer.mappings.size();
  if (const auto found = peers_.find(peer.name); found != peers_.end() && found->second.get() == &peer) {
    peers_.erase(found);
  }
  peer_events_.erase(peer.event);
}

void HostNic::peer_died(HostPeer& peer) {
  if (peer.dead) return;
  peer.dead = true;
  unwatch(peer.socket.fd());
  unwatch(peer.pidfd.get());
  peer.unsent.clear();
  // Whoever still holds its handle holds nothing else of it.
  peer.socket.close();
  peer.pidfd.reset();
  peer.messages = {};
  peer.message_memory = {};
  // A name is never used again: whoever resolves it anew is told that nobody listens there.
  if (const auto found = peers_.find(peer.name); found != peers_.end() && found->second.get() == &peer) {
    peers_.erase(found);
  }
  for (HostLink* link : peer.links) heat(*link);
  look_now_ = true;
}

void HostNic::ring(const HostPeer& peer) const {
  if (peer.dead) return;
  const std::byte bell{1};
  // No room: what is there already wakes it.
  (void)peer.socket.send({&bell, 1});
}

void HostNic::send_packet(HostPeer& peer, const HostFrame& frame, std::span<const int> descriptors) {
  if (peer.dead) return;
  if (peer.unsent.empty()) {
    const auto result = peer.socket.send(bytes_of(frame), descriptors);
    if (result == HostSocket::Result::kDone) return;
    if (result == HostSocket::Result::kEnded) {
      peer_died(peer);
      return;
    }
  }
  HostPacket packet{frame, {}};
  for (const int fd : descriptors) packet.descriptors.emplace_back(::dup(fd));
  peer.unsent.push_back(std::move(packet));
  epoll_event event{.events = EPOLLIN | EPOLLOUT, .data = {.u64 = peer.event}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, peer.socket.fd(), &event);
}

void HostNic::flush_unsent(HostPeer& peer) {
  if (peer.unsent.empty()) return;
  while (!peer.unsent.empty()) {
    const HostPacket& packet = peer.unsent.front();
    std::vector<int> descriptors;
    for (const UniqueFd& fd : packet.descriptors) descriptors.push_back(fd.get());
    const auto result = peer.socket.send(bytes_of(packet.frame), descriptors);
    if (result == HostSocket::Result::kLater) return;
    if (result == HostSocket::Result::kEnded) {
      peer_died(peer);
      return;
    }
    peer.unsent.pop_front();
  }
  epoll_event event{.events = EPOLLIN, .data = {.u64 = peer.event}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, peer.socket.fd(), &event);
}

bool HostNic::send(uint64_t handle, std::span<const std::byte> message, void* context) {
  if (message.size() > kLongestMessage) return false;
  std::lock_guard lock(mutex_);
  auto& peer = *reinterpret_cast<HostPeer*>(handle);
  Completion end{.kind = Completion::kSend, .status = Status::kOk, .context = context};
  if (peer.dead) {
    end.status = Status::kUnreachable;
    end.provider_error = ECONNRESET;
  } else {
    if (!peer.messages.look()) {
      peer_died(peer);  // it scribbles
      return false;
    }
    std::byte* place = peer.messages.add(RecordKind::kMessage, message.size());
    if (!place) {
      peer.messages.publish();  // a pad, perhaps
      peer.wants_room = true;
      return false;
    }
    if (!message.empty()) std::memcpy(place, message.data(), message.size());
    peer.messages.publish();
    std::atomic_thread_fence(std::memory_order_seq_cst);
    RingHeader& header = peer.messages.header();
    if (header.consumer_asleep.load(std::memory_order_relaxed) &&
        header.consumer_asleep.exchange(0, std::memory_order_relaxed)) {
      ring(peer);
    }
  }
  held_.push_back(end);
  return true;
}

}  // namespace railwire
