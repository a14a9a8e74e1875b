// Looking at watched words, and sleeping in between.
#include "engine/watched_words.h"

#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <utility>

#include "engine/clock.h"

namespace railwire {
namespace {

constexpr int64_t kMicrosecond = 1'000;
constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kSpin = 50 * kMicrosecond;  // after a word has moved: a GPU's kernels write one after the other
constexpr int64_t kFast = 20 * kMicrosecond;  // between looks at words that moved lately
constexpr int64_t kFastFor = 20 * kMillisecond;
constexpr int64_t kSlow = kMillisecond;  // between looks after that, for words that no guard tells of
constexpr int64_t kSlowFor = 1000 * kMillisecond;
constexpr int64_t kQuiet = 5 * kMillisecond;  // and after that: a look costs some 8 us of a core
constexpr uint32_t kGiveWayEvery = 1024;      // turns of who spins

}  // namespace

std::unique_lock<std::mutex> WatchedWords::enter() {
  wanting_.fetch_add(1);
  interrupt();
  std::unique_lock lock(mutex_);
  wanting_.fetch_sub(1);
  return lock;
}

void WatchedWords::add(Word word) {
  const auto lock = enter();
  if (!bell_) bell_.emplace();
  if (!guard_) guard_.emplace();
  guard_->add(word.watcher->word());
  words_.push_back(std::move(word));
  moved_ns_ = now_ns();
  count_.store(words_.size());
}

void WatchedWords::remove(const Watcher& watcher) {
  const auto lock = enter();
  if (std::erase_if(words_, [&](const Word& word) { return word.watcher.get() == &watcher; }) == 0) return;
  guard_->remove(watcher.word());
  count_.store(words_.size());
}

void WatchedWords::interrupt() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (napping_.load(std::memory_order_seq_cst)) bell_->ring();
}

bool WatchedWords::look(std::vector<Event>& moved) {
  bool any = false;
  for (const Word& word : words_) {
    if (!word.watcher->look()) continue;
    any = true;
    if (word.wake) {
      word.watcher->take();
      word.wake();
    } else {
      moved.push_back({Event::kWatcher, word.engine, word.watcher->id, {}});
    }
  }
  return any;
}

bool WatchedWords::differs() const {
  return std::any_of(words_.begin(), words_.end(), [](const Word& word) { return word.watcher->moved(); });
}

bool WatchedWords::spins() const {
  return std::any_of(words_.begin(), words_.end(), [](const Word& word) { return word.spin; });
}

void WatchedWords::watch(int64_t deadline, const std::function<bool()>& interrupted, std::vector<Event>& moved) {
  // A nap of 20 us would last 70 with the usual slack. Of this thread, and asked for each time: it is cheap.
  prctl(PR_SET_TIMERSLACK, kMicrosecond, 0, 0, 0);
  std::unique_lock lock(mutex_);
  for (uint32_t turn = 1;; ++turn) {
    while (wanting_.load() > 0) {
      lock.unlock();
      sched_yield();
      lock.lock();
    }
    if (look(moved)) moved_ns_ = now_ns();
    if (!moved.empty() || words_.empty() || interrupted()) return;
    if (spins()) {
      cpu_relax();
      if (turn % kGiveWayEvery != 0) continue;
      sched_yield();
      if (now_ns() >= deadline) return;
      continue;
    }
    const int64_t now = now_ns();
    if (now >= deadline) return;
    const int64_t quiet = now - moved_ns_;
    if (quiet < kSpin && gpu_.load(std::memory_order_relaxed)) {
      cpu_relax();
      continue;
    }
    const bool unguarded = gpu_.load(std::memory_order_relaxed) || !guard_->available();
    nap(deadline, quiet < kFastFor ? kFast : quiet < kSlowFor && unguarded ? kSlow : kQuiet, interrupted);
  }
}

// Until a word has moved, the bell rings, `until` has come, or, where it is not behind the guard, for one look.
void WatchedWords::nap(int64_t until, int64_t look_every, const std::function<bool()>& interrupted) {
  napping_.store(true, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!interrupted() && wanting_.load() == 0) {
    const bool guarded = look_every > kFast && guard_->protect();
    pollfd fds[] = {{bell_->fd(), POLLIN, 0}, {guard_->fd(), POLLIN, 0}};
    for (bool again = true; again && !differs();) {
      const int64_t now = now_ns();
      const int64_t time = std::clamp<int64_t>(until - now, 0, look_every);
      const timespec timeout{time / 1'000'000'000, time % 1'000'000'000};
      again = ppoll(fds, guarded ? 2 : 1, &timeout, nullptr) == 0 && guarded && now + time < until &&
              now - moved_ns_ < (look_every == kSlow ? kSlowFor : INT64_MAX);
    }
    if (guarded) guard_->release();
  }
  napping_.store(false, std::memory_order_relaxed);
  bell_->clear();
}

}  // namespace railwire
