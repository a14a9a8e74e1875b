// The entry points of the fake CUDA driver, under the names that libcuda exports.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda/driver_api.h"
#include "fake_cuda/fake_cuda.h"

using namespace railwire::cuda;
using namespace fake_cuda;

namespace {

constexpr Result kInvalidValue = 1, kOutOfMemory = 2, kInvalidContext = 201, kIllegalAddress = 700, kNotSupported = 801,
                 kInvalidHandle = 400, kPeerUnsupported = 217;
constexpr uint64_t kHandleMagic = 0x6164756365616B66;  // "fakecuda"
constexpr size_t kUnit = 2 << 20;

// An IPC handle names the memfd by its owner's descriptor, as long as the owner lives.
struct FakeIpcHandle {
  uint64_t magic;
  int64_t pid;
  int64_t fd;
  uint64_t bytes;
  uint64_t id;
  int64_t device;
};
static_assert(sizeof(FakeIpcHandle) <= sizeof(IpcMemHandle));

// A chunk of virtual memory before it is mapped.
struct Allocation {
  int fd;
  size_t bytes;
  MemAllocationProp properties;
  int references;
};
std::mutex allocations_mutex;
std::map<AllocationHandle, Allocation> allocations;
std::map<uint64_t, AllocationHandle> mapped_at;
AllocationHandle next_allocation = 1;

FakeStream* of(Stream stream) {
  static auto* null_stream = new FakeStream;
  return stream ? reinterpret_cast<FakeStream*>(stream) : null_stream;
}
bool has_context() { return !current().empty(); }
Result context_state() {
  if (!has_context()) return kInvalidContext;
  return broken().load() ? kIllegalAddress : kSuccess;
}
int new_memory(size_t bytes) {
  const int fd = memfd_create("fake-gpu", MFD_CLOEXEC);
  if (fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}
void drop(AllocationHandle handle) {
  const auto found = allocations.find(handle);
  if (found == allocations.end() || --found->second.references > 0) return;
  close(found->second.fd);
  allocations.erase(found);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) Result

EXPORT cuInit(unsigned) { return devices() > 0 ? kSuccess : 100; }
EXPORT cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
EXPORT cuGetErrorName(Result code, const char** name) {
  *name = code == kSuccess          ? "CUDA_SUCCESS"
          : code == kNotReady       ? "CUDA_ERROR_NOT_READY"
          : code == kIllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : code == kOutOfMemory    ? "CUDA_ERROR_OUT_OF_MEMORY"
                                    : "CUDA_ERROR_INVALID_VALUE";
  return kSuccess;
}
EXPORT cuGetErrorString(Result code, const char** text) {
  *text = code == kIllegalAddress ? "an illegal memory access was encountered" : "from the fake driver";
  return kSuccess;
}
EXPORT cuDeviceGetCount(int* count) { return *count = devices(), kSuccess; }
EXPORT cuDeviceGet(DeviceHandle* device, int ordinal) {
  if (ordinal < 0 || ordinal >= devices()) return kInvalidValue;
  return *device = ordinal, kSuccess;
}
EXPORT cuDeviceGetName(char* name, int bytes, DeviceHandle device) {
  std::snprintf(name, static_cast<size_t>(bytes), "Fake GPU %d", device);
  return kSuccess;
}
EXPORT cuDeviceGetUuid_v2(Uuid* uuid, DeviceHandle device) {
  std::memset(uuid->bytes, 0xfa, sizeof uuid->bytes);
  uuid->bytes[15] = static_cast<unsigned char>(device);
  return kSuccess;
}
EXPORT cuDeviceGetAttribute(int* value, int which, DeviceHandle) {
  *value = 0;
  if (which == kMultiprocessorCount) *value = 132;
  if (which == kComputeMajor) *value = 9;
  if (which == kVirtualMemory || which == kPosixFdHandles) *value = !no_vmm();
  if (which == kRdmaWritesOrdering) *value = 100;
  return kSuccess;
}
EXPORT cuDeviceGetPCIBusId(char* text, int bytes, DeviceHandle device) {
  std::snprintf(text, static_cast<size_t>(bytes), "0000:%02x:00.0", 0x17 + device);
  return kSuccess;
}
EXPORT cuDeviceCanAccessPeer(int* can, DeviceHandle one, DeviceHandle other) {
  return *can = one != other && !no_peer(), kSuccess;
}
EXPORT cuDevicePrimaryCtxRetain(Context* context, DeviceHandle device) {
  *context = reinterpret_cast<Context>(static_cast<intptr_t>(device) + 1);
  return kSuccess;
}
EXPORT cuDevicePrimaryCtxRelease_v2(DeviceHandle) { return kSuccess; }
EXPORT cuCtxPushCurrent_v2(Context context) {
  current().push_back(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
  return kSuccess;
}
EXPORT cuCtxPopCurrent_v2(Context* context) {
  if (!has_context()) return kInvalidContext;
  *context = reinterpret_cast<Context>(static_cast<intptr_t>(current().back()) + 1);
  current().pop_back();
  return kSuccess;
}
EXPORT cuCtxEnablePeerAccess(Context, unsigned) { return no_peer() ? kPeerUnsupported : context_state(); }
EXPORT cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, context_state(); }

EXPORT cuModuleLoadData(Module* module, const void* image) {
  if (std::string(static_cast<const char*>(image)).find("railwire_copy") == std::string::npos) return kInvalidValue;
  *module = reinterpret_cast<Module>(1);
  return context_state();
}
EXPORT cuModuleUnload(Module) { return kSuccess; }
EXPORT cuModuleGetFunction(Function* function, Module, const char* name) {
  const std::string wanted = name;
  if (wanted != "railwire_copy" && wanted != "railwire_copy_few") return kInvalidValue;
  *function = reinterpret_cast<Function>(wanted == "railwire_copy" ? intptr_t{1} : intptr_t{2});
  return context_state();
}
EXPORT cuLaunchKernel(Function function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                      unsigned, Stream stream, void** arguments, void**) {
  if (const Result state = context_state(); state != kSuccess) return state;
  if (!blocks || !threads || threads % 32 || threads > 512) return kInvalidValue;
  if (launch_fails()) return kSuccess;  // as on a GPU: the launch is taken, and what follows says that it went wrong
  const unsigned count = *static_cast<unsigned*>(arguments[1]);
  const uint64_t word = *static_cast<DevicePointer*>(arguments[3]);
  const uint64_t value = *static_cast<uint64_t*>(arguments[4]);
  if (reinterpret_cast<intptr_t>(function) == 1) {
    const DevicePointer list = *static_cast<DevicePointer*>(arguments[0]);
    of(stream)->enqueue([=] {
      run_copy(reinterpret_cast<const Piece*>(memory().at(list, count * sizeof(Piece))), count, word, value);
    });
  } else {
    const auto* list = static_cast<const Piece*>(arguments[0]);
    std::vector<Piece> pieces(list, list + count);
    of(stream)->enqueue([=] { run_copy(pieces.data(), count, word, value); });
  }
  return kSuccess;
}

EXPORT cuStreamCreateWithPriority(Stream* stream, unsigned, int) {
  if (const Result state = context_state(); state != kSuccess) return state;
  *stream = reinterpret_cast<Stream>(new FakeStream);
  return kSuccess;
}
EXPORT cuStreamDestroy_v2(Stream stream) { return delete of(stream), kSuccess; }
EXPORT cuStreamQuery(Stream stream) {
  if (const Result state = context_state(); state != kSuccess) return state;
  return of(stream)->idle() ? kSuccess : kNotReady;
}
EXPORT cuStreamSynchronize(Stream stream) { return of(stream)->synchronize(), context_state(); }
EXPORT cuStreamWaitEvent(Stream stream, Event event, unsigned) {
  const FakeEvent at = *reinterpret_cast<FakeEvent*>(event);
  if (at.stream && at.stream != of(stream)) of(stream)->enqueue([at] { at.stream->wait_until(at.count); });
  return context_state();
}
EXPORT cuStreamWaitValue64_v2(Stream stream, DevicePointer address, uint64_t value, unsigned) {
  of(stream)->enqueue([=] {
    const std::atomic_ref<uint64_t> word(*reinterpret_cast<uint64_t*>(memory().at(address, 8)));
    while (word.load(std::memory_order_acquire) < value && !broken().load()) std::this_thread::yield();
  });
  return context_state();
}
EXPORT cuStreamWriteValue64_v2(Stream stream, DevicePointer address, uint64_t value, unsigned) {
  of(stream)->enqueue([=] {
    std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(memory().at(address, 8)))
        .store(value, std::memory_order_release);
  });
  return context_state();
}
EXPORT cuEventCreate(Event* event, unsigned) {
  return *event = reinterpret_cast<Event>(new FakeEvent), context_state();
}
EXPORT cuEventRecord(Event event, Stream stream) {
  *reinterpret_cast<FakeEvent*>(event) = {of(stream), of(stream)->given()};
  return context_state();
}
EXPORT cuEventDestroy_v2(Event event) { return delete reinterpret_cast<FakeEvent*>(event), kSuccess; }

EXPORT cuMemcpyAsync(DevicePointer to, DevicePointer from, size_t bytes, Stream stream) {
  of(stream)->enqueue([=] { memory().copy(to, from, bytes); });
  return context_state();
}
EXPORT cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, Stream stream) {
  return cuMemcpyAsync(to, reinterpret_cast<DevicePointer>(from), bytes, stream);
}
EXPORT cuMemsetD8Async(DevicePointer at, unsigned char value, size_t bytes, Stream stream) {
  of(stream)->enqueue([=] { std::memset(memory().at(at, bytes), value, bytes); });
  return context_state();
}
EXPORT cuMemcpy(DevicePointer to, DevicePointer from, size_t bytes) {
  of(nullptr)->synchronize();
  memory().copy(to, from, bytes);
  return context_state();
}

