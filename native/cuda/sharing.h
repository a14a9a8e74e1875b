// GPU memory of one process, mapped into another of the same host.
//
// The owner exports a range: what that takes depends on how the memory was allocated.
//
//   cuMemAlloc, torch's default allocator      one legacy IPC handle names the whole allocation, wherever in it we are
//   virtual memory (cuMemCreate; expandable    one file descriptor for each chunk that the range touches: a range may
//   segments, engine.allocate(device=))        have many, and the first one alone would map the wrong bytes behind it
//   anything else (mempools, managed)          cannot be shared: refused, with the reason
//
// The file descriptors travel over a unix socket (the host NIC's). The mapper opens what it was told, once for each
// allocation however many regions lie in it, and closes it when nobody uses it any more. Only handles are trusted
// here, which the driver checks; offsets and lengths are checked against what they open.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace railwire::cuda {

// A file descriptor that is closed once.
class OwnedFd {
 public:
  explicit OwnedFd(int fd = -1) : fd_(fd) {}
  ~OwnedFd();
  OwnedFd(OwnedFd&& other) noexcept : fd_(other.release()) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept;
  int get() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

enum class ShareKind : uint8_t { kLegacy = 1, kDescriptors = 2 };

// What a mapper must know; 128 bytes or less for the wire, and beside it the descriptors.
struct SharedRange {
  ShareKind kind = ShareKind::kLegacy;
  Uuid gpu{};
  uint64_t allocation = 0;       // tells allocations of the owner apart, also later ones at the same address
  uint64_t offset = 0;           // of the range in what the handle, or the descriptors one behind the other, give
  uint64_t length = 0;           // of the range
  IpcMemHandle legacy{};         // kLegacy
  std::vector<uint64_t> chunks;  // kDescriptors: bytes of each
};
std::vector<std::byte> encode(const SharedRange& range);  // without `chunks`: they go with the descriptors
// Throws CudaError on anything that encode() has not made.
SharedRange decode(const std::byte* data, size_t size);

struct Exported {
  SharedRange range;
  std::vector<OwnedFd> descriptors;  // one a chunk
};
// Throws CudaError: this memory cannot be shared, and why.
Exported export_range(const std::shared_ptr<Device>& device, uint64_t address, uint64_t length);

// A peer's range in this process's address space, for the kernels and copy engines of `device`.
class MappedRange {
 public:
  virtual ~MappedRange() = default;
  virtual uint64_t address() const = 0;  // of the range's first byte
};
// `owner`: the owning process's own word for itself (its incarnation): allocations of two owners are never taken for
// one. Descriptors are taken over. Throws CudaError.
std::shared_ptr<MappedRange> map_range(const std::shared_ptr<Device>& device, const SharedRange& range,
                                       std::vector<OwnedFd> descriptors, const std::string& owner);

// Memory of a GPU that can always be shared. Freed when the last reference goes.
class SharableMemory {
 public:
  SharableMemory(std::shared_ptr<Device> device, uint64_t bytes);
  ~SharableMemory();
  SharableMemory(const SharableMemory&) = delete;
  SharableMemory& operator=(const SharableMemory&) = delete;
  uint64_t address() const { return address_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Device> device_;
  uint64_t bytes_ = 0;
  uint64_t address_ = 0;
  bool virtual_memory_ = false;
};

}  // namespace railwire::cuda
