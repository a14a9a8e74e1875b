#include "cuda/device.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/copy_ptx.h"

namespace railwire::cuda {
namespace {

std::mutex open_mutex;
std::map<int, std::weak_ptr<Device>>& open_devices() {
  static auto* devices = new std::map<int, std::weak_ptr<Device>>;  // outlives every static that may hold a device
  return *devices;
}

}  // namespace

Device::Device(int ordinal, DeviceHandle handle, const Uuid& uuid, std::string name)
    : ordinal(ordinal), handle(handle), uuid(uuid), name(std::move(name)) {
  const Driver& cuda = driver();
  cuda.check(cuda.primary_retain(&context_, handle), "retaining the primary context");
  multiprocessors = attribute(kMultiprocessorCount);
  posix_handles = attribute(kVirtualMemory) && attribute(kPosixFdHandles);
}

std::shared_ptr<Device> Device::open(int ordinal) {
  const Driver& cuda = driver();
  std::lock_guard lock(open_mutex);
  auto& known = open_devices()[ordinal];
  if (auto device = known.lock()) return device;
  int count = 0;
  cuda.check(cuda.device_count(&count), "counting the GPUs");
  if (ordinal < 0 || ordinal >= count) {
    throw CudaError(-1, "there is no cuda:" + std::to_string(ordinal) + ": this process sees " + std::to_string(count) +
                            " GPUs (CUDA_VISIBLE_DEVICES)");
  }
  DeviceHandle handle = 0;
  Uuid uuid{};
  char name[128] = {};
  cuda.check(cuda.device_get(&handle, ordinal), "opening a GPU");
  cuda.check(cuda.device_uuid(&uuid, handle), "asking for a GPU's UUID");
  cuda.check(cuda.device_name(name, sizeof name, handle), "asking for a GPU's name");
  std::shared_ptr<Device> device(new Device(ordinal, handle, uuid, name));
  known = device;
  return device;
}

Device::~Device() {
  const Driver& cuda = driver();
  if (module_) {
    if (cuda.push(context_) == kSuccess) {
      cuda.module_unload(module_);
      Context popped = nullptr;
      cuda.pop(&popped);
    }
  }
  if (context_) cuda.primary_release(handle);
}

int Device::attribute(DeviceAttribute which) const {
  int value = 0;
  return driver().device_attribute(&value, which, handle) == kSuccess ? value : 0;
}

Function Device::function(const char* name) {
  const Driver& cuda = driver();
  std::lock_guard lock(open_mutex);
  const Current current(*this);
  if (!module_) cuda.check(cuda.module_load(&module_, kCopyPtx), "loading the copy kernels");
  Function function = nullptr;
  cuda.check(cuda.module_function(&function, module_, name), "finding a copy kernel");
  return function;
}

int device_of(const void* pointer) {
  const Driver* cuda = find_driver();
  if (!cuda || !pointer) return -1;
  const auto address = reinterpret_cast<DevicePointer>(pointer);
  unsigned type = 0;
  int ordinal = -1;
  if (cuda->pointer_attribute(&type, kPointerMemoryType, address) != kSuccess || type != kMemoryTypeDevice) return -1;
  if (cuda->pointer_attribute(&ordinal, kPointerDeviceOrdinal, address) != kSuccess) return -1;
  return ordinal;
}

int ordinal_of(const Uuid& uuid) {
  const Driver* cuda = find_driver();
  int count = 0;
  if (!cuda || cuda->device_count(&count) != kSuccess) return -1;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    DeviceHandle handle = 0;
    Uuid other{};
    if (cuda->device_get(&handle, ordinal) != kSuccess || cuda->device_uuid(&other, handle) != kSuccess) continue;
    if (same_gpu(uuid, other)) return ordinal;
  }
  return -1;
}

bool same_gpu(const Uuid& one, const Uuid& other) { return std::memcmp(one.bytes, other.bytes, sizeof one.bytes) == 0; }

std::string to_string(const Uuid& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char digits[4];
    std::snprintf(digits, sizeof digits, "%02x", uuid.bytes[i]);
    text += digits;
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

void allow_peer(const Device& device, const Device& other) {
  const Driver& cuda = driver();
  int can = 0;
  cuda.check(cuda.can_access_peer(&can, device.handle, other.handle), "asking whether two GPUs reach each other");
  if (!can) {
    throw CudaError(-1, "cuda:" + std::to_string(device.ordinal) + " (" + device.name +
                            ") has no peer access to cuda:" + std::to_string(other.ordinal) + " (" + other.name +
                            "): no NVLink, and PCIe does not allow it");
  }
  const Device::Current current(device);
  const Result code = cuda.enable_peer_access(other.context_, 0);
  if (code != kPeerAccessAlready) cuda.check(code, "enabling access from one GPU to another");
}

int export_dmabuf(const Device& device, DevicePointer address, size_t bytes, std::string* why) {
  const Driver& cuda = driver();
  const Device::Current current(device);  // without one the export fails, and seems to lack a kernel module
  int fd = -1;
  const Result code = cuda.range_handle(&fd, address, bytes, kRangeDmaBufFd, 0);
  if (code == kSuccess) return fd;
  *why = cuda.describe(code);
  return -1;
}

void copy_now(const Device& device, DevicePointer to, DevicePointer from, size_t bytes) {
  const Driver& cuda = driver();
  const Device::Current current(device);
  Stream stream = nullptr;
  cuda.check(cuda.stream_create(&stream, kStreamNonBlocking, 0), "creating a stream");
  Result code = cuda.copy(to, from, bytes, stream);
  if (code == kSuccess) code = cuda.stream_synchronize(stream);
  cuda.stream_destroy(stream);
  cuda.check(code, "copying GPU memory");
}

PinnedMemory::PinnedMemory(std::shared_ptr<Device> device, size_t bytes) : device_(std::move(device)), size_(bytes) {
  const Driver& cuda = driver();
  const Device::Current current(*device_);
  void* data = nullptr;
  cuda.check(cuda.host_alloc(&data, bytes, kHostAllocPortable | kHostAllocMapped), "allocating pinned host memory");
  data_ = static_cast<std::byte*>(data);
  std::memset(data, 0, bytes);
  if (const Result code = cuda.host_device_pointer(&device_pointer_, data, 0); code != kSuccess) {
    cuda.host_free(data);
    cuda.fail(code, "mapping pinned host memory");
  }
}

PinnedMemory::~PinnedMemory() {
  const Driver& cuda = driver();
  if (cuda.push(device_->context_) != kSuccess) return;
  cuda.host_free(data_);
  Context popped = nullptr;
  cuda.pop(&popped);
}

}  // namespace railwire::cuda
