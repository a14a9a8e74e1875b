// Waking a process of the same host that sleeps although its transport (shm) gives no descriptor to sleep on.
//
// A sleeper owns two files in /dev/shm: a page with one word, "I am asleep", and a FIFO. Whoever has just given it
// something to do looks at the word, which is one load from shared memory, and writes a byte into the FIFO if it is
// set. The word and the caller's look for work are each followed by a full fence on either side, so that one of the
// two always sees the other (the pattern of Dekker's algorithm).
//
// The page is locked (flock) for as long as its owner lives, whatever kills it; so leftovers of dead processes are
// recognised without trusting process ids, which other containers and later processes use again.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace railwire {

struct WakeupPage {
  std::atomic<uint32_t> asleep;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// The sleeper's side. Its files are removed with it, and so are those of dead processes when it is made.
class HostWakeup {
 public:
  HostWakeup();  // throws NicError
  ~HostWakeup();
  HostWakeup(const HostWakeup&) = delete;
  HostWakeup& operator=(const HostWakeup&) = delete;

  // 16 hexadecimal digits, unguessable. Files that begin with file_prefix(name()) + "-" belong to this sleeper too.
  const std::string& name() const { return name_; }
  int fd() const { return fifo_; }

  // Between the two, others ring. Look for work once more after announce().
  void announce();
  void awake();

  static constexpr size_t kNameLength = 16;
  static bool valid_name(std::string_view name);
  static std::string file_prefix(std::string_view name) { return "railwire-" + std::string(name); }

 private:
  std::string name_;
  int page_fd_ = -1;
  int fifo_ = -1;
  WakeupPage* page_ = nullptr;
};

// The other side: one for each sleeper that we give work to.
class HostBell {
 public:
  // Throws NicError if there is no such sleeper, or if it belongs to another user.
  explicit HostBell(const std::string& name);
  ~HostBell();
  HostBell(const HostBell&) = delete;
  HostBell& operator=(const HostBell&) = delete;

  // After std::atomic_thread_fence(seq_cst), which orders the work that was given before this look.
  void ring_if_asleep() {
    if (page_->asleep.load(std::memory_order_relaxed) != 0) [[unlikely]]
      ring();
  }

 private:
  void ring();

  int fifo_ = -1;
  WakeupPage* page_ = nullptr;
};

}  // namespace railwire
