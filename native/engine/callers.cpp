// The threads of callers: they submit, wait, and take the driver's lock.
//
// A submission is one step of the driver if nobody drives; otherwise it goes through the queue. A thread that waits
// drives while it waits, the worker parks meanwhile (worker.cpp).
#include <sched.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr int64_t kMicrosecond = 1'000;
constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kInlineSpin = 2 * kMillisecond;      // the same for a waiting thread
constexpr uint32_t kHotLoops = 64;                     // idle turns of a waiting thread before it first gives way
constexpr int64_t kLockSpin = 100 * kMicrosecond;      // a waiting thread yields this long to whoever drives
constexpr int64_t kHandOver = kMillisecond;            // and then looks this often whether nobody does any more
constexpr int64_t kSecondSleeper = 50 * kMillisecond;  // a look now and then, beside another that sleeps as the driver
constexpr int64_t kGiveWay = 100 * kMicrosecond;       // to those who wait for the lock, before it is taken again
constexpr uint64_t kInlineBytes = 64 * 1024;           // a submission posts at most this much in the caller
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr const char* kInherited = "this engine belongs to the process that was forked; open one in this process";

// Carries a cancel() through the command queue.
class StopCommand final : public Operation {
 public:
  StopCommand(std::weak_ptr<Engine> engine, std::shared_ptr<Operation> target)
      : Operation(std::move(engine)), target_(std::move(target)) {}
  void start(Engine& engine, std::shared_ptr<Operation>) override {
    if (!target_->done()) target_->stop(engine);
    target_.reset();
  }
  void stop(Engine&) override {}

 private:
  std::shared_ptr<Operation> target_;
};

}  // namespace

void Engine::submit(std::shared_ptr<Operation> operation) {
  if (inherited_) throw NicError(kInherited);
  bool left_over = true, later = false;
  // Not before those who wait for the lock: threads that submit in a loop would keep it from them.
  if (!options_.spin && lock_waiters_.load(std::memory_order_relaxed) == 0 && drive_.try_lock()) {
    std::unique_lock lock(drive_, std::adopt_lock);
    inline_submissions_.store(inline_submissions_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    touched_.clear();
    if (commands_.maybe_nonempty()) take_commands();  // who came before goes before
    left_over = commands_.maybe_nonempty();
    // A producer between the two steps of push() hides those behind it: perhaps what this one is to stop.
    if (!left_over) {
      start(std::move(operation));
      // Only what has just been started: of the rest whoever left it has told the worker.
      left_over = commands_.maybe_nonempty();
      later = asleep_until_ != kNever && next_tick_ < asleep_until_;
      for (size_t i = 0; i < touched_.size(); ++i) {
        Peer& peer = *touched_[i];
        if (peer.any_ready()) pump(peer, kInlineBytes);
        left_over |= peer.any_ready();
        for (const auto& link : peer.links) {
          left_over |= !link->stash.empty();
          later |=
              !link->want_flush.empty() || (link->nic->wait_fd() < 0 && link->link && link->link->outstanding() > 0);
        }
      }
      // Whoever sleeps has armed the NICs before this was posted: some tell of nothing that they did not know of then.
      if (asleep_until_ != kNever && !left_over && !later) later = !arm_touched();
      tell_sleeper();
      if (!left_over && !later) return;
    }
  }
  if (operation) {
    Operation* raw = operation.get();
    raw->queued_self = std::move(operation);
    commands_.push(raw);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (closed()) {  // nobody drives any more: it ends here and now
      const auto lock = lock_driver();
      take_commands();
      return;
    }
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (left_over || later) {
    // What only has to be done some time soon is left to a worker that is parked: it comes back by itself.
    const Rest rest = worker_rest_.load();
    if (rest != Rest::kNone && (left_over || rest != Rest::kParked)) worker_bell_.ring();
    if (inline_asleep_.load()) inline_bell_.ring();
  }
}

bool Engine::arm_touched() {
  bool armed = true;
  for (const Peer* peer : touched_) {
    for (const auto& link : peer->links) {
      if (link->link && link->link->outstanding() > 0) armed &= link->nic->arm();
    }
  }
  return armed;
}

void Engine::request_stop(std::shared_ptr<Operation> operation) {
  if (inherited_) return;
  submit(std::make_shared<StopCommand>(weak_from_this(), std::move(operation)));
}

bool Engine::wait_for(Operation& operation, int64_t timeout_ns) {
  if (inherited_) throw NicError(kInherited);
  const int64_t start = now_ns();
  const int64_t deadline = timeout_ns > kNever - start ? kNever : start + timeout_ns;
  if (options_.spin) {
    while (!operation.done()) {
      const int64_t now = now_ns();
      if (now >= deadline) break;
      if (now - start < kInlineSpin) {
        for (int i = 0; i < 32; ++i) cpu_relax();
      } else {
        operation.sleep(std::min<int64_t>(deadline - now, 50 * kMillisecond));
      }
    }
    return operation.done();
  }
  int64_t now = start;
  last_inline_ns_.store(now, std::memory_order_relaxed);
  inline_waiters_.fetch_add(1, std::memory_order_seq_cst);
  if (worker_rest_.load(std::memory_order_seq_cst) == Rest::kAsleep) worker_bell_.ring();  // it parks
  bool more_to_do = false, looked = false;
  int64_t yielding_since = 0;
  while (!operation.done()) {
    // At least one look, also for who polls with a time-out of 0: the worker leaves the field to him, too.
    if (now >= deadline && looked) break;
    if (!drive_.try_lock()) {
      looked = true;  // somebody else is at it
      // The worker is about to park, or another waiter drives for us too.
      if (yielding_since == 0) yielding_since = now;
      if (now - yielding_since < kLockSpin) {
        sched_yield();
      } else {
        sleep_as_waiter(operation, std::min(deadline - now, kHandOver));
      }
      now = now_ns();
      continue;
    }
    yielding_since = 0;
    looked = true;
    std::unique_lock lock(drive_, std::adopt_lock);
    ++totals_.inline_drives;
    int64_t last_busy = now;
    uint32_t idle_loops = 0, busy_loops = 0;
    bool napping = false;  // the last sleep ended by itself: look once, and sleep again
    while (!operation.done()) {
      const bool busy = drive(now, &operation);
      tell_sleeper();
      if (now >= deadline) break;
      if (busy) {
        idle_loops = 0;
        napping = false;
        if ((++busy_loops & 15) == 0) {  // whatever else goes on
          if (lock_waiters_.load(std::memory_order_relaxed) > 0) let_others(lock);
          now = now_ns();
        }
      } else {
        if ((++idle_loops & 15) == 0) now = now_ns();
        if (idle_loops > kHotLoops) cpu_relax();
        if (idle_loops % kHotLoops == 0 || napping) {
          if (now >= deadline) break;
          if (idle_loops == kHotLoops && !napping) last_busy = now;
          if (lock_waiters_.load(std::memory_order_relaxed) > 0) {
            let_others(lock);
            now = now_ns();
          } else if (now - last_busy > kInlineSpin && inline_asleep_.load()) {
            // One sleeps as the driver already, and there is one bell. It ends ours, or hands over when it leaves.
            lock.unlock();
            sleep_as_waiter(operation, std::min(deadline - now, kSecondSleeper));
            now = now_ns();
            lock_again(lock);
          } else if (now - last_busy > kInlineSpin) {
            napping = !sleep_as_driver(lock, false, last_busy, deadline);
            now = now_ns();
            if (!napping) idle_loops = 0;
          } else if (now - last_busy > 10 * kMicrosecond) {
            sched_yield();  // the peer may need this core to answer
          }
        }
      }
    }
    // Only a worker that sleeps has to be told; it cannot fall asleep while we hold the lock.
    more_to_do = worker_rest_.load(std::memory_order_relaxed) == Rest::kAsleep && (has_work(now) || closed());
  }
  // As of the last look at the clock, which is some tens of turns old at most.
  last_inline_ns_.store(now, std::memory_order_relaxed);
  if (inline_waiters_.fetch_sub(1, std::memory_order_seq_cst) > 1) hand_over();
  // A worker that is parked comes back by itself when nobody has waited for a while; to ring it now would only make it
  // fight for the core with a caller that is about to wait for the next operation.
  const Rest rest = worker_rest_.load(std::memory_order_seq_cst);
  if (rest == Rest::kParkedDeep || (more_to_do && rest == Rest::kAsleep)) worker_bell_.ring();
  return operation.done();
}

void Engine::note_wait() {
  if (!options_.spin) last_inline_ns_.store(now_ns(), std::memory_order_relaxed);
}

void Engine::sleep_as_waiter(Operation& operation, int64_t timeout_ns) {
  {
    std::lock_guard lock(waiting_mutex_);
    waiting_.push_back(&operation);
  }
  operation.sleep(timeout_ns);
  std::lock_guard lock(waiting_mutex_);
  waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &operation));
}

