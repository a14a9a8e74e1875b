// Our declarations of the CUDA driver's interface are those of cuda.h. Checked where that header is; nothing runs.
#include "cuda/driver_api.h"

#if __has_include(<cuda.h>)
#include <cuda.h>

#include <cstddef>

namespace r = railwire::cuda;
#define SAME(a, b) static_assert((long long)(a) == (long long)(b), #a)
SAME(sizeof(r::MemAllocationProp), sizeof(CUmemAllocationProp));
SAME(sizeof(r::MemAccessDesc), sizeof(CUmemAccessDesc));
SAME(offsetof(r::MemAllocationProp, requested_handle_types), offsetof(CUmemAllocationProp, requestedHandleTypes));
SAME(offsetof(r::MemAllocationProp, location), offsetof(CUmemAllocationProp, location));
SAME(offsetof(r::MemAllocationProp, flags), offsetof(CUmemAllocationProp, allocFlags));
SAME(sizeof(r::IpcMemHandle), sizeof(CUipcMemHandle));
SAME(sizeof(r::Uuid), sizeof(CUuuid));
SAME(r::kHandlePosixFd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME(r::kHandleFabric, CU_MEM_HANDLE_TYPE_FABRIC);
SAME(r::kLocationDevice, CU_MEM_LOCATION_TYPE_DEVICE);
SAME(r::kAllocationPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME(r::kAccessReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME(r::kNotReady, CUDA_ERROR_NOT_READY);
SAME(r::kPeerAccessAlready, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
SAME(r::kHostMemoryAlready, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
SAME(r::kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(r::kComputeMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(r::kComputeMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(r::kVirtualMemory, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME(r::kPosixFdHandles, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
SAME(r::kRdmaWritesOrdering, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING);
SAME(r::kDmaBuf, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED);
SAME(r::kFabricHandles, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);
SAME(r::kPointerMemoryType, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
SAME(r::kPointerBufferId, CU_POINTER_ATTRIBUTE_BUFFER_ID);
SAME(r::kPointerIsManaged, CU_POINTER_ATTRIBUTE_IS_MANAGED);
SAME(r::kPointerDeviceOrdinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME(r::kPointerLegacyIpc, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
SAME(r::kPointerRangeStart, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
SAME(r::kPointerRangeSize, CU_POINTER_ATTRIBUTE_RANGE_SIZE);
SAME(r::kPointerHandleTypes, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES);
SAME(r::kMemoryTypeHost, CU_MEMORYTYPE_HOST);
SAME(r::kMemoryTypeDevice, CU_MEMORYTYPE_DEVICE);
SAME(r::kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
SAME(r::kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
SAME(r::kIpcLazyPeerAccess, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
SAME(r::kHostAllocPortable, CU_MEMHOSTALLOC_PORTABLE);
SAME(r::kHostAllocMapped, CU_MEMHOSTALLOC_DEVICEMAP);
SAME(r::kWaitGreaterOrEqual, CU_STREAM_WAIT_VALUE_GEQ);
SAME(r::kRangeDmaBufFd, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD);
// every function exists under this symbol with as many parameters
template <class F>
struct N;
template <class R, class... A>
struct N<R(A...)> {
  static constexpr int n = sizeof...(A);
};
#undef cuDeviceGetUuid
namespace railwire::cuda {
#define CHECKN(name, symbol, parameters) static_assert(N<Result parameters>::n == N<decltype(::symbol)>::n, #symbol);
RAILWIRE_CUDA_FUNCTIONS(CHECKN)
}  // namespace railwire::cuda
#endif
