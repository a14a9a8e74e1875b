// Copies pieces of memory that a GPU reaches, without ever waiting: on this GPU, to another, to and from pinned host
// memory, to memory of other processes that is mapped here.
//
// Pieces are submitted in batches. A batch is copied by one kernel launch on a few multiprocessors, or by the copy
// engines if its pieces are long. Batches end in the order of submission; the last block, or the stream, writes the
// number of the batch to a word of host memory, and finished() reads that word: no call of the driver.
//
//   submitted --word reaches its number--> finished          (pieces and list may be reused)
//        \____ the driver reports an error ____/ failed: this batch, and all behind it
//
// One thread at a time. A driver's error in a kernel spoils the whole context, which CUDA never takes back: failure()
// then says it for good.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "cuda/copy_piece.h"
#include "cuda/device.h"

namespace railwire::cuda {

struct CopierOptions {
  int multiprocessors = 8;             // at most this many are used by one launch
  uint64_t engine_bytes = 4ull << 20;  // pieces of at least this go through the copy engines
  uint64_t chunk_bytes = 64ull << 10;  // longer pieces are cut, and further while warps would have no work
};

class Copier {
 public:
  Copier(std::shared_ptr<Device> device, CopierOptions options = {});
  ~Copier();  // waits for what is under way
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Takes as many of `pieces` as there is room for and returns how many; their batch is `submitted()` afterwards. 0: no
  // room, or failure(): ask finished() first. Zero-length pieces are fine.
  size_t submit(std::span<const Piece> pieces);
  // What is submitted next waits for what `stream` has been given so far.
  void wait_for(Stream stream);

  uint64_t submitted() const { return submitted_; }       // batches; the first is 1
  uint64_t finished_so_far() const { return finished_; }  // as of the last finished()
  uint64_t finished();                                    // all batches up to this one
  // Why nothing more is copied; empty: nothing is wrong. Looked at by finished(), from time to time.
  const std::string& failure() const { return failure_; }
  const Device& device() const { return *device_; }

 private:
  static constexpr size_t kSlots = 4;               // lists under way
  static constexpr size_t kSlotPieces = 16 * 1024;  // of one list
  static constexpr size_t kFew = 128;               // travel with the launch

  uint64_t chunk_bytes(std::span<const Piece> pieces) const;
  bool by_kernel(std::span<const Piece> chunks);
  bool by_engines(std::span<const Piece> pieces);
  bool ok(Result code, const char* what);
  void look_for_errors();

  const std::shared_ptr<Device> device_;
  const CopierOptions options_;
  Function copy_ = nullptr, copy_few_ = nullptr;
  Stream stream_ = nullptr;
  Event event_ = nullptr;
  DevicePointer lists_ = 0;               // kSlots lists of kSlotPieces
  DevicePointer blocks_done_ = 0;         // the kernels' own counter
  std::unique_ptr<PinnedMemory> pinned_;  // the word, then the lists as they are uploaded
  uint64_t slot_batch_[kSlots] = {};
  size_t next_slot_ = 0;
  uint64_t submitted_ = 0;
  uint64_t finished_ = 0;
  int64_t next_look_ = 0;
  std::string failure_;
};

}  // namespace railwire::cuda
