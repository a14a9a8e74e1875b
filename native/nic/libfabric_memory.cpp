// Registering memory, in every combination of what providers demand (fi_mr(3), "mr_mode").
#include "nic/libfabric_internal.h"

namespace railwire {
namespace {

// Of 1.20. In fi_mr_attr a pointer to it takes the place of the iovec.
struct DmabufRange {
  int fd;
  uint64_t offset;
  size_t length;
  void* base_address;
};

constexpr uint64_t kSourceAccess = FI_SEND | FI_WRITE | FI_REMOTE_READ;
constexpr uint64_t kAccess = kSourceAccess | FI_RECV | FI_READ | FI_REMOTE_WRITE;

}  // namespace

std::string LibfabricNic::refuses(const MemorySpec& memory) const {
  const bool device_memory = memory.dmabuf_fd >= 0 || memory.device >= 0;
  if (device_memory && !(fi_->caps & FI_HMEM)) {
    return prefix() + "cannot reach the memory of cuda:" + std::to_string(memory.device) + ": the provider of " +
           info_.provider + " has no FI_HMEM; use a NIC that has, or copy through host memory";
  }
  if (device_memory && efa() && !reaches_gpus_) {
    return prefix() + "cannot reach the memory of cuda:" + std::to_string(memory.device) +
           " by itself: libfabric would copy it with CUDA calls; load efa_nv_peermem, or NVIDIA's open kernel modules "
           "(dma-buf), or copy through host memory";
  }
  return {};
}

int LibfabricNic::try_register(const MemorySpec& memory, bool by_dmabuf, fid_mr** mr) const {
  const bool device_memory = memory.dmabuf_fd >= 0 || memory.device >= 0;
  iovec range{memory.address, memory.length};
  DmabufRange dmabuf{memory.dmabuf_fd, memory.dmabuf_offset, memory.length, nullptr};
  // For a dma-buf the address that peers name is base + offset.
  dmabuf.base_address = static_cast<char*>(memory.address) - memory.dmabuf_offset;
  Padded<fi_mr_attr> attr;
  attr.value.mr_iov = by_dmabuf ? reinterpret_cast<const iovec*>(&dmabuf) : &range;
  attr.value.iov_count = 1;
  attr.value.access = memory.writable ? kAccess : kSourceAccess;
  const size_t key_bytes = fi_->domain_attr->mr_key_size;
  attr.value.requested_key = key_bytes >= 8 ? memory.key_hint : memory.key_hint & ((1ull << (8 * key_bytes)) - 1);
  attr.value.iface = device_memory ? FI_HMEM_CUDA : FI_HMEM_SYSTEM;
  if (device_memory) attr.value.device.cuda = std::max(memory.device, 0);
  return fi_mr_regattr(domain_.get(), &attr.value, by_dmabuf ? FI_MR_DMABUF : 0, mr);
}

FidOwner<fid_mr> LibfabricNic::register_range(const MemorySpec& memory) const {
  if (const std::string why = refuses(memory); !why.empty()) throw NicError(why);
  fid_mr* mr = nullptr;
  int code = -FI_ENOSYS;
  std::string by_dmabuf;  // why not
  if (memory.dmabuf_fd >= 0) {
    if (FI_VERSION_GE(libfabric_api().version, FI_VERSION(1, 20))) code = try_register(memory, true, &mr);
    // A driver exports dma-bufs that an older kernel cannot import (before 5.12): a peer-memory module may take the
    // address all the same.
    if (code != 0) by_dmabuf = " by dma-buf: " + libfabric_error(code) + "; by a peer-memory module";
  }
  if (code != 0) code = try_register(memory, false, &mr);
  if (code != 0) {
    const std::string what = "registering " + std::to_string(memory.length) + " bytes" + by_dmabuf;
    if (code == -FI_ENOMEM || code == -EPERM || code == -FI_EAGAIN) {
      throw NicError(prefix() + what + ": " + libfabric_error(code) +
                     "; the limit of locked memory may be too low (ulimit -l)");
    }
    check(code, what);
  }
  return FidOwner<fid_mr>(mr);
}

Registration LibfabricNic::register_memory(const MemorySpec& memory) {
  std::unique_lock lock(mutex_, std::defer_lock);
  if (!thread_safe_) lock.lock();
  FidOwner<fid_mr> mr = register_range(memory);
  if (mr_mode_ & FI_MR_ENDPOINT) {
    // Providers with this mode share one endpoint between all links here.
    check(fi_mr_bind(mr.get(), &control_.ep->fid, 0), "binding memory to the endpoint");
    check(fi_mr_enable(mr.get()), "enabling memory");
  }
  Registration registration;
  registration.local = fi_mr_desc(mr.get());
  const uint64_t rkey = fi_mr_key(mr.get());
  if (rkey == FI_KEY_NOTAVAIL) {
    throw NicError(prefix() + "the provider's keys are longer than 64 bits, which is not supported");
  }
  // shm does not check keys at all: whoever may write into our process by the rules of ptrace is trusted. Its keys
  // only tell registrations apart.
  registration.blob = plain_blob(mr_mode_ & FI_MR_VIRT_ADDR ? reinterpret_cast<uint64_t>(memory.address) : 0, rkey);
  registration.handle = mr.release();
  return registration;
}

void LibfabricNic::deregister(Registration& registration) {
  std::unique_lock lock(mutex_, std::defer_lock);
  if (!thread_safe_) lock.lock();
  if (registration.handle) fi_close(&static_cast<fid_mr*>(registration.handle)->fid);
  registration = {};
}

}  // namespace railwire