// Whoever ceases to drive wakes one of those who count on it.
void Engine::hand_over() {
  std::lock_guard lock(waiting_mutex_);
  if (!waiting_.empty()) waiting_.front()->nudge();
}

bool Engine::hold_still(int64_t deadline) {
  lock_waiters_.fetch_add(1, std::memory_order_relaxed);
  bool held = drive_.try_lock();
  while (!held && now_ns() < deadline) {
    sched_yield();
    held = drive_.try_lock();
  }
  lock_waiters_.fetch_sub(1, std::memory_order_relaxed);
  return held;
}

// Whoever holds one of its peers sees it ended. Not where a driver was at work: their list may be half changed.
void Engine::note_inherited(bool held) {
  inherited_ = true;
  if (!held) return;
  for (const auto& peer : peers_) peer->state.store(PeerState::kClosed);
}

std::unique_lock<DriverLock> Engine::lock_driver() {
  if (inherited_) throw NicError(kInherited);
  std::unique_lock lock(drive_, std::defer_lock);
  lock_again(lock);
  return lock;
}

// A thread that drives while it waits gives way to whoever is counted here.
void Engine::lock_again(std::unique_lock<DriverLock>& lock) {
  lock_waiters_.fetch_add(1, std::memory_order_relaxed);
  lock.lock();
  lock_waiters_.fetch_sub(1, std::memory_order_relaxed);
}

void Engine::let_others(std::unique_lock<DriverLock>& lock) {
  lock.unlock();
  // The lock is not fair, and whoever sleeps on it takes a while to wake.
  for (const int64_t end = now_ns() + kGiveWay; lock_waiters_.load(std::memory_order_relaxed) > 0 && now_ns() < end;) {
    sched_yield();
  }
  lock_again(lock);
}

// The thread that sleeps as the driver does not sleep on its operation.
void Engine::tell_sleeper() {
  if (!finished_any_) return;
  finished_any_ = false;
  if (inline_asleep_.load()) inline_bell_.ring();
}

}  // namespace railwire
