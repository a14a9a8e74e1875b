// Opening a libfabric NIC: asking for the provider, the domain, the queue and the endpoints.
#include "nic/libfabric_nic.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "nic/libfabric_internal.h"
#include "nic/network.h"

namespace railwire {
namespace {

constexpr uint32_t kDefaultDepth = 1024;
constexpr uint64_t kLongestWrite = 1ull << 30;  // process_vm_writev, behind shm, ends just below 2 GiB

// Of newer libraries' fi_endpoint.h and fi_ext.h.
constexpr int kOptCudaApiPermitted = 10;                            // 1.18
constexpr int kOptSharedMemoryPermitted = 11;                       // 1.19
constexpr int kOptMaxMessageSize = 12;                              // 1.20
constexpr int kOptEfaEmulatedWrite = -(0xefa << 16) + 2;            // 1.17
constexpr int kOptEfaUseUnsolicitedWriteRecv = -(0xefa << 16) + 8;  // 2.5; AWS carries it back to some 2.3
constexpr uint32_t kCudaApiSince = FI_VERSION(1, 18);
constexpr uint32_t kSharedMemorySince = FI_VERSION(1, 19);
constexpr uint32_t kReceivesByModeSince = FI_VERSION(2, 4);          // efa-direct looks at FI_RX_CQ_DATA
constexpr size_t kQueueSizes[] = {65536, 32768, 16384, 8192, 4096};  // the longest that the device takes
constexpr uint64_t kShortWrite = 1024;                               // what peers may send without end, at worst
constexpr double kUnknownGbps = 400;
constexpr size_t kMessageShare = 8;  // this part of a shared send queue is the messages'

// dma-buf needs the interface of 1.20; the others stay with the one that our headers describe.
uint32_t interface_version(const LibfabricSpec& spec) {
  const bool local = spec.kind == "tcp" || spec.kind == "shm";
  return local ? FI_VERSION(1, 17) : std::min<uint32_t>(libfabric_api().version, FI_VERSION(1, 20));
}

void set_name(char*& field, const std::string& value) {
  std::free(field);
  field = value.empty() ? nullptr : strdup(value.c_str());
}

std::string socket_text(const std::string& name) {
  char text[INET6_ADDRSTRLEN] = "";
  sockaddr_in6 v6{};
  std::memcpy(&v6, name.data(), std::min(sizeof v6, name.size()));
  if (v6.sin6_family == AF_INET6) {
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
    return "[" + std::string(text) + "]:" + std::to_string(ntohs(v6.sin6_port));
  }
  sockaddr_in v4{};
  std::memcpy(&v4, name.data(), std::min(sizeof v4, name.size()));
  inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
  return std::string(text) + ":" + std::to_string(ntohs(v4.sin_port));
}

}  // namespace

std::unique_ptr<Nic> make_libfabric_nic(const std::string& spec, const std::map<std::string, std::string>& options) {
  return std::make_unique<LibfabricNic>(parse_libfabric_spec(spec, options));
}

LibfabricNic::LibfabricNic(LibfabricSpec spec) : spec_(std::move(spec)) {
  own_endpoint_ = spec_.kind == "tcp" || spec_.kind == "shm";
  thread_safe_ = efa();
  fi_ = query(spec_.port);
  link_fi_ = query("");
  mr_mode_ = static_cast<uint64_t>(fi_->domain_attr->mr_mode);
  recv_consumed_by_writes_ = (fi_->mode & FI_RX_CQ_DATA) != 0;
  if (spec_.kind == "shm") wakeup_ = std::make_unique<HostWakeup>();
  // In 1.17, fi_trywait crashes after an endpoint of ofi_rxm was closed.
  naps_ = spec_.kind == "tcp" && FI_MAJOR(libfabric_api().version) < 2;
  open_domain();
  try {
    control_ = open_endpoint(fi_.get());
  } catch (const NicError& error) {
    if (spec_.port.empty()) throw;
    throw NicError(
        prefix() + "cannot listen on " + spec_.host + " port " + spec_.port + " (" + error.what() +
        "); another process, or another engine of this one, may use it: choose another port or leave it out");
  }
  look_at_endpoint(control_.ep.get());
  control_name_ = endpoint_name(control_.ep.get());
  fill_info();
  open_messages();
}

LibfabricNic::~LibfabricNic() {
  control_.ep.reset();  // before its address vector, which is busy until then
  control_.av.reset();
  arena_mr_.reset();
  if (arena_) munmap(arena_, arena_bytes_);
}

InfoOwner LibfabricNic::query(const std::string& port) const {
  const LibfabricApi& api = libfabric_api();
  const bool tcp = spec_.kind == "tcp";
  struct Attempt {
    bool hmem, delivery_complete, deep, receives;
  };
  // EFA's send queue is one for all peers: a hint would make it shorter. Others take what they are asked for.
  const std::vector<bool> deep = efa() ? std::vector{false} : std::vector{true, false};
  // Since 2.4, who says FI_RX_CQ_DATA to efa-direct switches unsolicited receives off. It is said where that is wanted,
  // or where the device has none.
  const bool off = !spec_.unsolicited_write_recv;
  const std::vector<bool> receives = own_endpoint_   ? std::vector{false}
                                     : !efa()        ? std::vector{true}
                                     : !efa_direct() ? std::vector{false}
                                     : off           ? std::vector{true}
                                                     : std::vector{false, true};
  std::vector<Attempt> attempts;
  for (const bool hmem : {true, false}) {
    if (hmem && own_endpoint_) continue;  // these copy through the CPU
    for (const bool by_receives : receives) {
      for (const bool delivered : {true, false}) {
        if (delivered && !efa()) continue;
        for (const bool size : deep) attempts.push_back({hmem, delivered, size, by_receives});
      }
    }
  }
  int code = 0;
  for (const Attempt& attempt : attempts) {
    InfoOwner hints(api.dupinfo(nullptr));
    if (!hints) throw NicError(prefix() + "out of memory");
    hints->caps = FI_MSG | FI_RMA | (attempt.hmem ? FI_HMEM : 0);
    // Without FI_LOCAL_COMM beside it, EFA makes no shm domain of its own, which its queue could not wait for.
    if (efa()) hints->caps |= FI_REMOTE_COMM;
    hints->mode = FI_CONTEXT | FI_CONTEXT2 | (attempt.receives ? FI_RX_CQ_DATA : 0);
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT |
                                  (attempt.hmem ? FI_MR_HMEM : 0);
    hints->domain_attr->threading = thread_safe_ ? FI_THREAD_SAFE : FI_THREAD_DOMAIN;
    // Without this 2.x offers automatic progress: a thread of its own that competes with ours.
    hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
    if (attempt.delivery_complete) hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    if (attempt.deep) hints->tx_attr->size = spec_.link_depth ? spec_.link_depth : kDefaultDepth;
    set_name(hints->fabric_attr->prov_name, spec_.provider);
    set_name(hints->fabric_attr->name, spec_.fabric);
    set_name(hints->domain_attr->name, spec_.domain);
    fi_info* found = nullptr;
    code = api.getinfo(interface_version(spec_), tcp ? spec_.host.c_str() : nullptr,
                       tcp && !port.empty() ? port.c_str() : nullptr, tcp ? FI_SOURCE : 0, hints.get(), &found);
    if (code == 0) return InfoOwner(found);
  }
  const std::string asked =
      tcp ? "no network interface with the address " + spec_.host + " was found"
          : "the provider " + spec_.provider +
                (spec_.domain.empty() ? " was not found" : " with the domain " + spec_.domain + " was not found");
  throw NicError(prefix() + asked + " by libfabric " + api.version_text() + " (" + api.path +
                 "): " + libfabric_error(code) +
                 "; `railwire doctor` lists what is there, RAILWIRE_LIBFABRIC names another library");
}

void LibfabricNic::open_domain() {
  fid_fabric* fabric = nullptr;
  check(libfabric_api().fabric(fi_->fabric_attr, &fabric, nullptr), "opening the fabric");
  fabric_.reset(fabric);
  fid_domain* domain = nullptr;
  check(fi_domain(fabric, fi_.get(), &domain, nullptr), "opening the domain");
  domain_.reset(domain);
  // Peers decide how many immediates arrive; with EFA's unsolicited receives only the queue's size holds them.
  int code = 0;
  std::vector<size_t> sizes{16384, 4096};
  if (efa()) sizes.assign(std::begin(kQueueSizes), std::end(kQueueSizes));
  sizes.push_back(0);
  for (const size_t size : sizes) {
    for (const fi_wait_obj wait : {FI_WAIT_FD, FI_WAIT_NONE}) {
      if (wait == FI_WAIT_FD && spec_.kind == "shm") continue;  // it has none, and says so only when asked
      fi_cq_attr attr{};
      attr.size = size;
      attr.format = FI_CQ_FORMAT_DATA;
      attr.wait_obj = wait;
      fid_cq* cq = nullptr;
      code = fi_cq_open(domain, &attr, &cq, nullptr);
      if (code != 0) continue;
      cq_.reset(cq);
      cq_size_ = size ? size : 4096;
      int fd = -1;
      if (wait == FI_WAIT_FD && fi_control(&cq->fid, FI_GETWAIT, &fd) == 0) cq_fd_ = fd;
      return;
    }
  }
  check(code, "opening a completion queue");
}

Endpoint LibfabricNic::open_endpoint(fi_info* info) {
  Endpoint endpoint;
  fi_av_attr av_attr{};
  av_attr.type = FI_AV_TABLE;
  fid_av* av = nullptr;
  check(fi_av_open(domain_.get(), &av_attr, &av, nullptr), "opening an address vector");
  endpoint.av.reset(av);
  if (wakeup_) {
    // Names of our own choice: unguessable, never used twice, and recognisable if we are killed.
    const std::string name =
        "fi_ns://" + HostWakeup::file_prefix(wakeup_->name()) + "-" + std::to_string(endpoints_made_++);
    char* source = nullptr;
    set_name(source, name);
    std::free(info->src_addr);
    info->src_addr = source;
    info->src_addrlen = name.size() + 1;
  }
  fid_ep* ep = nullptr;
  check(fi_endpoint(domain_.get(), info, &ep, nullptr), "creating an endpoint");
  endpoint.ep.reset(ep);
  if (efa()) set_endpoint_options(ep);
  check(fi_ep_bind(ep, &cq_->fid, FI_TRANSMIT | FI_RECV), "binding an endpoint to the completion queue");
  check(fi_ep_bind(ep, &av->fid, 0), "binding an endpoint to its address vector");
  check(fi_enable(ep), "enabling an endpoint");
  return endpoint;
}

// Most of these are requests: a library that does not know an option does without.
void LibfabricNic::set_endpoint_options(fid_ep* ep) {
  const uint32_t version = libfabric_api().version;
  const bool off = false;
  // Peers of this host are the shm NIC's; EFA's own detour through shared memory could not be fenced.
  if (FI_VERSION_GE(version, kSharedMemorySince)) {
    fi_setopt(&ep->fid, FI_OPT_ENDPOINT, kOptSharedMemoryPermitted, &off, sizeof off);
  }
  // A CUDA call on our thread can wait for a kernel that waits for us. Where EFA cannot do without them, because the
  // device does not reach the GPUs, it says so here, and GPU memory is refused.
  reaches_gpus_ = (fi_->caps & FI_HMEM) != 0;
  if (FI_VERSION_GE(version, kCudaApiSince)) {
    const int code = fi_setopt(&ep->fid, FI_OPT_ENDPOINT, kOptCudaApiPermitted, &off, sizeof off);
    reaches_gpus_ = reaches_gpus_ && (code == 0 || code == -FI_ENOPROTOOPT);
  }
  if (spec_.unsolicited_write_recv) return;  // on by itself
  const int code = fi_setopt(&ep->fid, FI_OPT_ENDPOINT, kOptEfaUseUnsolicitedWriteRecv, &off, sizeof off);
  if (efa_direct() ? recv_consumed_by_writes_ && FI_VERSION_GE(version, kReceivesByModeSince) : code == 0) return;
  if (std::getenv("FI_EFA_USE_UNSOLICITED_WRITE_RECV")) return;  // the user has seen to it
  throw NicError(prefix() + "option unsolicited_write_recv is \"off\", which libfabric " +
                 libfabric_api().version_text() + " does not know: it needs " + (efa_direct() ? "2.4" : "2.5") +
                 "; FI_EFA_USE_UNSOLICITED_WRITE_RECV=0 in the environment does it in older ones");
}

// What only an open endpoint tells.
void LibfabricNic::look_at_endpoint(fid_ep* ep) {
  uint64_t longest = fi_->ep_attr->max_msg_size;
  if (efa()) {
    size_t value = 0, length = sizeof value;
    if (fi_getopt(&ep->fid, FI_OPT_ENDPOINT, kOptMaxMessageSize, &value, &length) == 0 && value > 0) longest = value;
    bool emulated = false;
    length = sizeof emulated;
    if (fi_getopt(&ep->fid, FI_OPT_ENDPOINT, kOptEfaEmulatedWrite, &emulated, &length) == 0 && emulated) {
      // The peer's software takes part in each write. If it dies, nobody ends what waits for it, but the end of our
      // endpoint: so each link has its own.
      own_endpoint_ = true;
      info_.warning =
          "this device has no RDMA write (the first EFA, as in p4d): libfabric emulates it, at a fraction "
          "of the speed";
    }
  }
  // efa-direct's messages are packets: about 8 KiB, less than max_msg_size, which counts RMA in. Both sides have to
  // agree on whether they are cut, so the fabric decides and not the size.
  if (efa_direct()) {
    constexpr uint64_t kPacket = 4096;
    piece_payload_ = static_cast<uint32_t>(std::min(longest, kPacket) - sizeof(PieceHeader));
    longest = std::min<uint64_t>(kLongestMessage, uint64_t{piece_payload_} * kMostPieces / 2);
    sender_ = uint64_t{std::random_device()()} << 32 | std::random_device()();
  }
  info_.max_message_bytes = static_cast<uint32_t>(std::min<uint64_t>(longest, kLongestMessage));
  if (!own_endpoint_) {
    const size_t depth = link_fi_->tx_attr->size;
    send_queue_ = depth > 0 ? std::max<size_t>(depth - depth / kMessageShare, 1) : 0;
  }
}

void LibfabricNic::fill_info() {
  const LibfabricApi& api = libfabric_api();
  info_.kind = spec_.kind;
  if (spec_.kind == "tcp") {
    info_.name = "libfabric:tcp://" + socket_text(control_name_);
    info_.kind = "libfabric-tcp";
    if (!spec_.port.empty() && !info_.name.ends_with(":" + spec_.port)) {
      throw NicError(prefix() + "the provider listens on " + info_.name + " although port " + spec_.port +
                     " was asked for; it is probably in use: choose another port or leave it out");
    }
  } else if (spec_.kind == "shm") {
    info_.name = "libfabric:shm";
    info_.kind = "libfabric-shm";
  } else if (spec_.text.starts_with("efa")) {
    info_.name = std::string("efa:") + fi_->domain_attr->name;
  } else {
    info_.name = "libfabric:" + (spec_.fabric.empty() ? spec_.provider : spec_.fabric) + ":" + fi_->domain_attr->name;
  }
  info_.provider = "libfabric " + api.version_text() + " " + fi_->fabric_attr->prov_name;
  if (!info_.warning.empty()) info_.provider += " (writes are emulated)";
  info_.library = api.path;
  info_.same_host_only = spec_.kind == "shm";
  // SRD's completions come back from the destination; all others here complete when the bytes have left.
  info_.completion_proves_landing = efa();
  // shm's peers write into our memory by themselves. Where links share an endpoint, closing one closes nothing.
  info_.closing_fences = own_endpoint_ && spec_.kind != "shm";
  info_.closing_quiets = spec_.kind != "shm";
  info_.takes_all_memory = efa() ? reaches_gpus_ : (fi_->caps & FI_HMEM) != 0;
  info_.max_write_bytes = std::min<uint64_t>(fi_->ep_attr->max_msg_size, kLongestWrite);
  const uint32_t depth = spec_.link_depth ? spec_.link_depth : kDefaultDepth;
  info_.link_depth = std::min<uint32_t>(depth, static_cast<uint32_t>(link_fi_->tx_attr->size));
  if (fi_->nic && fi_->nic->link_attr && fi_->nic->link_attr->speed) {
    info_.link_gbps = static_cast<double>(fi_->nic->link_attr->speed) / 1e9;
  } else if (spec_.kind == "tcp") {
    info_.link_gbps = gbps_of_interface(fi_->domain_attr->name ? fi_->domain_attr->name : "");
  }
  if (efa() && cq_fd_ < 0) {
    // Half the queue, at the rate at which short writes fill it.
    const double gbps = info_.link_gbps > 0 ? info_.link_gbps : kUnknownGbps;
    info_.longest_nap_ns = static_cast<int64_t>(static_cast<double>(cq_size_ / 2 * kShortWrite * 8) / gbps);
  }
}

std::vector<std::byte> LibfabricNic::address() const { return pack(control_name_); }

std::string LibfabricNic::describe(int32_t provider_error) const {
  return provider_error == 0 ? "no error" : libfabric_error(provider_error);
}

std::string LibfabricNic::failure() const {
  if (gave_up_ == 0) return {};
  return prefix() + (gave_up_ == FI_EOVERRUN
                         ? "its completion queue of " + std::to_string(cq_size_) +
                               " overflowed, and immediates are lost; peers write faster than this process looks"
                     : gave_up_ == FI_ETIMEDOUT
                         ? "libfabric does not give back the work requests of a link that was closed"
                         : "its completion queue failed: " + libfabric_error(gave_up_));
}

}  // namespace railwire