EXPORT cuMemAlloc_v2(DevicePointer* address, size_t bytes) {
  if (const Result state = context_state(); state != kSuccess) return state;
  if (bytes > size_t{64} << 30) return kOutOfMemory;
  const size_t rounded = (bytes + 511) / 512 * 512;
  const Block* block = memory().add(new_memory(rounded), rounded, current().back(), true);
  return block ? (*address = block->base, kSuccess) : kOutOfMemory;
}
EXPORT cuMemFree_v2(DevicePointer address) { return memory().remove(address), kSuccess; }
EXPORT cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  *address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return *address == MAP_FAILED ? kOutOfMemory : context_state();
}
EXPORT cuMemFreeHost(void*) { return kSuccess; }  // its size is not known here; tests are short
EXPORT cuMemHostRegister_v2(void*, size_t, unsigned) { return context_state(); }
EXPORT cuMemHostUnregister(void*) { return kSuccess; }
EXPORT cuMemHostGetDevicePointer_v2(DevicePointer* device, void* host, unsigned) {
  return *device = reinterpret_cast<DevicePointer>(host), kSuccess;
}
EXPORT cuPointerGetAttribute(void* out, int which, DevicePointer address) {
  const Block* block = memory().find(address);
  if (!block) return kInvalidValue;
  if (which == kPointerMemoryType) *static_cast<unsigned*>(out) = kMemoryTypeDevice;
  if (which == kPointerIsManaged) *static_cast<unsigned*>(out) = 0;
  if (which == kPointerDeviceOrdinal) *static_cast<int*>(out) = block->device;
  if (which == kPointerLegacyIpc) *static_cast<unsigned*>(out) = block->legacy;
  if (which == kPointerBufferId) *static_cast<uint64_t*>(out) = block->id;
  return kSuccess;
}
EXPORT cuMemGetAddressRange_v2(DevicePointer* base, size_t* bytes, DevicePointer address) {
  const Block* block = memory().find(address);
  if (!block) return kInvalidValue;
  if (base) *base = block->base;
  if (bytes) *bytes = block->bytes;
  return kSuccess;
}

