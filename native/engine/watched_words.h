// The words that the dispatcher watches by itself: between a store to a word and the callback lies one thread, not two.
//
// It looks without pause where an engine spins (EngineOptions::spin), and for a moment after a word that a GPU writes;
// then it naps in between, and shortly after a word has moved its naps are short. When all have been quiet for a while
// it sleeps behind a WordGuard, if there is one, and looks only now and then, for the words that a GPU writes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/doorbell.h"
#include "engine/events.h"
#include "engine/watcher.h"
#include "engine/word_guard.h"

namespace railwire {

class WatchedWords {
 public:
  struct Word {
    std::shared_ptr<Watcher> watcher;
    uint64_t engine = 0;  // Event::engine
    bool spin = false;
    std::function<void()> wake;  // set: called when it has moved, and no event is made
  };
  // Any thread.
  void add(Word word);
  // When it returns the dispatcher does not touch the word any more.
  void remove(const Watcher& watcher);
  // From now on words are looked for often also when they have been quiet for some 20 ms: a GPU writes to some.
  static void expect_gpu() { gpu_.store(true, std::memory_order_relaxed); }
  bool any() const { return count_.load(std::memory_order_acquire) > 0; }
  // Ends the dispatcher's nap: there is something else to do.
  void interrupt();

  // The dispatcher, and only where any(): looks, naps until something may have moved, somebody interrupts or the
  // deadline has come, and looks again. What has moved is appended.
  void watch(int64_t deadline, const std::function<bool()>& interrupted, std::vector<Event>& moved);

 private:
  std::unique_lock<std::mutex> enter();  // for others than the dispatcher
  bool look(std::vector<Event>& moved);
  bool differs() const;
  bool spins() const;
  void nap(int64_t until, int64_t look_every, const std::function<bool()>& interrupted);

  std::mutex mutex_;                  // guards the words; the dispatcher has it while it watches
  std::atomic<uint32_t> wanting_{0};  // others who want it
  std::vector<Word> words_;
  std::atomic<size_t> count_{0};
  std::optional<WordGuard> guard_;  // with the first word
  std::optional<Doorbell> bell_;
  std::atomic<bool> napping_{false};
  int64_t moved_ns_ = 0;
  inline static std::atomic<bool> gpu_{false};
};

}  // namespace railwire
