// The part of the CUDA driver's interface that Railwire calls, declared here: building needs no toolkit.
//
// Names, values and layouts are those of cuda.h (CUDA 12.0 and later; read in 13.0); native/tests/cuda_abi_test.cu
// holds them against the real header where there is one. The functions are looked up in libcuda at run time (driver.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace railwire::cuda {

using Result = int;  // CUresult
inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;           // CUDA_ERROR_NOT_READY
inline constexpr Result kPeerAccessAlready = 704;  // CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
inline constexpr Result kHostMemoryAlready = 712;  // CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED

using DeviceHandle = int;                     // CUdevice
using DevicePointer = uint64_t;               // CUdeviceptr
using AllocationHandle = unsigned long long;  // CUmemGenericAllocationHandle
struct ContextTag;
using Context = ContextTag*;
struct StreamTag;
using Stream = StreamTag*;
struct EventTag;
using Event = EventTag*;
struct ModuleTag;
using Module = ModuleTag*;
struct FunctionTag;
using Function = FunctionTag*;

struct Uuid {
  unsigned char bytes[16];
};
struct IpcMemHandle {
  char reserved[64];
};
struct MemLocation {
  int type;  // 1: device
  int id;
};
inline constexpr int kLocationDevice = 1;
struct MemAllocationProp {
  int type;  // 1: pinned
  int requested_handle_types;
  MemLocation location;
  void* win32_meta_data;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};
inline constexpr int kAllocationPinned = 1;
inline constexpr int kHandlePosixFd = 1;
inline constexpr int kHandleFabric = 8;
struct MemAccessDesc {
  MemLocation location;
  int flags;  // 3: read and write
};
inline constexpr int kAccessReadWrite = 3;

enum DeviceAttribute : int {
  kMultiprocessorCount = 16,
  kComputeMajor = 75,
  kComputeMinor = 76,
  kVirtualMemory = 102,
  kPosixFdHandles = 103,
  kRdmaWritesOrdering = 118,
  kDmaBuf = 124,
  kFabricHandles = 128,
};
enum PointerAttribute : int {
  kPointerMemoryType = 2,  // 1: host, 2: device
  kPointerBufferId = 7,
  kPointerIsManaged = 8,
  kPointerDeviceOrdinal = 9,
  kPointerLegacyIpc = 10,
  kPointerRangeStart = 11,
  kPointerRangeSize = 12,
  kPointerHandleTypes = 14,
};
inline constexpr unsigned kMemoryTypeHost = 1, kMemoryTypeDevice = 2;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kIpcLazyPeerAccess = 1;
inline constexpr unsigned kHostAllocPortable = 1, kHostAllocMapped = 2;
inline constexpr unsigned kWaitGreaterOrEqual = 0;
inline constexpr int kRangeDmaBufFd = 1;

