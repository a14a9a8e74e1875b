// Opening a device, its queues, and registering memory.
#include "nic/verbs_nic.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "nic/verbs_internal.h"

namespace railwire {
namespace {

constexpr uint8_t kAddressVersion = 1;
constexpr size_t kAddressBytes = 32;
constexpr uint64_t kLongestWrite = 1ull << 30;  // the length of a scatter element has 32 bits
constexpr uint8_t kHops = 64;

bool never_blocks(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

}  // namespace

std::unique_ptr<Nic> make_verbs_nic(const std::string& spec, const std::map<std::string, std::string>& options) {
  return std::make_unique<VerbsNic>(parse_verbs_spec(spec, options), options);
}

std::vector<std::byte> pack_verbs_address(const VerbsAddress& address) {
  std::vector<std::byte> blob(kAddressBytes);
  auto put = [&, at = size_t{0}](const auto& value) mutable {
    std::memcpy(blob.data() + at, &value, sizeof value);
    at += sizeof value;
  };
  put(kAddressVersion);
  put(address.ethernet);
  put(address.mtu);
  put(address.read_depth);
  put(address.qp_number);
  put(address.secret);
  put(address.lid);
  put(uint16_t{0});
  put(address.gid.raw);
  return blob;
}

VerbsAddress unpack_verbs_address(std::span<const std::byte> blob, const std::string& prefix) {
  VerbsAddress address;
  uint8_t version = 0;
  if (blob.size() == kAddressBytes) {
    auto get = [&, at = size_t{0}](auto& value) mutable {
      std::memcpy(&value, blob.data() + at, sizeof value);
      at += sizeof value;
    };
    uint16_t unused;
    get(version);
    get(address.ethernet);
    get(address.mtu);
    get(address.read_depth);
    get(address.qp_number);
    get(address.secret);
    get(address.lid);
    get(unused);
    get(address.gid.raw);
  }
  const bool fits = version == kAddressVersion && address.ethernet <= 1 && address.mtu >= IBV_MTU_256 &&
                    address.mtu <= IBV_MTU_4096 && address.qp_number > 1 && address.qp_number < 0xffffff;
  if (!fits) throw NicError(prefix + "malformed address of a peer's verbs NIC");
  return address;
}

VerbsNic::VerbsNic(VerbsSpec spec, const std::map<std::string, std::string>&)
    : spec_(std::move(spec)), port_(open_verbs_port(spec_)) {
  info_.name = "verbs:" + port_.device;
  if (spec_.port || port_.port != 1) info_.name += ":" + std::to_string(port_.port);
  info_.kind = "verbs";
  info_.provider = std::string("libibverbs ") + (port_.ethernet ? "RoCE" : "InfiniBand");
  info_.library = verbs_api().path;
  info_.resumable = true;
  info_.datagrams = true;
  info_.max_write_bytes = std::min<uint64_t>(
      port_.port_attributes.max_msg_sz ? port_.port_attributes.max_msg_sz : kLongestWrite, kLongestWrite);
  const uint32_t depth = spec_.link_depth ? spec_.link_depth : port_.hardware ? kHardwareDepth : kSoftDepth;
  info_.link_depth = std::min(depth, static_cast<uint32_t>(std::max(port_.device_attributes.max_qp_wr, 2)) - 1);
  info_.links_per_pair = spec_.qps ? spec_.qps : port_.hardware ? kHardwareQps : 1;
  info_.link_gbps = port_.link_gbps;
  open_queues();
  open_messages();
}

VerbsNic::~VerbsNic() {
  for (VerbsLink* link : links_) {
    if (!link) continue;
    link->finish_end();  // an owner that is still there must not find a queue pair without a device
    link->abandoned_ = true;
  }
  message_qp_.reset();
  if (unacknowledged_ && cq_) verbs_api().ack_cq_events(cq_.get(), unacknowledged_);
  peers_.clear();
  if (epoll_fd_ >= 0) ::close(epoll_fd_);
}

void VerbsNic::open_queues() {
  const VerbsApi& api = verbs_api();
  pd_.reset(api.alloc_pd(port_.context.get()));
  if (!pd_) throw NicError(prefix() + "allocating a protection domain on " + port_.device + ": " + errno_text(errno));
  imports_dmabufs_ = imports_dmabufs(pd_.get());
  channel_.reset(api.create_comp_channel(port_.context.get()));
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  if (!channel_ || epoll_fd_ < 0 || !never_blocks(channel_->fd) || !never_blocks(port_.context->async_fd)) {
    throw NicError(prefix() + "opening an event channel of " + port_.device + ": " + errno_text(errno));
  }
  for (const int fd : {channel_->fd, port_.context->async_fd}) {
    epoll_event event{};
    event.events = EPOLLIN;
    if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
      throw NicError(prefix() + "waiting for events of " + port_.device + ": " + errno_text(errno));
    }
  }
  ibv_srq_init_attr attributes{};
  const int most = port_.device_attributes.max_srq_wr;
  attributes.attr.max_wr = most > 0 ? std::min(spec_.recv_depth, static_cast<uint32_t>(most)) : spec_.recv_depth;
  attributes.attr.max_sge = 1;
  srq_.reset(api.create_srq(pd_.get(), &attributes));
  if (!srq_) {
    throw NicError(prefix() + "creating a shared receive queue of " + std::to_string(attributes.attr.max_wr) + " on " +
                   port_.device + ": " + registration_problem(errno, 0) + "; option recv_depth makes it smaller");
  }
  receives_missing_ = std::min(spec_.recv_depth, attributes.attr.max_wr);
  refill_at_ = std::clamp<uint32_t>(receives_missing_ / 4, 1, kChain);
  reserve_completions(0);
  for (size_t i = 0; i < kChain; ++i) {
    wrs_[i].next = i + 1 < kChain ? &wrs_[i + 1] : nullptr;
    wrs_[i].sg_list = &sges_[i];
    receive_wrs_[i].next = i + 1 < kChain ? &receive_wrs_[i + 1] : nullptr;
    receive_wrs_[i].wr_id = make_wr_id(WrKind::kSharedReceive, 0, 0);
  }
  while (receives_missing_ > 0) {
    const uint32_t before = receives_missing_;
    refill();
    if (receives_missing_ == before) {
      throw NicError(prefix() + "the shared receive queue of " + port_.device + " takes no receive WRs");
    }
  }
}

// Makes the completion queue hold all that so many links can bring about.
void VerbsNic::reserve_completions(size_t links) {
  const VerbsApi& api = verbs_api();
  const size_t most = static_cast<size_t>(std::max(port_.device_attributes.max_cqe, 1));
  // The control endpoint twice: a recovery may leave what was there before unread.
  const size_t fixed = spec_.recv_depth + 2 * (size_t{kSends} + kReceives);
  const size_t needed = fixed + links * info_.link_depth;
  if (needed > most) {
    const size_t fit = most > fixed ? (most - fixed) / std::max<size_t>(info_.link_depth, 1) : 0;
    throw NicError(prefix() + "the completion queue of " + port_.device + " holds at most " + std::to_string(most) +
                   ": there is room for " + std::to_string(fit) + " links of depth " +
                   std::to_string(info_.link_depth) + "; options link_depth and recv_depth make them smaller");
  }
  if (needed <= cq_room_) return;
  const size_t wanted = std::min(most, fixed + std::max<size_t>(8, 2 * links) * info_.link_depth);
  if (!cq_) {
    cq_.reset(api.create_cq(port_.context.get(), static_cast<int>(wanted), nullptr, channel_.get(), 0));
    if (!cq_) {
      throw NicError(prefix() + "creating a completion queue of " + std::to_string(wanted) + " on " + port_.device +
                     ": " + registration_problem(errno, 0));
    }
  } else if (const int error = api.resize_cq(cq_.get(), static_cast<int>(wanted))) {
    throw NicError(prefix() + "enlarging the completion queue of " + port_.device + " to " + std::to_string(wanted) +
                   ": " + errno_text(error) + "; option link_depth makes links smaller");
  }
  cq_room_ = wanted;
}

ibv_ah_attr VerbsNic::path_to(const VerbsAddress& remote) const {
  ibv_ah_attr path{};
  path.port_num = port_.port;
  path.dlid = remote.lid;
  path.sl = static_cast<uint8_t>(spec_.service_level);
  // InfiniBand needs the global header only between subnets, and where the port says so (virtual functions).
  const bool other_subnet = !port_.ethernet && subnet_of(remote.gid) != subnet_of(port_.gid);
  if (const uint16_t routed = flid_of(remote.gid); other_subnet && routed != 0) path.dlid = routed;
  if (port_.ethernet || other_subnet || spec_.gid_index || (port_.port_attributes.flags & IBV_QPF_GRH_REQUIRED)) {
    path.is_global = 1;
    path.grh.dgid = remote.gid;
    path.grh.sgid_index = static_cast<uint8_t>(port_.gid_index);
    path.grh.hop_limit = kHops;
    path.grh.traffic_class = static_cast<uint8_t>(spec_.traffic_class);
  }
  return path;
}

void VerbsNic::check_same_network(const VerbsAddress& remote) const {
  if ((remote.ethernet != 0) != port_.ethernet) {
    const auto layer = [](bool ethernet) { return ethernet ? "Ethernet (RoCE)" : "InfiniBand"; };
    throw NicError(prefix() + "port " + std::to_string(port_.port) + " of " + port_.device + " is " +
                   layer(port_.ethernet) + ", the peer's is " + layer(remote.ethernet != 0) +
                   ": they cannot be linked; name NICs of one network on both sides (nics=)");
  }
  if (spec_.mtu > mtu_bytes(static_cast<ibv_mtu>(remote.mtu))) {
    throw NicError(prefix() + "option mtu is " + std::to_string(spec_.mtu) + ", but the peer's port carries " +
                   std::to_string(mtu_bytes(static_cast<ibv_mtu>(remote.mtu))) +
                   ": raise the MTU there, or leave the option out on " + port_.device +
                   ", and the smaller of the two is used");
  }
}

Registration VerbsNic::register_memory(const MemorySpec& memory) {
  const VerbsApi& api = verbs_api();
  const bool device_memory = memory.dmabuf_fd >= 0 || memory.device >= 0;
  const int access = IBV_ACCESS_REMOTE_READ | (memory.writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE : 0);
  const auto address = reinterpret_cast<uint64_t>(memory.address);
  auto made = std::make_unique<VerbsMemory>();
  made->host = !device_memory;
  // Data may overtake data on the way through PCIe, which is much faster on some hosts; the completion overtakes
  // nothing, and the memory is not looked at before. Optional by definition: devices that lack it ignore it.
  const int relaxed = spec_.relaxed_ordering ? static_cast<int>(IBV_ACCESS_RELAXED_ORDERING) : 0;
  std::string by_dmabuf;  // why not
  if (memory.dmabuf_fd >= 0) {
    if (imports_dmabufs_) {
      for (const int more : {relaxed, 0}) {
        if (!made->mr) {
          made->mr.reset(api.reg_dmabuf_mr(pd_.get(), memory.dmabuf_offset, memory.length, address, memory.dmabuf_fd,
                                           access | more));
        }
      }
      if (!made->mr) by_dmabuf = registration_problem(errno, memory.length);
    } else {
      by_dmabuf = "the driver of " + port_.device + ", the kernel (5.12) or rdma-core (34) does not know dma-buf";
    }
  }
  // Also where a dma-buf could be exported but not imported: nvidia_peermem takes the address.
  if (!made->mr && relaxed && api.reg_mr_iova2) {
    made->mr.reset(
        api.reg_mr_iova2(pd_.get(), memory.address, memory.length, address, static_cast<unsigned>(access | relaxed)));
  }
  if (!made->mr) made->mr.reset(api.reg_mr(pd_.get(), memory.address, memory.length, access));
  if (!made->mr) {
    std::string text = prefix() + registration_problem(errno, memory.length);
    if (device_memory) {
      text += "; memory of cuda:" + std::to_string(memory.device) +
              " needs dma-buf (NVIDIA's open kernel modules) or nvidia_peermem" +
              (by_dmabuf.empty() ? "" : "; by dma-buf: " + by_dmabuf);
    }
    throw NicError(text);
  }
  made->lkey = made->mr->lkey;
  Registration registration;
  registration.blob = plain_blob(address, made->mr->rkey);
  registration.local = made.get();
  registration.handle = made.release();
  return registration;
}

void VerbsNic::deregister(Registration& registration) {
  delete static_cast<VerbsMemory*>(registration.handle);
  registration = {};
}

std::string VerbsNic::describe(int32_t provider_error) const {
  return provider_error == 0 ? "no error" : wc_status_text(provider_error);
}

}  // namespace railwire
