// One GPU as this process uses it: its primary context (the one that torch uses, too), and who it is.
#pragma once

#include <memory>
#include <string>

#include "cuda/driver.h"

namespace railwire::cuda {

class PinnedMemory;

class Device {
 public:
  // The GPU with this ordinal. One object a GPU and process, alive while anybody holds it; its context is retained as
  // long. Throws CudaError. No other GPU gets a context by it.
  static std::shared_ptr<Device> open(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const int ordinal;
  const DeviceHandle handle;
  const Uuid uuid;  // tells GPUs apart between processes: ordinals do not
  const std::string name;
  int multiprocessors = 0;
  bool posix_handles = false;  // virtual-memory allocations can be shared as file descriptors

  int attribute(DeviceAttribute which) const;
  // The device's kernels, loaded at first use.
  Function function(const char* name);

  // This device's context is current in the thread while one of these lives; afterwards whichever was before.
  class Current {
   public:
    explicit Current(const Device& device) {
      driver().check(driver().push(device.context_), "making a context current");
    }
    ~Current() {
      Context popped = nullptr;
      driver().pop(&popped);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
  };

 private:
  friend class Current;
  friend class PinnedMemory;
  friend void allow_peer(const Device& device, const Device& other);
  Device(int ordinal, DeviceHandle handle, const Uuid& uuid, std::string name);

  Context context_ = nullptr;
  Module module_ = nullptr;
};

// The ordinal of the GPU that a pointer belongs to; -1: not a GPU's memory (host memory, or nothing CUDA knows, or no
// driver). However it was made: torch, CuPy, cuMemAlloc, a mapped allocation, a peer's memory.
int device_of(const void* pointer);
// The ordinal of the GPU with this UUID in this process; -1: not visible here.
int ordinal_of(const Uuid& uuid);
bool same_gpu(const Uuid& one, const Uuid& other);
std::string to_string(const Uuid& uuid);  // "GPU-7ea8ef28-..."

// Lets `device` reach memory of `other`, in this process. Throws CudaError: there is no path between the two.
void allow_peer(const Device& device, const Device& other);

// A dma-buf of whole pages of GPU memory, for NICs; -1: the driver exports none, and *why says it in its words.
int export_dmabuf(const Device& device, DevicePointer address, size_t bytes, std::string* why);

// Copies and waits: for set-up, tests and benchmarks, never for transfers. Either address may be host memory.
void copy_now(const Device& device, DevicePointer to, DevicePointer from, size_t bytes);

// Host memory that both sides see, page-locked: words and staging. Freed by its destructor.
class PinnedMemory {
 public:
  PinnedMemory(std::shared_ptr<Device> device, size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return data_; }
  DevicePointer on_device(size_t offset = 0) const { return device_pointer_ + offset; }
  size_t size() const { return size_; }

 private:
  std::shared_ptr<Device> device_;
  std::byte* data_ = nullptr;
  DevicePointer device_pointer_ = 0;
  size_t size_ = 0;
};

}  // namespace railwire::cuda
