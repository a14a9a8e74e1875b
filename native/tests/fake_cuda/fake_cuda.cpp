// A CUDA driver in memory: libfake_cuda.so has the entry points of libcuda that Railwire calls (cuda/driver_api.h), so
// that whatever runs on a GPU is tested where there is none: RAILWIRE_LIBCUDA=.../libfake_cuda.so, any process.
//
// "GPU memory" is a memfd. The address that programs get is reserved and not readable: whoever touches GPU memory with
// the CPU dies, as on a machine with a GPU. Kernels and copies work on a second mapping. Streams are threads: they run
// behind the caller, as slowly as asked for, and independently of each other. Kernels are the real source of
// copy_piece.h, run lane by lane. Memory can be shared between processes as the real driver allows it, by IPC handles
// (which name a file in /proc) and by file descriptors, a chunk each.
//
//   RAILWIRE_FAKE_CUDA_DEVICES=2     how many GPUs there are
//   RAILWIRE_FAKE_CUDA_DELAY_US=0    each operation of a stream takes a random time up to this
//   RAILWIRE_FAKE_CUDA_SEED=1        of those times
//   RAILWIRE_FAKE_CUDA_NO_IPC=1      handles cannot be opened (another PID namespace, MIG)
//   RAILWIRE_FAKE_CUDA_NO_PEER=1     GPUs reach no other's memory
//   RAILWIRE_FAKE_CUDA_FAIL_AT=N     the Nth launch fails, and everything after it, as after an illegal address
//   RAILWIRE_FAKE_CUDA_NO_VMM=1      no virtual-memory management
#include "fake_cuda/fake_cuda.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/copy_piece.h"

using namespace railwire::cuda;

namespace fake_cuda {
namespace {

long option(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

}  // namespace

Memory& memory() {
  static auto* all = new Memory;
  return *all;
}

int devices() {
  static const int count = static_cast<int>(option("RAILWIRE_FAKE_CUDA_DEVICES", 2));
  return count;
}

std::vector<int>& current() {
  static thread_local std::vector<int> stack;
  return stack;
}

// ---- memory ---------------------------------------------------------------------------------------------------------
Block* Memory::add(int fd, size_t bytes, int device, bool legacy, size_t offset, uint64_t at) {
  void* alias = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (alias == MAP_FAILED) return nullptr;
  void* address =
      at ? reinterpret_cast<void*>(at) : mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto block = std::make_unique<Block>();
  block->base = reinterpret_cast<uint64_t>(address);
  block->bytes = bytes;
  block->alias = static_cast<std::byte*>(alias);
  block->fd = fd;
  block->device = device;
  block->legacy = legacy;
  block->id = ++next_id_;
  block->owns_address = !at;
  std::lock_guard lock(mutex_);
  Block* added = block.get();
  blocks_[added->base] = std::move(block);
  return added;
}

void Memory::remove(uint64_t base) {
  std::lock_guard lock(mutex_);
  const auto found = blocks_.find(base);
  if (found == blocks_.end()) return;
  Block& block = *found->second;
  munmap(block.alias, block.bytes);
  if (block.owns_address) munmap(reinterpret_cast<void*>(block.base), block.bytes);
  if (block.fd >= 0) close(block.fd);
  blocks_.erase(found);
}

Block* Memory::find(uint64_t address) {
  std::lock_guard lock(mutex_);
  auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return nullptr;
  Block* block = std::prev(after)->second.get();
  return address < block->base + block->bytes ? block : nullptr;
}

std::byte* Memory::at(uint64_t address, uint64_t length) {
  const Block* block = find(address);
  if (!block) return reinterpret_cast<std::byte*>(address);  // host memory
  if (address + length > block->base + block->bytes) {
    // A range over chunks that lie side by side is fine on a GPU; aliases do not, so copies are cut by the caller.
    std::fprintf(stderr, "fake CUDA: a copy reaches beyond its allocation\n");
    std::abort();
  }
  return block->alias + (address - block->base);
}

void Memory::copy(uint64_t to, uint64_t from, uint64_t length) {
  while (length) {
    const Block* target = find(to);
    const Block* source = find(from);
    uint64_t part = length;
    if (target) part = std::min(part, target->base + target->bytes - to);
    if (source) part = std::min(part, source->base + source->bytes - from);
    std::memcpy(at(to, part), at(from, part), part);
    to += part;
    from += part;
    length -= part;
  }
}

// ---- streams
// -----------------------------------------------------------------------------------------------------------
std::atomic<bool>& broken() {
  static std::atomic<bool> flag{false};
  return flag;
}

FakeStream::FakeStream() {
  static std::atomic<uint64_t> number{0};
  random_.seed(static_cast<uint64_t>(option("RAILWIRE_FAKE_CUDA_SEED", 1)) * 1000 + number++);
  thread_ = std::thread([this] { run(); });
}

FakeStream::~FakeStream() {
  synchronize();
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void FakeStream::enqueue(std::function<void()> work) {
  std::lock_guard lock(mutex_);
  queue_.push_back(std::move(work));
  ++given_;
  changed_.notify_all();
}

bool FakeStream::idle() {
  std::lock_guard lock(mutex_);
  return done_ == given_;
}

void FakeStream::synchronize() {
  std::unique_lock lock(mutex_);
  const uint64_t upto = given_;
  changed_.wait(lock, [&] { return done_ >= upto; });
}

uint64_t FakeStream::given() {
  std::lock_guard lock(mutex_);
  return given_;
}

void FakeStream::wait_until(uint64_t count) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= count; });
}

void FakeStream::run() {
  const long delay = option("RAILWIRE_FAKE_CUDA_DELAY_US", 0);
  while (true) {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    if (delay > 0) {
      const auto wait = std::uniform_int_distribution<long>(0, delay)(random_);
      std::this_thread::sleep_for(std::chrono::microseconds(wait));
    }
    if (!broken().load()) work();
    {
      std::lock_guard lock(mutex_);
      ++done_;
    }
    changed_.notify_all();
  }
}

void run_copy(const Piece* pieces, unsigned count, uint64_t word, uint64_t value) {
  for (unsigned i = 0; i < count; ++i) {
    Piece piece = pieces[i];
    // Chunks of virtual memory lie side by side for the GPU only: the piece is cut where an alias ends.
    while (piece.length) {
      uint64_t part = piece.length;
      for (const uint64_t end : {piece.source, piece.destination}) {
        if (const Block* block = memory().find(end)) part = std::min(part, block->base + block->bytes - end);
      }
      const Piece aliased{reinterpret_cast<uint64_t>(memory().at(piece.source, part)),
                          reinterpret_cast<uint64_t>(memory().at(piece.destination, part)), part};
      for (uint32_t lane = 0; lane < 32; ++lane) copy_piece(aliased, lane, 32);
      piece = {piece.source + part, piece.destination + part, piece.length - part};
    }
  }
  std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(memory().at(word, 8))).store(value, std::memory_order_release);
}

bool launch_fails() {
  static std::atomic<long> launches{0};
  const long at = option("RAILWIRE_FAKE_CUDA_FAIL_AT", 0);
  if (at > 0 && ++launches >= at) broken().store(true);
  return broken().load();
}

bool no_ipc() { return option("RAILWIRE_FAKE_CUDA_NO_IPC", 0) != 0; }
bool no_peer() { return option("RAILWIRE_FAKE_CUDA_NO_PEER", 0) != 0; }
bool no_vmm() { return option("RAILWIRE_FAKE_CUDA_NO_VMM", 0) != 0; }

}  // namespace fake_cuda