EXPORT cuIpcGetMemHandle(IpcMemHandle* handle, DevicePointer address) {
  const Block* block = memory().find(address);
  if (!block || !block->legacy) return kInvalidValue;
  const FakeIpcHandle fake{kHandleMagic, getpid(), block->fd, block->bytes, block->id, block->device};
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle, &fake, sizeof fake);
  return kSuccess;
}
EXPORT cuIpcOpenMemHandle_v2(DevicePointer* address, IpcMemHandle handle, unsigned) {
  FakeIpcHandle fake{};
  std::memcpy(&fake, &handle, sizeof fake);
  if (const Result state = context_state(); state != kSuccess) return state;
  if (no_ipc() || fake.magic != kHandleMagic || fake.pid == getpid()) return kInvalidHandle;
  if (no_peer() && fake.device != current().back()) return kPeerUnsupported;
  const std::string path = "/proc/" + std::to_string(fake.pid) + "/fd/" + std::to_string(fake.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kInvalidHandle;
  const Block* block = memory().add(fd, fake.bytes, static_cast<int>(fake.device), true);
  return block ? (*address = block->base, kSuccess) : kOutOfMemory;
}
EXPORT cuIpcCloseMemHandle(DevicePointer address) { return memory().remove(address), kSuccess; }

EXPORT cuMemGetAllocationGranularity(size_t* unit, const MemAllocationProp*, int) { return *unit = kUnit, kSuccess; }
EXPORT cuMemCreate(AllocationHandle* handle, size_t bytes, const MemAllocationProp* properties, unsigned long long) {
  if (no_vmm() || bytes % kUnit) return kNotSupported;
  std::lock_guard lock(allocations_mutex);
  *handle = next_allocation++;
  allocations[*handle] = {new_memory(bytes), bytes, *properties, 1};
  return context_state();
}
EXPORT cuMemRelease(AllocationHandle handle) {
  std::lock_guard lock(allocations_mutex);
  return drop(handle), kSuccess;
}
EXPORT cuMemRetainAllocationHandle(AllocationHandle* handle, void* address) {
  const Block* block = memory().find(reinterpret_cast<uint64_t>(address));
  std::lock_guard lock(allocations_mutex);
  const auto found = block ? mapped_at.find(block->base) : mapped_at.end();
  if (found == mapped_at.end()) return kInvalidValue;
  ++allocations[found->second].references;
  return *handle = found->second, kSuccess;
}
EXPORT cuMemGetAllocationPropertiesFromHandle(MemAllocationProp* properties, AllocationHandle handle) {
  std::lock_guard lock(allocations_mutex);
  if (!allocations.contains(handle)) return kInvalidValue;
  return *properties = allocations[handle].properties, kSuccess;
}
EXPORT cuMemExportToShareableHandle(void* out, AllocationHandle handle, int type, unsigned long long) {
  std::lock_guard lock(allocations_mutex);
  if (type != kHandlePosixFd || !allocations.contains(handle)) return kInvalidValue;
  if (!(allocations[handle].properties.requested_handle_types & kHandlePosixFd)) return kNotSupported;
  return *static_cast<int*>(out) = fcntl(allocations[handle].fd, F_DUPFD_CLOEXEC, 0), kSuccess;
}
EXPORT cuMemImportFromShareableHandle(AllocationHandle* handle, void* os_handle, int type) {
  if (type != kHandlePosixFd || no_ipc()) return kInvalidValue;
  const int fd = fcntl(static_cast<int>(reinterpret_cast<intptr_t>(os_handle)), F_DUPFD_CLOEXEC, 0);
  const off_t bytes = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
  if (bytes <= 0) return kInvalidValue;
  std::lock_guard lock(allocations_mutex);
  *handle = next_allocation++;
  MemAllocationProp properties{};
  properties.requested_handle_types = kHandlePosixFd;
  allocations[*handle] = {fd, static_cast<size_t>(bytes), properties, 1};
  return kSuccess;
}
EXPORT cuMemAddressReserve(DevicePointer* address, size_t bytes, size_t, DevicePointer, unsigned long long) {
  void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return at == MAP_FAILED ? kOutOfMemory : (*address = reinterpret_cast<DevicePointer>(at), kSuccess);
}
EXPORT cuMemAddressFree(DevicePointer address, size_t bytes) {
  return munmap(reinterpret_cast<void*>(address), bytes) == 0 ? kSuccess : kInvalidValue;
}
EXPORT cuMemMap(DevicePointer address, size_t bytes, size_t offset, AllocationHandle handle, unsigned long long) {
  std::lock_guard lock(allocations_mutex);
  const auto found = allocations.find(handle);
  if (found == allocations.end() || bytes > found->second.bytes) return kInvalidValue;
  const int fd = fcntl(found->second.fd, F_DUPFD_CLOEXEC, 0);
  if (!memory().add(fd, bytes, found->second.properties.location.id, false, offset, address)) return kOutOfMemory;
  mapped_at[address] = handle;
  ++found->second.references;
  return kSuccess;
}
EXPORT cuMemUnmap(DevicePointer address, size_t) {
  std::lock_guard lock(allocations_mutex);
  const auto found = mapped_at.find(address);
  if (found == mapped_at.end()) return kInvalidValue;
  memory().remove(address);
  drop(found->second);
  mapped_at.erase(found);
  return kSuccess;
}
EXPORT cuMemSetAccess(DevicePointer, size_t, const MemAccessDesc*, size_t) { return kSuccess; }
EXPORT cuMemGetHandleForAddressRange(void*, DevicePointer, size_t, int, unsigned long long) { return kNotSupported; }
