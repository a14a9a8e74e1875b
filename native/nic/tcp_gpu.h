// GPU memory behind the tcp NIC: pinned blocks between the engine's GPU and the sockets, and the copies between them.
//
//   GPU memory --copy kernel--> blocks --socket--> ... --socket--> blocks --copy kernel--> GPU memory
//
// All copies of a NIC are numbered; they begin and end in this order, so that a number says how far all has come.
// TcpGpuOut and TcpGpuIn are what one link has of it. Blocks for what goes out and for what comes in are apart: those
// that come in are free again as soon as they are copied, whatever the peers do.
//
// Everything but refuses() and open() is called under the NIC's lock.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cuda/copier.h"
#include "nic/gpu_options.h"
#include "nic/nic.h"

namespace railwire {

class TcpGpu {
 public:
  static constexpr size_t kBlockBytes = 256 << 10;
  static constexpr size_t kBlocks = 32;  // each way
  enum Way : uint8_t { kOut, kIn };

  explicit TcpGpu(const GpuOptions& options) : ordinal_(options.ordinal), options_(options) {}

  // Why this memory cannot be sent from or received into; empty: it can.
  std::string refuses(const MemorySpec& memory) const;
  // Makes the copier and the blocks, once, before any memory is registered. Throws NicError.
  void open(std::mutex& nic);  // whose lock guards the rest

  int take(Way way);  // a block; -1: all are taken
  void give(int block);
  void give_after(int block, uint64_t copy);  // once this copy has ended
  std::byte* bytes(int block) const { return blocks_->data() + static_cast<size_t>(block) * kBlockBytes; }
  uint64_t on_gpu(int block) const { return blocks_->on_device(static_cast<size_t>(block) * kBlockBytes); }
  size_t& users(Way way) { return users_[way]; }  // links that have blocks

  uint64_t copy(uint64_t from, uint64_t to, uint64_t length);  // returns its number
  uint64_t asked() const { return asked_; }
  uint64_t given() const { return given_; }    // so many are the copier's
  uint64_t copied() const { return copied_; }  // so many have ended, as of the last progress()
  bool busy() const { return asked_ > copied_ && !failed(); }
  void progress();
  // A copy has failed: none will end any more, and none is under way.
  bool failed() const { return copier_ && !copier_->failure().empty(); }
  std::string failure() const { return copier_ ? copier_->failure() : ""; }

 private:
  struct Batch {
    uint64_t number, last_copy;
  };
  struct Lent {
    int block;
    uint64_t until;
  };

  const int ordinal_;  // the engine's GPU; -1: it has none
  const GpuOptions options_;
  std::mutex opening_;
  std::unique_ptr<cuda::PinnedMemory> blocks_;
  std::unique_ptr<cuda::Copier> copier_;
  std::vector<int> free_[2];
  size_t users_[2] = {};
  std::deque<Lent> lent_;
  std::deque<Batch> batches_;
  std::vector<cuda::Piece> pieces_;  // that the copier has not got yet, from first_ on
  size_t first_ = 0;
  uint64_t asked_ = 0, given_ = 0;
  std::atomic<uint64_t> copied_{0};
};

// Bytes of a GPU on their way to one socket, in the order in which they are sent.
class TcpGpuOut {
 public:
  explicit TcpGpuOut(TcpGpu& gpu) : gpu_(gpu) {}
  ~TcpGpuOut() { drop(); }
  TcpGpuOut(const TcpGpuOut&) = delete;
  TcpGpuOut& operator=(const TcpGpuOut&) = delete;

  // Has a prefix of these bytes copied, behind all before; returns how long it is. 0: no block is free.
  uint64_t add(uint64_t source, uint64_t length);
  // Bytes that are here and not taken yet, up to `most`.
  size_t ready(size_t most) const;
  // The next of them, up to `most`, contiguous. They stay until sent().
  std::span<std::byte> take(size_t most);
  void sent();  // all that was taken
  void drop();  // all of it; the copies end by themselves

 private:
  struct Mark {  // bytes up to `end` are here when `copy` has ended
    size_t end;
    uint64_t copy;
  };
  struct Block {
    int block;
    size_t filled = 0, taken = 0;
    std::deque<Mark> marks{};
  };
  size_t here(const Block& block) const;

  TcpGpu& gpu_;
  std::deque<Block> blocks_;
  size_t current_ = 0;  // the block that take() is at
};

// Bytes of one socket on their way to a GPU.
class TcpGpuIn {
 public:
  explicit TcpGpuIn(TcpGpu& gpu) : gpu_(gpu) {}
  ~TcpGpuIn() { finish(); }
  TcpGpuIn(const TcpGpuIn&) = delete;
  TcpGpuIn& operator=(const TcpGpuIn&) = delete;

  // Whether there is room for so many bytes (at most two blocks) at once.
  bool has_room(size_t bytes);
  // Offers room for up to `length` bytes as places behind those offered before; returns how many bytes.
  size_t offer(size_t length, std::span<iovec> places, size_t* used);
  // The next bytes that were offered (or those at `from`, for which there is room) belong there. Returns the copy's
  // number.
  uint64_t land(const std::byte* from, uint64_t destination, size_t length);
  // Nothing of what was offered is used any more, but for what is to be copied.
  void finish();

 private:
  bool grow();

  TcpGpu& gpu_;
  std::vector<int> blocks_;
  size_t offered_ = 0, landed_ = 0;  // bytes, over all blocks
  uint64_t last_ = 0;
};

}  // namespace railwire
