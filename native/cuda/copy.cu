// The copy kernels: any number of pieces, each copied by one warp. copy_ptx.h is made of this file by
// scripts/build-kernels.sh; nobody needs nvcc but who changes it.
#include "copy_piece.h"

namespace railwire::cuda {

// The last block to be done tells the host: everything that any block has written is visible to whoever sees `word`
// reach `value`. `blocks_done` is 0 before and after.
__device__ __forceinline__ void tell(unsigned* blocks_done, unsigned long long* word, unsigned long long value) {
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(blocks_done, 1) != gridDim.x - 1) return;
  *blocks_done = 0;
  __threadfence_system();
  *reinterpret_cast<volatile unsigned long long*>(word) = value;
}

__device__ __forceinline__ void copy_all(const Piece* pieces, unsigned count) {
  const unsigned warps = gridDim.x * (blockDim.x / 32);
  const unsigned lane = threadIdx.x % 32;
  unsigned i = blockIdx.x + gridDim.x * (threadIdx.x / 32);  // few pieces: each on a multiprocessor of its own
  if (i >= count) return;
  Piece piece = pieces[i];
  while (true) {
    const unsigned next = i + warps;
    const Piece ahead = pieces[next < count ? next : i];  // read while this one is copied
    copy_piece(piece, lane, 32);
    if (next >= count) return;
    piece = ahead;
    i = next;
  }
}

struct FewPieces {
  Piece piece[128];
};

}  // namespace railwire::cuda

extern "C" __global__ void __launch_bounds__(512)
    railwire_copy(const railwire::cuda::Piece* pieces, unsigned count, unsigned* blocks_done, unsigned long long* word,
                  unsigned long long value) {
  railwire::cuda::copy_all(pieces, count);
  railwire::cuda::tell(blocks_done, word, value);
}

// The list travels with the launch: nothing has to be uploaded before.
extern "C" __global__ void __launch_bounds__(512)
    railwire_copy_few(const __grid_constant__ railwire::cuda::FewPieces list, unsigned count, unsigned* blocks_done,
                      unsigned long long* word, unsigned long long value) {
  railwire::cuda::copy_all(list.piece, count);
  railwire::cuda::tell(blocks_done, word, value);
}
