// GPU memory for tests: of the fake driver, or of the machine's GPU with RAILWIRE_TEST_GPU=1.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <vector>

#include "cuda/sharing.h"

// The device, or null where the test is to be left out: no GPU was asked for, and the fake driver is not beside us.
inline std::shared_ptr<railwire::cuda::Device> gpu_or_skip(int ordinal) {
  static const bool chosen = [] {
    if (!std::getenv("RAILWIRE_TEST_GPU")) setenv("RAILWIRE_LIBCUDA", RAILWIRE_FAKE_CUDA, 1);
    return true;
  }();
  (void)chosen;
  std::string why;
  if (!railwire::cuda::find_driver(&why)) FAIL(why);
  return railwire::cuda::Device::open(ordinal);
}

inline std::vector<unsigned char> read_gpu(const std::shared_ptr<railwire::cuda::Device>& device, uint64_t address,
                                           size_t length) {
  std::vector<unsigned char> bytes(length);
  railwire::cuda::copy_now(*device, reinterpret_cast<uint64_t>(bytes.data()), address, length);
  return bytes;
}

// One cuMemAlloc.
class GpuBytes {
 public:
  GpuBytes(std::shared_ptr<railwire::cuda::Device> device, size_t bytes) : device_(std::move(device)), bytes_(bytes) {
    const railwire::cuda::Device::Current current(*device_);
    railwire::cuda::driver().check(railwire::cuda::driver().alloc(&address_, bytes), "alloc");
  }
  ~GpuBytes() {
    const railwire::cuda::Device::Current current(*device_);
    railwire::cuda::driver().free(address_);
  }
  uint64_t address() const { return address_; }
  void fill(const std::vector<unsigned char>& bytes) {
    railwire::cuda::copy_now(*device_, address_, reinterpret_cast<uint64_t>(bytes.data()), bytes.size());
  }
  std::vector<unsigned char> read() const { return read_gpu(device_, address_, bytes_); }

 private:
  std::shared_ptr<railwire::cuda::Device> device_;
  size_t bytes_;
  railwire::cuda::DevicePointer address_ = 0;
};

// Virtual memory of several chunks side by side, as torch's expandable segments are.
class ChunkedGpuBytes {
 public:
  ChunkedGpuBytes(std::shared_ptr<railwire::cuda::Device> device, std::vector<size_t> chunks)
      : device_(std::move(device)), chunks_(std::move(chunks)) {
    using namespace railwire::cuda;
    const Driver& cuda = driver();
    const Device::Current current(*device_);
    for (const size_t chunk : chunks_) total_ += chunk;
    cuda.check(cuda.reserve(&address_, total_, 0, 0, 0), "reserve");
    MemAllocationProp properties{};
    properties.type = kAllocationPinned;
    properties.requested_handle_types = kHandlePosixFd;
    properties.location = {kLocationDevice, device_->ordinal};
    uint64_t at = address_;
    for (const size_t chunk : chunks_) {
      AllocationHandle handle = 0;
      cuda.check(cuda.create(&handle, chunk, &properties, 0), "create");
      cuda.check(cuda.map(at, chunk, 0, handle, 0), "map");
      cuda.check(cuda.release(handle), "release");
      at += chunk;
    }
    const MemAccessDesc access{{kLocationDevice, device_->ordinal}, kAccessReadWrite};
    cuda.check(cuda.set_access(address_, total_, &access, 1), "access");
  }
  ~ChunkedGpuBytes() {
    const auto& cuda = railwire::cuda::driver();
    const railwire::cuda::Device::Current current(*device_);
    uint64_t at = address_;
    for (const size_t chunk : chunks_) {
      cuda.unmap(at, chunk);
      at += chunk;
    }
    cuda.unreserve(address_, total_);
  }
  uint64_t address() const { return address_; }
  void fill(size_t offset, const std::vector<unsigned char>& bytes) {
    railwire::cuda::copy_now(*device_, address_ + offset, reinterpret_cast<uint64_t>(bytes.data()), bytes.size());
  }

 private:
  std::shared_ptr<railwire::cuda::Device> device_;
  std::vector<size_t> chunks_;
  size_t total_ = 0;
  railwire::cuda::DevicePointer address_ = 0;
};
