// GPU memory behind the shm NIC: our own that peers may map, theirs that is mapped here, and the copies.
//
// The writer copies, as with host memory: its GPU reads the source and writes the peer's memory through a mapping (CUDA
// IPC, or file descriptors of virtual memory). Where one side is host memory, bytes go through pinned memory of ours:
// one step is the GPU's, the other the CPU's (a copy here, CMA to the peer).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cuda/copier.h"
#include "cuda/sharing.h"
#include "nic/gpu_options.h"
#include "nic/host_frames.h"
#include "nic/nic.h"

namespace railwire {

// What a peer's blob says besides key and base.
struct HostGpuBlob {
  HostToken owner{};  // the NIC that registered it: descriptors are asked for there
  uint64_t pid = 0;
  uint64_t address = 0;  // in the owner's process
  cuda::SharedRange range;
};
std::vector<std::byte> encode_gpu_blob(const HostGpuBlob& blob, uint64_t base, uint64_t key);
// False: it is not one of GPU memory. Throws NicError on a malformed one.
bool decode_gpu_blob(std::span<const std::byte> bytes, HostGpuBlob* blob, RemoteMemory* plain);

class HostGpu {
 public:
  using Fetch = std::function<void(std::vector<cuda::OwnedFd>* descriptors, std::vector<uint64_t>* sizes)>;
  static constexpr size_t kBounceBytes = 1 << 20;
  static constexpr size_t kBounces = 8;

  explicit HostGpu(const GpuOptions& options) : ordinal_(options.ordinal), options_(options) {}

  // ---- set-up; any thread -------------------------------------------------------------------------------------------
  // Why this memory cannot be shared; empty: it can.
  std::string refuses(const MemorySpec& memory) const;
  // Makes ready what peers will ask for under `key`; returns the blob. Throws NicError.
  std::vector<std::byte> share(const MemorySpec& memory, uint64_t base, uint64_t key, const HostToken& owner);
  void forget(uint64_t key);
  // Descriptors and chunks of a region of ours; false: there is none.
  bool chunks(uint64_t key, std::vector<int>* descriptors, std::vector<uint64_t>* sizes) const;
  // Maps what a peer has shared; `fetch` gets the descriptors from the owner. Throws NicError.
  void map(uint64_t key, const HostGpuBlob& blob, bool same_process, const Fetch& fetch);
  void unmap(uint64_t key);
  // Where the peer's region begins for our GPU; 0: it is not mapped, or it is another peer's.
  uint64_t mapped(uint64_t key, const HostToken& owner) const;
  // Moves whenever an answer of mapped() may have changed.
  uint64_t changes() const { return changes_.load(std::memory_order_acquire); }

  // ---- the driver's -------------------------------------------------------------------------------------------------
  // Whether pieces given now should wait for more: enough is under way to keep the GPU busy.
  bool busy() const { return copier_->submitted() - copier_->finished_so_far() >= 3; }
  // Copies a prefix; it has ended when finished() reaches submitted() as of now. 0: no room now, or failed().
  size_t copy(std::span<const cuda::Piece> pieces) { return copier_->submit(pieces); }
  uint64_t submitted() const { return copier_ ? copier_->submitted() : 0; }
  uint64_t finished() { return copier_ ? copier_->finished() : 0; }
  bool failed() const { return copier_ && !copier_->failure().empty(); }
  std::string failure() const { return copier_ ? copier_->failure() : ""; }
  // A pinned buffer of kBounceBytes; -1: all are taken.
  int take_bounce();
  void give_bounce(int bounce) { free_bounces_.push_back(bounce); }
  std::byte* bounce(int index) const { return bounces_->data() + static_cast<size_t>(index) * kBounceBytes; }
  uint64_t bounce_on_gpu(int index) const { return bounces_->on_device(static_cast<size_t>(index) * kBounceBytes); }

 private:
  void open_copier();

  struct Import {
    HostToken owner{};
    std::shared_ptr<cuda::MappedRange> range;
    uint64_t address = 0;
    uint32_t uses = 0;
  };

  const int ordinal_;  // the engine's GPU; -1: it has none
  const GpuOptions options_;
  mutable std::mutex mutex_;
  std::shared_ptr<cuda::Device> device_;
  std::map<uint64_t, cuda::Exported> own_;
  std::map<uint64_t, Import> imports_;
  std::atomic<uint64_t> changes_{1};
  std::unique_ptr<cuda::Copier> copier_;  // made with the first registration or import, before any WR can name it
  std::unique_ptr<cuda::PinnedMemory> bounces_;
  std::vector<int> free_bounces_;
};

}  // namespace railwire
