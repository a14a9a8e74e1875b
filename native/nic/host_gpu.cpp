#include "nic/host_gpu.h"

#include <unistd.h>

#include <cstring>
#include <utility>

namespace railwire {
namespace {

constexpr uint32_t kGpuBlobMagic = 0x47505552;  // "RUPG" in memory: behind key and base

struct BlobHead {
  uint64_t base = 0;
  uint64_t key = 0;
  uint32_t magic = kGpuBlobMagic;
  uint32_t reserved = 0;
  HostToken owner{};
  uint64_t pid = 0;
  uint64_t address = 0;
};

[[noreturn]] void fail(const std::string& what) { throw NicError("shm: " + what); }

}  // namespace

std::vector<std::byte> encode_gpu_blob(const HostGpuBlob& blob, uint64_t base, uint64_t key) {
  const BlobHead head{.base = base, .key = key, .owner = blob.owner, .pid = blob.pid, .address = blob.address};
  std::vector<std::byte> bytes = pack(head);
  const std::vector<std::byte> range = cuda::encode(blob.range);
  bytes.insert(bytes.end(), range.begin(), range.end());
  return bytes;
}

bool decode_gpu_blob(std::span<const std::byte> bytes, HostGpuBlob* blob, RemoteMemory* plain) {
  BlobHead head;
  if (bytes.size() <= sizeof head) return false;
  std::memcpy(&head, bytes.data(), sizeof head);
  if (head.magic != kGpuBlobMagic) return false;
  blob->owner = head.owner;
  blob->pid = head.pid;
  blob->address = head.address;
  try {
    blob->range = cuda::decode(bytes.data() + sizeof head, bytes.size() - sizeof head);
  } catch (const cuda::CudaError& error) {
    fail(error.what());
  }
  *plain = {.base = head.base, .rkey = head.key};
  return true;
}

std::string HostGpu::refuses(const MemorySpec& memory) const {
  if (memory.device < 0) return "";
  std::string why;
  if (!cuda::find_driver(&why)) return "shm: " + why;
  if (ordinal_ < 0) {
    return "shm: this engine has no GPU: make it with device=\"cuda:" + std::to_string(memory.device) + "\"";
  }
  if (memory.device != ordinal_) {
    return "shm: memory of cuda:" + std::to_string(memory.device) +
           ", but the engine's device is cuda:" + std::to_string(ordinal_) + ": give each GPU an engine of its own";
  }
  try {
    cuda::export_range(cuda::Device::open(ordinal_), reinterpret_cast<uintptr_t>(memory.address), memory.length);
    return "";
  } catch (const cuda::CudaError& error) {
    return std::string("shm: ") + error.what();
  }
}

int HostGpu::take_bounce() {
  if (free_bounces_.empty()) return -1;
  const int bounce = free_bounces_.back();
  free_bounces_.pop_back();
  return bounce;
}

void HostGpu::open_copier() {
  std::lock_guard lock(mutex_);
  if (copier_) return;
  try {
    device_ = cuda::Device::open(ordinal_);
    bounces_ = std::make_unique<cuda::PinnedMemory>(device_, kBounces * kBounceBytes);
    for (int i = 0; i < static_cast<int>(kBounces); ++i) free_bounces_.push_back(i);
    copier_ = std::make_unique<cuda::Copier>(device_, cuda::CopierOptions{.multiprocessors = options_.multiprocessors});
  } catch (const cuda::CudaError& error) {
    fail(error.what());
  }
}

std::vector<std::byte> HostGpu::share(const MemorySpec& memory, uint64_t base, uint64_t key, const HostToken& owner) {
  open_copier();
  const auto address = reinterpret_cast<uintptr_t>(memory.address);
  try {
    cuda::Exported exported = cuda::export_range(device_, address, memory.length);
    const HostGpuBlob blob{
        .owner = owner, .pid = static_cast<uint64_t>(getpid()), .address = address, .range = exported.range};
    std::lock_guard lock(mutex_);
    own_.emplace(key, std::move(exported));
    return encode_gpu_blob(blob, base, key);
  } catch (const cuda::CudaError& error) {
    fail(error.what());
  }
}

void HostGpu::forget(uint64_t key) {
  std::lock_guard lock(mutex_);
  own_.erase(key);
}

bool HostGpu::chunks(uint64_t key, std::vector<int>* descriptors, std::vector<uint64_t>* sizes) const {
  std::lock_guard lock(mutex_);
  const auto found = own_.find(key);
  if (found == own_.end()) return false;
  for (const cuda::OwnedFd& fd : found->second.descriptors) descriptors->push_back(fd.get());
  *sizes = found->second.range.chunks;
  return true;
}

void HostGpu::map(uint64_t key, const HostGpuBlob& blob, bool same_process, const Fetch& fetch) {
  if (ordinal_ < 0) {
    fail("the peer's memory is on a GPU, and this engine has none: make it with device=\"cuda:N\", or use tcp");
  }
  open_copier();
  Import import;
  import.owner = blob.owner;
  try {
    const int theirs = same_process ? cuda::device_of(reinterpret_cast<const void*>(blob.address)) : ordinal_;
    if (theirs < 0) fail("the memory of a peer in this process is no GPU's any more");
    if (same_process && (theirs == ordinal_ || blob.range.kind != cuda::ShareKind::kDescriptors)) {
      // IPC handles of one's own cannot be opened; the address does as it is, once the GPUs may reach each other.
      // Virtual memory is not part of that: it has to be mapped for our GPU, as in another process.
      if (theirs != ordinal_) cuda::allow_peer(*device_, *cuda::Device::open(theirs));
      import.address = blob.address;
    } else {
      cuda::SharedRange range = blob.range;
      std::vector<cuda::OwnedFd> descriptors;
      if (range.kind == cuda::ShareKind::kDescriptors) fetch(&descriptors, &range.chunks);
      import.range = cuda::map_range(device_, range, std::move(descriptors), to_hex(blob.owner));
      import.address = import.range->address();
    }
  } catch (const cuda::CudaError& error) {
    fail(error.what());
  }
  std::lock_guard lock(mutex_);
  auto [place, fresh] = imports_.try_emplace(key, std::move(import));
  if (!fresh && place->second.owner != blob.owner) fail("two peers share memory under one key");
  ++place->second.uses;
  ++changes_;
}

void HostGpu::unmap(uint64_t key) {
  Import gone;  // closed after the lock
  std::lock_guard lock(mutex_);
  const auto found = imports_.find(key);
  if (found == imports_.end() || --found->second.uses > 0) return;
  ++changes_;
  gone = std::move(found->second);
  imports_.erase(found);
}

uint64_t HostGpu::mapped(uint64_t key, const HostToken& owner) const {
  std::lock_guard lock(mutex_);
  const auto found = imports_.find(key);
  return found != imports_.end() && found->second.owner == owner ? found->second.address : 0;
}

}  // namespace railwire
