// The lock of whoever drives an engine, and of the shm NIC. It is taken and given back for each submission, each poll
// and each look of a waiting thread, nearly always unopposed: inlined, that is two instructions, where a pthread mutex
// takes some eighty.
#pragma once

#include <atomic>
#include <cstdint>

namespace railwire {

// Lockable, as std::unique_lock wants it. Not recursive, not fair. The three states are those of Drepper's "Futexes Are
// Tricky" (mutex 2).
class DriverLock {
 public:
  bool try_lock() {
    uint32_t seen = kFree;
    return word_.load(std::memory_order_relaxed) == kFree &&
           word_.compare_exchange_strong(seen, kHeld, std::memory_order_acquire, std::memory_order_relaxed);
  }
  void lock() {
    if (try_lock()) return;
    while (word_.exchange(kWanted, std::memory_order_acquire) != kFree) word_.wait(kWanted, std::memory_order_relaxed);
  }
  void unlock() {
    if (word_.exchange(kFree, std::memory_order_release) == kWanted) word_.notify_one();
  }

 private:
  static constexpr uint32_t kFree = 0, kHeld = 1, kWanted = 2;  // kWanted: held, and somebody may sleep

  std::atomic<uint32_t> word_{kFree};
};

}  // namespace railwire
