#include "nic/tcp_gpu.h"

#include <algorithm>
#include <cstring>

namespace railwire {
namespace {

constexpr size_t kMostPieces = 4096;  // of one batch
constexpr size_t kMostIn = 4;         // blocks that one read fills

}  // namespace

std::string TcpGpu::refuses(const MemorySpec& memory) const {
  if (memory.device < 0) return "";
  std::string why;
  if (!cuda::find_driver(&why)) return why;
  if (ordinal_ < 0) {
    return "this engine has no GPU: make it with device=\"cuda:" + std::to_string(memory.device) + "\"";
  }
  if (memory.device != ordinal_) {
    return "memory of cuda:" + std::to_string(memory.device) +
           ", but the engine's device is cuda:" + std::to_string(ordinal_) + ": give each GPU an engine of its own";
  }
  return "";
}

void TcpGpu::open(std::mutex& nic) {
  std::lock_guard lock(opening_);
  if (copier_) return;
  try {
    const auto device = cuda::Device::open(ordinal_);
    auto blocks = std::make_unique<cuda::PinnedMemory>(device, 2 * kBlocks * kBlockBytes);
    auto copier =
        std::make_unique<cuda::Copier>(device, cuda::CopierOptions{.multiprocessors = options_.multiprocessors});
    std::lock_guard guard(nic);
    for (int i = 0; i < static_cast<int>(2 * kBlocks); ++i) give(i);
    blocks_ = std::move(blocks);
    copier_ = std::move(copier);
  } catch (const cuda::CudaError& error) {
    throw NicError(std::string("tcp: ") + error.what());
  }
}

int TcpGpu::take(Way way) {
  if (free_[way].empty()) return -1;
  const int block = free_[way].back();
  free_[way].pop_back();
  return block;
}

void TcpGpu::give(int block) { free_[block < static_cast<int>(kBlocks) ? kOut : kIn].push_back(block); }

void TcpGpu::give_after(int block, uint64_t copy) {
  if (copy <= copied_ || failed()) return give(block);
  lent_.push_back({block, copy});
}

uint64_t TcpGpu::copy(uint64_t from, uint64_t to, uint64_t length) {
  pieces_.push_back({from, to, length});
  return ++asked_;
}

void TcpGpu::progress() {
  if (!copier_) return;
  const uint64_t finished = copier_->finished();
  while (!batches_.empty() && batches_.front().number <= finished) {
    copied_ = batches_.front().last_copy;
    batches_.pop_front();
  }
  std::erase_if(lent_, [&](const Lent& lent) {
    if (lent.until > copied_ && !failed()) return false;
    give(lent.block);
    return true;
  });
  // While two batches are under way, more gathers here: many short copies then share a launch.
  while (first_ < pieces_.size() && batches_.size() < 2 && !failed()) {
    const size_t count = std::min(pieces_.size() - first_, kMostPieces);
    const size_t taken = copier_->submit(std::span(pieces_).subspan(first_, count));
    if (taken == 0) break;
    first_ += taken;
    given_ += taken;
    batches_.push_back({copier_->submitted(), given_});
  }
  if (first_ == pieces_.size() || failed()) {
    pieces_.clear();
    first_ = 0;
  }
}

// ---- out
// ----------------------------------------------------------------------------------------------------------------
uint64_t TcpGpuOut::add(uint64_t source, uint64_t length) {
  if (blocks_.empty() || blocks_.back().filled == TcpGpu::kBlockBytes) {
    // Each link its share: one whose peer does not read keeps what it has.
    size_t& users = gpu_.users(TcpGpu::kOut);
    const size_t share = std::max<size_t>(1, TcpGpu::kBlocks / (users + blocks_.empty() + 1));
    const int block = blocks_.size() < share ? gpu_.take(TcpGpu::kOut) : -1;
    if (block < 0) return 0;
    users += blocks_.empty();
    blocks_.push_back({.block = block});
  }
  Block& block = blocks_.back();
  const uint64_t taken = std::min<uint64_t>(length, TcpGpu::kBlockBytes - block.filled);
  const uint64_t copy = gpu_.copy(source, gpu_.on_gpu(block.block) + block.filled, taken);
  block.filled += taken;
  if (!block.marks.empty() && block.marks.back().copy > gpu_.given()) {
    block.marks.back() = {block.filled, copy};  // they go in one batch, nearly always
  } else {
    block.marks.push_back({block.filled, copy});
  }
  return taken;
}

size_t TcpGpuOut::here(const Block& block) const {
  size_t end = 0;
  for (const Mark& mark : block.marks) {
    if (mark.copy > gpu_.copied()) break;
    end = mark.end;
  }
  return end;
}

size_t TcpGpuOut::ready(size_t most) const {
  size_t bytes = 0;
  for (size_t i = current_; i < blocks_.size() && bytes < most; ++i) {
    const size_t end = here(blocks_[i]);
    bytes += end - blocks_[i].taken;
    if (end < TcpGpu::kBlockBytes) break;
  }
  return std::min(bytes, most);
}

std::span<std::byte> TcpGpuOut::take(size_t most) {
  Block& block = blocks_[current_];
  const size_t length = std::min(most, here(block) - block.taken);
  const std::span<std::byte> bytes(gpu_.bytes(block.block) + block.taken, length);
  block.taken += length;
  if (block.taken == TcpGpu::kBlockBytes) ++current_;
  return bytes;
}

void TcpGpuOut::sent() {
  if (blocks_.empty()) return;
  while (!blocks_.empty() && blocks_.front().taken == blocks_.front().filled) {
    gpu_.give(blocks_.front().block);
    blocks_.pop_front();
    current_ -= current_ > 0;
  }
  if (blocks_.empty()) --gpu_.users(TcpGpu::kOut);
}

void TcpGpuOut::drop() {
  if (blocks_.empty()) return;
  for (const Block& block : blocks_) gpu_.give_after(block.block, block.marks.back().copy);
  blocks_.clear();
  current_ = 0;
  --gpu_.users(TcpGpu::kOut);
}

// ---- in
// -----------------------------------------------------------------------------------------------------------------
bool TcpGpuIn::grow() {
  const int block = blocks_.size() < kMostIn ? gpu_.take(TcpGpu::kIn) : -1;
  if (block >= 0) blocks_.push_back(block);
  return block >= 0;
}

bool TcpGpuIn::has_room(size_t bytes) {
  while (blocks_.size() * TcpGpu::kBlockBytes - offered_ < bytes) {
    if (!grow()) return false;
  }
  return true;
}

size_t TcpGpuIn::offer(size_t length, std::span<iovec> places, size_t* used) {
  size_t bytes = 0;
  while (bytes < length && *used < places.size()) {
    if (offered_ == blocks_.size() * TcpGpu::kBlockBytes && !grow()) break;
    const size_t at = offered_ % TcpGpu::kBlockBytes;
    const size_t part = std::min(length - bytes, TcpGpu::kBlockBytes - at);
    std::byte* const place = gpu_.bytes(blocks_[offered_ / TcpGpu::kBlockBytes]) + at;
    if (*used > 0 && static_cast<std::byte*>(places[*used - 1].iov_base) + places[*used - 1].iov_len == place) {
      places[*used - 1].iov_len += part;
    } else {
      places[(*used)++] = {place, part};
    }
    offered_ += part;
    bytes += part;
  }
  return bytes;
}

uint64_t TcpGpuIn::land(const std::byte* from, uint64_t destination, size_t length) {
  if (from) {  // behind all that was offered, of which nothing is left
    landed_ = offered_;
    offered_ += length;
  }
  while (length > 0) {
    const int block = blocks_[landed_ / TcpGpu::kBlockBytes];
    const size_t at = landed_ % TcpGpu::kBlockBytes;
    const size_t part = std::min(length, TcpGpu::kBlockBytes - at);
    if (from) {
      std::memcpy(gpu_.bytes(block) + at, from, part);
      from += part;
    }
    last_ = gpu_.copy(gpu_.on_gpu(block) + at, destination, part);
    landed_ += part;
    destination += part;
    length -= part;
  }
  return last_;
}

void TcpGpuIn::finish() {
  for (const int block : blocks_) gpu_.give_after(block, last_);
  blocks_.clear();
  offered_ = landed_ = 0;
}

}  // namespace railwire
