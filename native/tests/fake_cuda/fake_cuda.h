// What the fake driver's entry points (entry_points.cpp) stand on: memory, streams, and the faults that were asked for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cuda/copy_piece.h"

namespace fake_cuda {

struct Block {
  uint64_t base = 0;
  size_t bytes = 0;
  std::byte* alias = nullptr;
  int fd = -1;
  int device = 0;
  bool legacy = true;  // shared by IPC handles; else virtual memory
  uint64_t id = 0;
  bool owns_address = true;
};

class Memory {
 public:
  // Takes `fd` over. `at`: an address that is reserved already; 0: any.
  Block* add(int fd, size_t bytes, int device, bool legacy, size_t offset = 0, uint64_t at = 0);
  void remove(uint64_t base);
  Block* find(uint64_t address);  // null: none of a GPU's
  std::byte* at(uint64_t address, uint64_t length);
  void copy(uint64_t to, uint64_t from, uint64_t length);

 private:
  std::mutex mutex_;
  std::map<uint64_t, std::unique_ptr<Block>> blocks_;
  std::atomic<uint64_t> next_id_{0};
};
Memory& memory();

class FakeStream {
 public:
  FakeStream();
  ~FakeStream();
  void enqueue(std::function<void()> work);
  bool idle();
  void synchronize();
  uint64_t given();
  void wait_until(uint64_t count);

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  uint64_t given_ = 0, done_ = 0;
  bool stop_ = false;
  std::mt19937_64 random_;
  std::thread thread_;
};

struct FakeEvent {
  FakeStream* stream = nullptr;
  uint64_t count = 0;
};

int devices();
std::vector<int>& current();  // contexts of this thread, as device numbers
std::atomic<bool>& broken();
bool launch_fails();
bool no_ipc();
bool no_peer();
bool no_vmm();
void run_copy(const railwire::cuda::Piece* pieces, unsigned count, uint64_t word, uint64_t value);

}  // namespace fake_cuda
