#include "cuda/sharing.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace railwire::cuda {
namespace {

constexpr uint8_t kEncoding = 1;
constexpr size_t kEncodedBytes = 1 + 1 + 16 + 3 * 8 + sizeof(IpcMemHandle);
constexpr size_t kMostChunks = 4096;

MemAllocationProp sharable_on(const Device& device) {
  MemAllocationProp properties{};
  properties.type = kAllocationPinned;
  properties.requested_handle_types = kHandlePosixFd;
  properties.location = {kLocationDevice, device.ordinal};
  properties.flags.gpu_direct_rdma_capable = 1;
  return properties;
}

void allow_access(const Device& device, uint64_t address, uint64_t bytes) {
  const MemAccessDesc access{{kLocationDevice, device.ordinal}, kAccessReadWrite};
  driver().check(driver().set_access(address, bytes, &access, 1), "getting access to mapped GPU memory");
}

// ---- exporting
// ---------------------------------------------------------------------------------------------------------
// False: the memory is none of virtual-memory management.
bool export_chunks(const Device& device, uint64_t address, uint64_t length, Exported& out) {
  const Driver& cuda = driver();
  uint64_t cursor = address;
  bool first = true;
  while (cursor < address + length) {
    AllocationHandle handle = 0;
    if (cuda.retain(&handle, reinterpret_cast<void*>(cursor)) != kSuccess) {
      if (first) return false;
      throw CudaError(-1, "the range is not all of one kind of memory");
    }
    DevicePointer base = 0;
    size_t bytes = 0;
    MemAllocationProp properties{};
    Result code = cuda.address_range(&base, &bytes, cursor);
    if (code == kSuccess) code = cuda.properties(&properties, handle);
    int fd = -1;
    const bool sharable = code == kSuccess && (properties.requested_handle_types & kHandlePosixFd);
    if (sharable) code = cuda.export_handle(&fd, handle, kHandlePosixFd, 0);
    cuda.release(handle);
    cuda.check(code, "exporting a chunk of GPU memory");
    if (!sharable) {
      throw CudaError(
          -1,
          "this GPU memory was made by cuMemCreate without a POSIX file descriptor, so no other process can "
          "map it: allocate it with engine.allocate(nbytes, device=...), or without expandable_segments");
    }
    if (properties.location.id != device.ordinal) throw CudaError(-1, "the range lies on more than one GPU");
    out.descriptors.emplace_back(fd);
    if (out.descriptors.size() > kMostChunks) throw CudaError(-1, "the range has more than 4096 chunks");
    if (first) out.range.offset = cursor - base;
    out.range.chunks.push_back(bytes);
    cursor = base + bytes;
    first = false;
  }
  out.range.kind = ShareKind::kDescriptors;
  return true;
}

void export_legacy(uint64_t address, uint64_t length, Exported& out) {
  const Driver& cuda = driver();
  unsigned capable = 0;
  cuda.check(cuda.pointer_attribute(&capable, kPointerLegacyIpc, address), "asking whether GPU memory can be shared");
  if (!capable) {
    throw CudaError(-1,
                    "this GPU memory cannot be shared with other processes (cudaMallocAsync pools and managed memory "
                    "cannot): allocate it with engine.allocate(nbytes, device=...) or torch's default allocator");
  }
  DevicePointer base = 0;
  size_t bytes = 0;
  cuda.check(cuda.address_range(&base, &bytes, address), "finding an allocation of GPU memory");
  if (address + length > base + bytes) throw CudaError(-1, "the range reaches beyond its allocation");
  cuda.check(cuda.ipc_get(&out.range.legacy, address), "exporting GPU memory (CUDA IPC)");
  out.range.kind = ShareKind::kLegacy;
  out.range.offset = address - base;
}

// ---- mapping
// -----------------------------------------------------------------------------------------------------------
// One allocation of a peer.
struct Mapping {
  std::shared_ptr<Device> device;
  uint64_t base = 0;
  uint64_t bytes = 0;  // 0: as much as the driver says
  bool legacy = false;
  std::vector<uint64_t> chunks;

