// What the sockets say: NICs that dial us, their packets, bells, and the end of processes.
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/host_internal.h"

namespace railwire {
namespace {

constexpr size_t kMostCallers = 8192;
constexpr size_t kMostStrangers = 256;  // that have dialled and not said who they are
constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kStrangerPatience = 10 * kSecond;
constexpr int64_t kClockEvery = kSecond / 10;
constexpr int kPacketsPerLook = 32;

}  // namespace

void HostNic::look_at_events() {
  look_now_ = false;
  epoll_event events[64];
  const int count = epoll_wait(epoll_.get(), events, 64, 0);
  for (int i = 0; i < count; ++i) {
    const uint64_t event = events[i].data.u64;
    if (event == listener_event_) {
      accept_callers();
    } else if (const auto caller = callers_.find(event); caller != callers_.end()) {
      hear(event, *caller->second);
    } else if (const auto peer = peer_events_.find(event); peer != peer_events_.end()) {
      hear_peer(*peer->second);
    }
  }
  if (count == 64) look_now_ = true;
  look_at_clock();
}

void HostNic::look_at_clock() {
  const int64_t now = host_clock_ns();
  if (now < next_clock_ns_) return;
  next_clock_ns_ = now + kClockEvery;
  if (listener_paused_) {
    listener_paused_ = false;
    listener_event_ = watch(listener_.fd());
  }
  std::vector<uint64_t> late;
  for (const auto& [event, caller] : callers_) {
    if (!caller->introduced && now - caller->since_ns > kStrangerPatience) late.push_back(event);
  }
  for (const uint64_t event : late) drop_caller(event);
  for (HostLink* link : links_) {
    if (!link->up_ && !link->broken_ && now > link->up_by_ns_) link->break_now(ETIMEDOUT);
  }
}

void HostNic::accept_callers() {
  HostSocket socket;
  for (int i = 0; i < kPacketsPerLook; ++i) {
    const auto result = listener_.accept(&socket);
    if (result == HostSocket::Result::kLater) return;
    if (result == HostSocket::Result::kEnded) {
      // No descriptors left. Looked at again later, or the poller would find it readable all the time.
      unwatch(listener_.fd());
      listener_paused_ = true;
      return;
    }
    const auto strangers =
        std::count_if(callers_.begin(), callers_.end(), [](const auto& c) { return !c.second->introduced; });
    // Any user may dial an abstract name.
    if (socket.credentials().uid != geteuid() || callers_.size() >= kMostCallers ||
        static_cast<size_t>(strangers) >= kMostStrangers) {
      socket.close();
      continue;
    }
    auto caller = std::make_unique<Caller>();
    caller->socket = std::move(socket);
    caller->since_ns = host_clock_ns();
    const uint64_t event = caller->event = watch(caller->socket.fd());
    Caller& made = *caller;
    callers_[event] = std::move(caller);
    hear(event, made);  // it has said hello already, most often
  }
  look_now_ = true;
}

void HostNic::drop_caller(uint64_t event) {
  const auto found = callers_.find(event);
  if (found == callers_.end()) return;
  unwatch(found->second->socket.fd());
  std::erase(hot_callers_, found->second.get());
  callers_.erase(found);
}

void HostNic::hear(uint64_t event, Caller& caller) {
  std::byte buffer[kLongestPacket];
  std::vector<UniqueFd> descriptors;
  for (int i = 0; i < kPacketsPerLook; ++i) {
    size_t length = 0;
    const auto result = caller.socket.receive(buffer, &length, &descriptors);
    if (result == HostSocket::Result::kLater) return;
    if (result == HostSocket::Result::kEnded) {
      unwatch(caller.socket.fd());
      caller.ended = true;
      if (!caller.messages) {
        drop_caller(event);
      } else {
        heat(caller);  // goes when its last messages have been taken
      }
      return;
    }
    if (length == 1) {  // a bell
      if (caller.introduced) {
        heat(caller);
        heat_links(caller.name);
      }
      continue;
    }
    HostFrame frame;
    bool good = length == sizeof frame;
    if (good) {
      std::memcpy(&frame, buffer, sizeof frame);
      good = frame.magic == kHostMagic && frame.version == kHostVersion && take_packet(caller, frame, descriptors);
    }
    if (!good) {
      drop_caller(event);
      return;
    }
  }
  look_now_ = true;
}

// False: not what a NIC of this version says.
bool HostNic::take_packet(Caller& caller, const HostFrame& frame, std::vector<UniqueFd>& descriptors) {
  if (frame.type == HostFrame::kWantGpuMemory && !caller.introduced) {
    give_gpu_memory(caller, frame.rkey, frame.offset);
    return true;
  }
  if (!caller.introduced) return introduce(caller, frame, descriptors);
  // Whoever does not know a link's token gets nothing, and learns nothing.
  const auto link = links_by_token_.find(frame.to);
  if (link == links_by_token_.end()) return true;
  HostLink& ours = *link->second;
  if (frame.type == HostFrame::kLink) {
    ours.peer_says(frame, descriptors);
    return true;
  }
  if (!ours.up_) return true;
  switch (frame.type) {
    case HostFrame::kWantMemory:
      give_memory(ours, frame.rkey);
      return true;
    case HostFrame::kHaveMemory:
      if (descriptors.size() == 1) map_memory(*ours.peer_, frame, descriptors[0].get());
      return true;
    case HostFrame::kGoneMemory:
      ours.peer_->mappings_changed(*this, frame.rkey);
      return true;
    default:
      return false;
  }
}

bool HostNic::introduce(Caller& caller, const HostFrame& frame, std::vector<UniqueFd>& descriptors) {
  if (frame.type != HostFrame::kHello || descriptors.size() != 1) return false;
  std::string why;
  caller.message_memory = SharedMemory::map(descriptors[0].get(), 0, ring_bytes(kMessageRingBytes), true, &why);
  if (!caller.message_memory || !RingConsumer::check(caller.message_memory.data(), kMessageRingBytes, &why)) {
    return false;
  }
  caller.messages = RingConsumer(caller.message_memory.data(), kMessageRingBytes);
  caller.name = frame.from;
  caller.introduced = true;
  heat(caller);
  return true;
}

// On our own socket to a peer come its bells, and its end.
void HostNic::hear_peer(HostPeer& peer) {
  if (peer.pidfd) {
    pollfd process{peer.pidfd.get(), POLLIN, 0};
    if (::poll(&process, 1, 0) > 0) {
      peer_died(peer);
      return;
    }
  }
  if (peer.dead) return;
  std::byte buffer[kLongestPacket];
  std::vector<UniqueFd> descriptors;
  for (int i = 0; i < kPacketsPerLook; ++i) {
    size_t length = 0;
    const auto result = peer.socket.receive(buffer, &length, &descriptors);
    if (result == HostSocket::Result::kEnded) {
      peer_died(peer);
      return;
    }
    if (result == HostSocket::Result::kLater) break;
  }
  flush_unsent(peer);
}

// ---- memory that both map ----------------------------------------------------------------------------------------
void HostNic::give_memory(HostLink& link, uint64_t rkey) {
  const auto found = shared_.find(rkey);
  if (found == shared_.end()) return;
  SharedRegion& region = found->second;
  // It is only a faster way: a peer that does not read its packets keeps the slower one.
  if (!link.peer_->unsent.empty()) return;
  if (std::find(region.holders.begin(), region.holders.end(), &link) == region.holders.end()) {
    region.holders.push_back(&link);
  }
  const int descriptors[] = {region.fd};
  send_packet(*link.peer_,
              {.type = HostFrame::kHaveMemory,
               .to = link.remote_token_,
               .rkey = rkey,
               .offset = region.offset,
               .length = region.length},
              descriptors);
}

void HostNic::map_memory(HostPeer& peer, const HostFrame& frame, int fd) {
  const auto found = peer.mappings.find(frame.rkey);
  if (found == peer.mappings.end() || found->second.memory) return;  // not asked for
  HostMapping& mapping = found->second;
  if (frame.length != mapping.length) return;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t before = frame.offset % page;
  std::string why;
  mapping.memory = SharedMemory::map(fd, frame.offset - before, static_cast<size_t>(before + frame.length), true, &why);
  if (mapping.memory) mapping.bytes = mapping.memory.data() + before;
}

void HostPeer::mappings_changed(HostNic& nic, uint64_t rkey) {
  if (mappings.erase(rkey) == 0) return;
  --nic.mapped_;
  for (HostLink* link : links) link->forget_mapping();
}

}  // namespace railwire
