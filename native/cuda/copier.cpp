#include "cuda/copier.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <utility>

namespace railwire::cuda {
namespace {

constexpr size_t kWordBytes = 64;          // the word has a cache line of its own
constexpr int64_t kLookEvery = 2'000'000;  // at the driver, for errors, while something is under way
constexpr uint64_t kShortestChunk = 4096;  // 8 loads of 16 bytes for each lane of a warp
constexpr uint64_t kChunksPerWarp = 2;
constexpr unsigned kThreads = 512;
constexpr unsigned kWarps = kThreads / 32;

int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

Copier::Copier(std::shared_ptr<Device> device, CopierOptions options) : device_(std::move(device)), options_(options) {
  const Driver& cuda = driver();
  copy_ = device_->function("railwire_copy");
  copy_few_ = device_->function("railwire_copy_few");
  pinned_ = std::make_unique<PinnedMemory>(device_, kWordBytes + kSlots * kSlotPieces * sizeof(Piece));
  const Device::Current current(*device_);
  int least = 0, greatest = 0;
  cuda.check(cuda.stream_priorities(&least, &greatest), "asking for stream priorities");
  try {
    // Ahead of long kernels of the same process: a copy is short, and somebody waits for it.
    cuda.check(cuda.stream_create(&stream_, kStreamNonBlocking, greatest), "creating a stream");
    cuda.check(cuda.event_create(&event_, kEventDisableTiming), "creating an event");
    cuda.check(cuda.alloc(&lists_, kSlots * kSlotPieces * sizeof(Piece) + kWordBytes), "allocating copy lists");
    blocks_done_ = lists_ + kSlots * kSlotPieces * sizeof(Piece);
    cuda.check(cuda.fill(blocks_done_, 0, kWordBytes, stream_), "clearing memory");
  } catch (...) {
    if (lists_) cuda.free(lists_);
    if (event_) cuda.event_destroy(event_);
    if (stream_) cuda.stream_destroy(stream_);
    throw;
  }
}

Copier::~Copier() {
  const Driver& cuda = driver();
  try {
    const Device::Current current(*device_);
    cuda.stream_synchronize(stream_);
    cuda.stream_destroy(stream_);
    cuda.event_destroy(event_);
    cuda.free(lists_);
  } catch (const CudaError&) {
    // The context is gone, and all of it with it.
  }
}

bool Copier::ok(Result code, const char* what) {
  if (code == kSuccess) return true;
  if (failure_.empty()) {
    failure_ = "cuda:" + std::to_string(device_->ordinal) + " (" + device_->name + "), " + what + ": " +
               driver().describe(code);
  }
  return false;
}

void Copier::wait_for(Stream stream) {
  if (!failure_.empty()) return;
  const Driver& cuda = driver();
  const Device::Current current(*device_);
  ok(cuda.event_record(event_, stream), "recording an event") &&
      ok(cuda.stream_wait_event(stream_, event_, 0), "waiting for an event");
}

// So long that a warp is busy with it, so short that all warps have a few.
uint64_t Copier::chunk_bytes(std::span<const Piece> pieces) const {
  const uint64_t share = static_cast<uint64_t>(std::max(options_.multiprocessors, 1)) * kWarps * kChunksPerWarp;
  uint64_t total = 0;
  for (const Piece& piece : pieces) {
    total += piece.length;
    if (total >= share * options_.chunk_bytes) return options_.chunk_bytes;
  }
  return std::clamp<uint64_t>((total / share + 15) / 16 * 16, kShortestChunk, options_.chunk_bytes);
}

size_t Copier::submit(std::span<const Piece> pieces) {
  if (!failure_.empty() || pieces.empty()) return 0;
  if (slot_batch_[next_slot_] > finished()) return 0;
  const bool engines = pieces.front().length >= options_.engine_bytes;
  size_t taken = 0;
  // The list is made where it is uploaded from.
  Piece* const list = reinterpret_cast<Piece*>(pinned_->data() + kWordBytes) + next_slot_ * kSlotPieces;
  size_t chunks = 0;
  const uint64_t chunk = chunk_bytes(pieces);
  for (; taken < pieces.size(); ++taken) {
    Piece piece = pieces[taken];
    if ((piece.length >= options_.engine_bytes) != engines) break;  // the next batch
    if (engines) {
      if (taken == 64) break;
      list[chunks++] = piece;
      continue;
    }
    if (piece.length <= chunk) {
      if (chunks == kSlotPieces) break;
      list[chunks++] = piece;
      continue;
    }
    const size_t parts = (piece.length + chunk - 1) / chunk;
    if (chunks + parts > kSlotPieces) break;
    for (size_t part = 0; part < parts; ++part) {
      const uint64_t length = std::min<uint64_t>(piece.length, chunk);
      list[chunks++] = {piece.source, piece.destination, length};
      piece.source += length;
      piece.destination += length;
      piece.length -= length;
    }
  }
  try {
    const Device::Current current(*device_);
    if (!(engines ? by_engines({list, chunks}) : by_kernel({list, chunks}))) return 0;
  } catch (const CudaError& error) {
    failure_ = error.what();
    return 0;
  }
  slot_batch_[next_slot_] = submitted_;
  next_slot_ = (next_slot_ + 1) % kSlots;
  return taken;
}

bool Copier::by_kernel(std::span<const Piece> chunks) {
  const Driver& cuda = driver();
  uint64_t value = submitted_ + 1;
  auto count = static_cast<unsigned>(chunks.size());
  DevicePointer word = pinned_->on_device();
  // Few pieces: a block each, so that they do not queue for one multiprocessor's warps.
  const auto most = static_cast<unsigned>(std::max(options_.multiprocessors, 1));
  const unsigned blocks = std::clamp<unsigned>(count, 1, most);
  const unsigned warps = std::min(kWarps, (count + blocks - 1) / blocks);
  if (chunks.size() <= kFew) {
    Piece list[kFew];
    std::copy(chunks.begin(), chunks.end(), list);
    void* arguments[] = {list, &count, &blocks_done_, &word, &value};
    if (!ok(cuda.launch(copy_few_, blocks, 1, 1, std::max(1u, warps) * 32, 1, 1, 0, stream_, arguments, nullptr),
            "launching the copy kernel")) {
      return false;
    }
  } else {
    const size_t bytes = chunks.size() * sizeof(Piece);
    const size_t offset = next_slot_ * kSlotPieces * sizeof(Piece);
    DevicePointer list = lists_ + offset;
    if (!ok(cuda.copy_to_device(list, chunks.data(), bytes, stream_), "uploading a copy list")) return false;
    void* arguments[] = {&list, &count, &blocks_done_, &word, &value};
    if (!ok(cuda.launch(copy_, blocks, 1, 1, std::max(1u, warps) * 32, 1, 1, 0, stream_, arguments, nullptr),
            "launching the copy kernel")) {
      return false;
    }
  }
  ++submitted_;
  return true;
}

bool Copier::by_engines(std::span<const Piece> pieces) {
  const Driver& cuda = driver();
  for (const Piece& piece : pieces) {
    if (!ok(cuda.copy(piece.destination, piece.source, piece.length, stream_), "copying")) return false;
  }
  if (!ok(cuda.stream_write_value(stream_, pinned_->on_device(), submitted_ + 1, 0), "writing a word")) return false;
  ++submitted_;
  return true;
}

uint64_t Copier::finished() {
  if (finished_ == submitted_) return finished_;
  const std::atomic_ref<uint64_t> word(*reinterpret_cast<uint64_t*>(pinned_->data()));
  finished_ = std::max(finished_, word.load(std::memory_order_acquire));
  if (finished_ < submitted_ && failure_.empty()) look_for_errors();
  return finished_;
}

void Copier::look_for_errors() {
  const int64_t now = now_ns();
  if (now < next_look_) return;
  next_look_ = now + kLookEvery;
  try {
    const Device::Current current(*device_);
    const Result code = driver().stream_query(stream_);
    if (code != kNotReady) ok(code, "copying");
  } catch (const CudaError& error) {
    failure_ = error.what();
  }
}

}  // namespace railwire::cuda