  ~Mapping() {
    const Driver& cuda = driver();
    try {
      const Device::Current current(*device);
      if (legacy) {
        cuda.ipc_close(base);
        return;
      }
      uint64_t at = base;
      for (const uint64_t chunk : chunks) {
        cuda.unmap(at, chunk);
        at += chunk;
      }
      if (base) cuda.unreserve(base, bytes);
    } catch (const CudaError&) {
      // The context is gone, and the mapping with it.
    }
  }
};

std::shared_ptr<Mapping> open_legacy(const std::shared_ptr<Device>& device, const SharedRange& range) {
  const Driver& cuda = driver();
  auto mapping = std::make_shared<Mapping>();
  mapping->device = device;
  DevicePointer base = 0;
  cuda.check(cuda.ipc_open(&base, range.legacy, kIpcLazyPeerAccess),
             "opening a peer's GPU memory (CUDA IPC: both processes need one PID and IPC namespace and GPUs with peer "
             "access, and no MIG)");
  mapping->legacy = true;
  mapping->base = base;
  DevicePointer start = 0;
  size_t bytes = 0;
  cuda.check(cuda.address_range(&start, &bytes, base), "measuring a peer's GPU memory");
  mapping->bytes = bytes;
  return mapping;
}

std::shared_ptr<Mapping> open_chunks(const std::shared_ptr<Device>& device, const SharedRange& range,
                                     const std::vector<OwnedFd>& descriptors) {
  const Driver& cuda = driver();
  if (descriptors.size() != range.chunks.size() || range.chunks.empty() || range.chunks.size() > kMostChunks) {
    throw CudaError(-1, "a peer's GPU memory came with another number of descriptors than it has chunks");
  }
  auto mapping = std::make_shared<Mapping>();
  mapping->device = device;
  uint64_t total = 0;
  for (const uint64_t chunk : range.chunks) {
    if (chunk == 0 || chunk > (uint64_t{1} << 46) - total) throw CudaError(-1, "a peer's GPU memory has a bad size");
    total += chunk;
  }
  cuda.check(cuda.reserve(&mapping->base, total, 0, 0, 0), "reserving addresses for a peer's GPU memory");
  mapping->bytes = total;
  uint64_t at = mapping->base;
  for (size_t i = 0; i < descriptors.size(); ++i) {
    AllocationHandle handle = 0;
    cuda.check(cuda.import_handle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(descriptors[i].get())),
                                  kHandlePosixFd),
               "importing a peer's GPU memory");
    const Result code = cuda.map(at, range.chunks[i], 0, handle, 0);
    cuda.release(handle);
    cuda.check(code, "mapping a peer's GPU memory");
    mapping->chunks.push_back(range.chunks[i]);
    at += range.chunks[i];
  }
  allow_access(*device, mapping->base, total);
  return mapping;
}

class Mapped final : public MappedRange {
 public:
  Mapped(std::shared_ptr<Mapping> mapping, uint64_t offset) : mapping_(std::move(mapping)), offset_(offset) {}
  uint64_t address() const override { return mapping_->base + offset_; }

 private:
  std::shared_ptr<Mapping> mapping_;
  uint64_t offset_;
};

std::mutex mappings_mutex;
using Key = std::pair<int, std::string>;  // device, owner and allocation
std::map<Key, std::weak_ptr<Mapping>>& mappings() {
  static auto* all = new std::map<Key, std::weak_ptr<Mapping>>;
  return *all;
}

}  // namespace

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) ::close(fd_);
}

OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

std::vector<std::byte> encode(const SharedRange& range) {
  std::vector<std::byte> out(kEncodedBytes);
  std::byte* at = out.data();
  const auto put = [&at](const void* data, size_t size) {
    std::memcpy(at, data, size);
    at += size;
  };
  put(&kEncoding, 1);
  put(&range.kind, 1);
  put(&range.gpu, sizeof range.gpu);
  put(&range.allocation, 8);
  put(&range.offset, 8);
  put(&range.length, 8);
  put(&range.legacy, sizeof range.legacy);
  return out;
}

SharedRange decode(const std::byte* data, size_t size) {
  SharedRange range;
  uint8_t encoding = 0;
  if (size != kEncodedBytes) throw CudaError(-1, "malformed description of GPU memory");
  const auto get = [&data](void* to, size_t bytes) {
    std::memcpy(to, data, bytes);
    data += bytes;
  };
  get(&encoding, 1);
  get(&range.kind, 1);
  get(&range.gpu, sizeof range.gpu);
  get(&range.allocation, 8);
  get(&range.offset, 8);
  get(&range.length, 8);
  get(&range.legacy, sizeof range.legacy);
  const bool known = range.kind == ShareKind::kLegacy || range.kind == ShareKind::kDescriptors;
  if (encoding != kEncoding || !known) throw CudaError(-1, "description of GPU memory of another version");
  if (range.length == 0 || range.offset + range.length < range.offset) {
    throw CudaError(-1, "description of GPU memory with a bad range");
  }
  return range;
}

