// Words of pinned host memory on which CUDA streams and the engine meet: a stream waits until the engine has raised a
// word, or raises one itself where it has come so far. Neither side has a thread that waits.
//
// A word's values only grow, and a wait is for "at least": a word may be used again as soon as what was waited for has
// come, whoever still stands before it. A word that a stream is to raise is not given out again before it has.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/device.h"

namespace railwire::cuda {

class StreamWords;

// One use of one word: `reached()` once somebody has raised it to this use's value.
class StreamWord : public std::enable_shared_from_this<StreamWord> {
 public:
  ~StreamWord();
  StreamWord(const StreamWord&) = delete;
  StreamWord& operator=(const StreamWord&) = delete;

  bool reached() const { return word_.load(std::memory_order_acquire) >= value_; }
  // The engine's side of a wait. Any thread.
  void raise() const { word_.store(value_, std::memory_order_release); }

 private:
  friend class StreamWords;
  StreamWord(std::shared_ptr<StreamWords> owner, uint32_t index, uint64_t value, uint64_t* word)
      : owner_(std::move(owner)), index_(index), value_(value), word_(*word) {}

  std::shared_ptr<StreamWords> owner_;
  const uint32_t index_;
  const uint64_t value_;
  const std::atomic_ref<uint64_t> word_;
};

class StreamWords : public std::enable_shared_from_this<StreamWords> {
 public:
  // The words of a GPU; one object a GPU and process.
  static std::shared_ptr<StreamWords> of(int ordinal);
  explicit StreamWords(std::shared_ptr<Device> device);

  // What `stream` is given after this runs once the word has been raised, by raise(). Throws CudaError.
  std::shared_ptr<StreamWord> wait_in(Stream stream);
  // The word is reached when `stream` has done what it has been given before this. Throws CudaError.
  std::shared_ptr<StreamWord> mark_in(Stream stream);
  // The same for an event that has been recorded.
  std::shared_ptr<StreamWord> mark_after(Event event);

  size_t in_use();  // words that are not free

 private:
  friend class StreamWord;
  static constexpr uint32_t kPerPage = 512;

  std::shared_ptr<StreamWord> take();
  void give_back(uint32_t index, uint64_t value);
  uint64_t* word(uint32_t index) const;
  DevicePointer on_device(uint32_t index) const;

  const std::shared_ptr<Device> device_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<PinnedMemory>> pages_;
  std::vector<uint64_t> values_;  // given out last, by index
  std::vector<uint32_t> free_;
  std::vector<std::pair<uint32_t, uint64_t>> unreached_;  // let go before anybody had raised them
  std::vector<Stream> streams_;                           // of mark_after(): an event waits behind no other
};

}  // namespace railwire::cuda
