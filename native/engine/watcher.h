// A 64-bit word that anybody may increment (a GPU kernel, another thread) and that the driver watches.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

namespace railwire {

class Watcher {
 public:
  explicit Watcher(uint64_t id) : id(id), page_(static_cast<uint64_t*>(std::aligned_alloc(4096, 4096)), &std::free) {
    *page_ = 0;
  }

  const uint64_t id;
  // The word has a page of its own, so that it can be mapped into a GPU's address space alone.
  uint64_t* word() const { return page_.get(); }

  // Driver: true if an event has to be sent (the word moved and no event is on its way yet).
  bool look() {
    const uint64_t value = std::atomic_ref<uint64_t>(*page_).load(std::memory_order_acquire);
    if (value == seen_) return false;
    seen_ = value;
    return !pending_.exchange(true, std::memory_order_acq_rel);
  }

  // Dispatcher: (old, new) since the last call; values in between may have been skipped.
  std::pair<uint64_t, uint64_t> take() {
    pending_.store(false, std::memory_order_release);
    const uint64_t value = std::atomic_ref<uint64_t>(*page_).load(std::memory_order_acquire);
    return {std::exchange(told_, value), value};
  }

 private:
  std::unique_ptr<uint64_t, decltype(&std::free)> page_;
  uint64_t seen_ = 0;  // driver's
  uint64_t told_ = 0;  // dispatcher's
  std::atomic<bool> pending_{false};
};

}  // namespace railwire