Exported export_range(const std::shared_ptr<Device>& device, uint64_t address, uint64_t length) {
  const Driver& cuda = driver();
  const Device::Current current(*device);
  Exported out;
  out.range.gpu = device->uuid;
  out.range.length = length;
  unsigned managed = 0;
  if (cuda.pointer_attribute(&managed, kPointerIsManaged, address) == kSuccess && managed) {
    throw CudaError(-1, "managed memory cannot be shared with other processes: copy it to ordinary GPU memory");
  }
  cuda.check(cuda.pointer_attribute(&out.range.allocation, kPointerBufferId, address), "identifying GPU memory");
  if (!export_chunks(*device, address, length, out)) export_legacy(address, length, out);
  return out;
}

std::shared_ptr<MappedRange> map_range(const std::shared_ptr<Device>& device, const SharedRange& range,
                                       std::vector<OwnedFd> descriptors, const std::string& owner) {
  // Legacy allocations are opened once; a range of chunks is a mapping of its own.
  const std::string name = owner + std::string(reinterpret_cast<const char*>(&range.allocation), 8) +
                           std::string(range.legacy.reserved, sizeof range.legacy.reserved);
  std::lock_guard lock(mappings_mutex);
  const Device::Current current(*device);
  std::shared_ptr<Mapping> mapping;
  if (range.kind == ShareKind::kLegacy) {
    auto& known = mappings()[{device->ordinal, name}];
    mapping = known.lock();
    if (!mapping) known = mapping = open_legacy(device, range);
    std::erase_if(mappings(), [](const auto& entry) { return entry.second.expired(); });
  } else {
    mapping = open_chunks(device, range, descriptors);
  }
  if (range.offset > mapping->bytes || range.length > mapping->bytes - range.offset) {
    throw CudaError(-1, "a peer's range of GPU memory reaches beyond its allocation");
  }
  return std::make_shared<Mapped>(std::move(mapping), range.offset);
}

SharableMemory::SharableMemory(std::shared_ptr<Device> device, uint64_t bytes) : device_(std::move(device)) {
  const Driver& cuda = driver();
  const Device::Current current(*device_);
  if (!device_->posix_handles) {
    cuda.check(cuda.alloc(&address_, bytes), "allocating GPU memory");
    bytes_ = bytes;
    return;
  }
  MemAllocationProp properties = sharable_on(*device_);
  size_t unit = 0;
  if (cuda.granularity(&unit, &properties, 0) != kSuccess) {
    properties.flags.gpu_direct_rdma_capable = 0;
    cuda.check(cuda.granularity(&unit, &properties, 0), "asking for the granularity of GPU memory");
  }
  bytes_ = (bytes + unit - 1) / unit * unit;
  virtual_memory_ = true;
  AllocationHandle handle = 0;
  Result code = cuda.create(&handle, bytes_, &properties, 0);
  if (code != kSuccess && properties.flags.gpu_direct_rdma_capable) {  // where no NIC could use it
    properties.flags.gpu_direct_rdma_capable = 0;
    code = cuda.create(&handle, bytes_, &properties, 0);
  }
  cuda.check(code, "allocating GPU memory");
  code = cuda.reserve(&address_, bytes_, unit, 0, 0);
  if (code == kSuccess) {
    code = cuda.map(address_, bytes_, 0, handle, 0);
    if (code != kSuccess) cuda.unreserve(address_, bytes_);
  }
  cuda.release(handle);
  cuda.check(code, "mapping GPU memory");
  try {
    allow_access(*device_, address_, bytes_);
  } catch (...) {
    cuda.unmap(address_, bytes_);
    cuda.unreserve(address_, bytes_);
    throw;
  }
}

SharableMemory::~SharableMemory() {
  const Driver& cuda = driver();
  try {
    const Device::Current current(*device_);
    if (virtual_memory_) {
      cuda.unmap(address_, bytes_);
      cuda.unreserve(address_, bytes_);
    } else {
      cuda.free(address_);
    }
  } catch (const CudaError&) {
  }
}

}  // namespace railwire::cuda