// X(name in the table, symbol in libcuda, parameters): all that is needed. An older driver without one of these is
// refused.
#define RAILWIRE_CUDA_FUNCTIONS(X)                                                                            \
  X(init, cuInit, (unsigned))                                                                                 \
  X(driver_version, cuDriverGetVersion, (int*))                                                               \
  X(error_name, cuGetErrorName, (Result, const char**))                                                       \
  X(error_text, cuGetErrorString, (Result, const char**))                                                     \
  X(device_count, cuDeviceGetCount, (int*))                                                                   \
  X(device_get, cuDeviceGet, (DeviceHandle*, int))                                                            \
  X(device_name, cuDeviceGetName, (char*, int, DeviceHandle))                                                 \
  X(device_uuid, cuDeviceGetUuid_v2, (Uuid*, DeviceHandle))                                                   \
  X(device_attribute, cuDeviceGetAttribute, (int*, int, DeviceHandle))                                        \
  X(device_pci, cuDeviceGetPCIBusId, (char*, int, DeviceHandle))                                              \
  X(can_access_peer, cuDeviceCanAccessPeer, (int*, DeviceHandle, DeviceHandle))                               \
  X(primary_retain, cuDevicePrimaryCtxRetain, (Context*, DeviceHandle))                                       \
  X(primary_release, cuDevicePrimaryCtxRelease_v2, (DeviceHandle))                                            \
  X(push, cuCtxPushCurrent_v2, (Context))                                                                     \
  X(pop, cuCtxPopCurrent_v2, (Context*))                                                                      \
  X(enable_peer_access, cuCtxEnablePeerAccess, (Context, unsigned))                                           \
  X(stream_priorities, cuCtxGetStreamPriorityRange, (int*, int*))                                             \
  X(module_load, cuModuleLoadData, (Module*, const void*))                                                    \
  X(module_unload, cuModuleUnload, (Module))                                                                  \
  X(module_function, cuModuleGetFunction, (Function*, Module, const char*))                                   \
  X(launch, cuLaunchKernel,                                                                                   \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**)) \
  X(stream_create, cuStreamCreateWithPriority, (Stream*, unsigned, int))                                      \
  X(stream_destroy, cuStreamDestroy_v2, (Stream))                                                             \
  X(stream_query, cuStreamQuery, (Stream))                                                                    \
  X(stream_synchronize, cuStreamSynchronize, (Stream))                                                        \
  X(stream_wait_event, cuStreamWaitEvent, (Stream, Event, unsigned))                                          \
  X(stream_wait_value, cuStreamWaitValue64_v2, (Stream, DevicePointer, uint64_t, unsigned))                   \
  X(stream_write_value, cuStreamWriteValue64_v2, (Stream, DevicePointer, uint64_t, unsigned))                 \
  X(event_create, cuEventCreate, (Event*, unsigned))                                                          \
  X(event_record, cuEventRecord, (Event, Stream))                                                             \
  X(event_destroy, cuEventDestroy_v2, (Event))                                                                \
  X(copy, cuMemcpyAsync, (DevicePointer, DevicePointer, size_t, Stream))                                      \
  X(copy_to_device, cuMemcpyHtoDAsync_v2, (DevicePointer, const void*, size_t, Stream))                       \
  X(fill, cuMemsetD8Async, (DevicePointer, unsigned char, size_t, Stream))                                    \
  X(alloc, cuMemAlloc_v2, (DevicePointer*, size_t))                                                           \
  X(free, cuMemFree_v2, (DevicePointer))                                                                      \
  X(host_alloc, cuMemHostAlloc, (void**, size_t, unsigned))                                                   \
  X(host_free, cuMemFreeHost, (void*))                                                                        \
  X(host_register, cuMemHostRegister_v2, (void*, size_t, unsigned))                                           \
  X(host_unregister, cuMemHostUnregister, (void*))                                                            \
  X(host_device_pointer, cuMemHostGetDevicePointer_v2, (DevicePointer*, void*, unsigned))                     \
  X(pointer_attribute, cuPointerGetAttribute, (void*, int, DevicePointer))                                    \
  X(address_range, cuMemGetAddressRange_v2, (DevicePointer*, size_t*, DevicePointer))                         \
  X(ipc_get, cuIpcGetMemHandle, (IpcMemHandle*, DevicePointer))                                               \
  X(ipc_open, cuIpcOpenMemHandle_v2, (DevicePointer*, IpcMemHandle, unsigned))                                \
  X(ipc_close, cuIpcCloseMemHandle, (DevicePointer))                                                          \
  X(granularity, cuMemGetAllocationGranularity, (size_t*, const MemAllocationProp*, int))                     \
  X(create, cuMemCreate, (AllocationHandle*, size_t, const MemAllocationProp*, unsigned long long))           \
  X(release, cuMemRelease, (AllocationHandle))                                                                \
  X(retain, cuMemRetainAllocationHandle, (AllocationHandle*, void*))                                          \
  X(properties, cuMemGetAllocationPropertiesFromHandle, (MemAllocationProp*, AllocationHandle))               \
  X(export_handle, cuMemExportToShareableHandle, (void*, AllocationHandle, int, unsigned long long))          \
  X(import_handle, cuMemImportFromShareableHandle, (AllocationHandle*, void*, int))                           \
  X(reserve, cuMemAddressReserve, (DevicePointer*, size_t, size_t, DevicePointer, unsigned long long))        \
  X(unreserve, cuMemAddressFree, (DevicePointer, size_t))                                                     \
  X(map, cuMemMap, (DevicePointer, size_t, size_t, AllocationHandle, unsigned long long))                     \
  X(unmap, cuMemUnmap, (DevicePointer, size_t))                                                               \
  X(range_handle, cuMemGetHandleForAddressRange, (void*, DevicePointer, size_t, int, unsigned long long))     \
  X(set_access, cuMemSetAccess, (DevicePointer, size_t, const MemAccessDesc*, size_t))

}  // namespace railwire::cuda
