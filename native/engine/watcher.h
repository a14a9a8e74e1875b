// A 64-bit word that anybody may increment (a GPU kernel, another thread). The dispatcher watches those whose movement
// calls Python (watched_words.h), the driver those whose movement posts (word_action.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#include "engine/word_action.h"

namespace railwire {

class Watcher {
 public:
  explicit Watcher(uint64_t id) : id(id), page_(static_cast<uint64_t*>(std::aligned_alloc(4096, 4096)), &std::free) {
    *page_ = 0;
  }

  const uint64_t id;
  // The word has a page of its own, so that it can be mapped into a GPU's address space alone.
  uint64_t* word() const { return page_.get(); }
  // Null: the dispatcher is told. Else the driver's.
  std::unique_ptr<WordAction> action;
  bool disarmed = false;  // driver's: only what is under way is still looked after

  // The word differs from what look() has seen.
  bool moved() const { return std::atomic_ref<uint64_t>(*page_).load(std::memory_order_acquire) != seen_; }
  // Whoever watches: true if an event has to be sent (the word moved and no event is on its way yet).
  bool look() {
    const uint64_t value = std::atomic_ref<uint64_t>(*page_).load(std::memory_order_acquire);
    if (value == seen_) return false;
    seen_ = value;
    return !pending_.exchange(true, std::memory_order_acq_rel);
  }

  // Dispatcher: (old, new) since the last call; values in between may have been skipped.
  std::pair<uint64_t, uint64_t> take() {
    // An exchange, and not a store: it comes before look()'s, which then sends an event, or after it, and then sees
    // what look() has seen. A store may still be under way when the word is read, and the last increment be lost.
    pending_.exchange(false, std::memory_order_acq_rel);
    const uint64_t value = std::atomic_ref<uint64_t>(*page_).load(std::memory_order_acquire);
    return {std::exchange(told_, value), value};
  }

 private:
  std::unique_ptr<uint64_t, decltype(&std::free)> page_;
  uint64_t seen_ = 0;  // of whoever watches
  uint64_t told_ = 0;  // dispatcher's
  std::atomic<bool> pending_{false};
};

}  // namespace railwire
