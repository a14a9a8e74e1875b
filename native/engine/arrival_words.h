// Words of memory that follow counters, for whoever waits without a call: a kernel of a GPU. Word i has the whole
// arrivals of immediate `first + i` since its last reset, less what expectations have consumed. A writer that has
// failed, or is lost, sets the highest bit: as a signed number the word is then less than any that somebody waits for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "engine/immediate.h"

namespace railwire {

class ArrivalWords {
 public:
  static constexpr uint64_t kFailed = uint64_t{1} << 63;

  // `writers[i]`: the only peer that writes with immediate `first + i`.
  ArrivalWords(uint32_t first, std::vector<uint64_t> writers)
      : first(first), writers(std::move(writers)), words_(nullptr, &std::free) {
    const size_t bytes = (std::max<size_t>(this->writers.size(), 1) * sizeof(uint64_t) + 4095) / 4096 * 4096;
    words_.reset(static_cast<uint64_t*>(std::aligned_alloc(4096, bytes)));
    if (!words_) throw std::bad_alloc();
    std::fill_n(words_.get(), bytes / sizeof(uint64_t), 0);
  }

  // They have their pages to themselves, so that a GPU can map them.
  uint64_t* words() const { return words_.get(); }
  size_t size() const { return writers.size(); }

  // Driver only. The highest bit stays until clear().
  void publish(uint32_t id, uint64_t units, bool failed) {
    const std::atomic_ref<uint64_t> word(words_.get()[id - first]);
    const uint64_t bit = (failed ? kFailed : 0) | (word.load(std::memory_order_relaxed) & kFailed);
    word.store(units / kUnitsPerArrival | bit, std::memory_order_release);
  }
  void clear(uint32_t id) { std::atomic_ref<uint64_t>(words_.get()[id - first]).store(0, std::memory_order_release); }
  void fail(size_t index) {
    std::atomic_ref<uint64_t>(words_.get()[index]).fetch_or(kFailed, std::memory_order_release);
  }

  const uint32_t first;
  const std::vector<uint64_t> writers;

 private:
  std::unique_ptr<uint64_t, decltype(&std::free)> words_;
};

}  // namespace railwire
