// Who drives the engine, and when it may sleep.
//
// Three kinds of thread can drive: the worker (by default), a thread that waits for an operation (it takes over, the
// worker parks), and a submitting thread (one step, if nobody drives). A sleeping driver leaves the lock, so that
// submissions still get through; it is woken by its bell, by a NIC's descriptor or by the next deadline.
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr int64_t kMicrosecond = 1'000;
constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kWorkerSpin = 50 * kMicrosecond;  // after the last event, before the worker sleeps
constexpr int64_t kLoneSpin = 5 * kMicrosecond;     // the same after a single event out of a long sleep, as pings are
constexpr int64_t kLongSleep = 2 * kMillisecond;
constexpr int64_t kParkHold = 200 * kMicrosecond;    // how long the worker leaves the field to threads that wait
constexpr int64_t kLongestHold = 2 * kMillisecond;   // the same while they come again and again
constexpr int64_t kDeepAfter = 10 * kMillisecond;    // a thread that has waited this long in one go ...
constexpr int64_t kDeepHold = 5 * kMillisecond;      // ... is left alone for longer, and rings when it leaves
constexpr int64_t kSubmitHold = 5 * kMillisecond;    // and while they submit, which a full link ends
constexpr int64_t kShortNap = 30 * kMicrosecond;     // where a NIC gives nothing to sleep on, or work is under way
constexpr int64_t kLongNap = 8 * kMillisecond;       // the same after long idleness: under 1 % of a core
constexpr int64_t kNapShare = 16;                    // a nap lasts this part of the idle time so far
constexpr int64_t kWatcherFast = 20 * kMicrosecond;  // poll interval of words that moved lately, and post
constexpr int64_t kWatcherSlow = 10 * kMillisecond;  // later the dispatcher wakes us, if no callback keeps it
constexpr int64_t kWatcherFastFor = 20 * kMillisecond;
constexpr uint64_t kDriveBytes = 1ull << 20;  // per peer and step, so that polling is never far away
constexpr int64_t kSoon = 20 * kMillisecond;  // what a peer is to be looked at for, if it has something under way
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

void sleep_on(std::vector<pollfd>& fds, int64_t timeout_ns) {
  timeout_ns = std::clamp<int64_t>(timeout_ns, 0, 3600'000 * kMillisecond);
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  ppoll(fds.data(), fds.size(), &timeout, nullptr);
}

}  // namespace

void Engine::run() {
  worker_ = std::thread([this] { worker_main(); });
  pthread_setname_np(worker_.native_handle(), "railwire");
  if (options_.cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(options_.cpu, &set);
    if (pthread_setaffinity_np(worker_.native_handle(), sizeof set, &set) != 0) {
      close(0);
      throw NicError("cannot pin the worker to cpu " + std::to_string(options_.cpu) +
                     ": no such core in this process's affinity mask (see taskset -p)");
    }
  }
}

void Engine::start(std::shared_ptr<Operation> operation) {
  Operation& started = *operation;
  started.driver_ = this;
  started.start(*this, std::move(operation));
}

bool Engine::take_commands() {
  bool any = false;
  while (auto* node = commands_.pop()) {
    start(std::move(static_cast<Operation*>(node)->queued_self));
    any = true;
  }
  return any;
}

bool Engine::drive(int64_t now, const Operation* waited_for) {
  bool busy = take_commands();
  if (!held_.empty()) busy |= let_in();
  const Polled polled = poll_nics();
  // Arrivals alone leave nothing to be done for any peer. But who finds what he waits for at once, again and again, may
  // be all that drives: what is due by the clock is due for him, too.
  const bool nothing_due =
      due_.empty() && active_.empty() && acting_ == 0 && held_.empty() && now < next_tick_ && now < next_look_;
  if (!busy && nothing_due && polled.only_arrivals && waited_for && waited_for->done()) return true;
  busy |= polled.any;
  touched_.clear();  // all are served
  if (!due_.empty()) {
    size_t kept = 0;
    for (size_t i = 0; i < due_.size(); ++i) {  // others may join them
      Peer& peer = *due_[i];
      ++totals_.peer_looks;
      busy |= pump(peer, kDriveBytes);
      if (peer.ack_due) send_due_records(peer, 0);
      peer.due = peer.anything_due();
      if (peer.due) due_[kept++] = &peer;
    }
    due_.resize(kept);
  }
  if (acting_ > 0) busy |= act_on_words(now);
  ++totals_.loops;
  if (now >= next_look_) look_at_processes(now);
  if (now >= next_tick_) tick(now);
  return busy;
}

bool Engine::has_work(int64_t now) const {
  if (!active_.empty() || !held_.empty() || counters_.pending() || acting_ > 0 || !revokes_.empty()) return true;
  return !due_.empty() || next_tick_ < now + kSoon;
}

int64_t Engine::next_deadline(int64_t now) const {
  int64_t deadline = next_tick_;
  for (const Peer* peer : due_) {
    for (const auto& link : peer->links) {
      if (!link->want_flush.empty() && !link->flushing) deadline = std::min(deadline, link->flush_due);
    }
  }
  if (!held_.empty()) deadline = std::min(deadline, now + kWatcherFast);
  if (acting_ > 0) {
    const bool fast = now - watcher_activity_ns_ < kWatcherFastFor;
    deadline = std::min(deadline, now + (fast ? kWatcherFast : kWatcherSlow));
  }
  return deadline;
}

bool Engine::sleep_as_driver(std::unique_lock<DriverLock>& lock, bool worker, int64_t idle_since, int64_t deadline) {
  const int64_t now = now_ns();
  const int64_t nap = std::clamp((now - idle_since) / kNapShare, kShortNap, kLongNap);
  deadline = std::min(deadline, next_deadline(now));
  Doorbell& bell = worker ? worker_bell_ : inline_bell_;
  std::vector<pollfd> fds{{bell.fd(), POLLIN, 0}};
  bool armed = true;
  size_t armed_nics = 0;
  for (; armed_nics < nics_.size() && armed; ++armed_nics) {
    armed = nics_[armed_nics]->arm();
    const int fd = nics_[armed_nics]->wait_fd();
    if (fd >= 0) {
      fds.push_back({fd, POLLIN, 0});
    } else {
      const int64_t longest = nics_[armed_nics]->info().longest_nap_ns;
      deadline = std::min(deadline, now + (longest > 0 ? std::min(nap, longest) : nap));
    }
  }
  fds.push_back({processes_, POLLIN, 0});
  if (!armed) deadline = std::min(deadline, now + kShortNap);
  asleep_until_ = std::min(asleep_until_, deadline);
  if (worker) {
    worker_rest_.store(Rest::kAsleep, std::memory_order_seq_cst);
  } else {
    inline_asleep_.store(true, std::memory_order_seq_cst);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const bool others_want = worker && (inline_waiters_.load() > 0 || stop_worker_.load());
  if (!commands_.maybe_nonempty() && !others_want && deadline > now) {
    ++totals_.sleeps;
    lock.unlock();
    sleep_on(fds, deadline - now);
    lock_again(lock);
  }
  // If another sleeps as well, it is rung below, and sleeps again by a deadline of its own.
  asleep_until_ = kNever;
  if (worker) {
    worker_rest_.store(Rest::kNone, std::memory_order_relaxed);
    // The event that this thread takes off the NICs below may be the one which that sleeper was to wake by.
    if (inline_asleep_.load()) inline_bell_.ring();
  } else {
    inline_asleep_.store(false, std::memory_order_relaxed);
  }
  if (fds[0].revents) bell.clear();
  // Closing the engine while we slept has taken the NICs away.
  for (size_t i = 0; i < std::min(armed_nics, nics_.size()); ++i) nics_[i]->disarm();
  if (fds.back().revents) next_look_ = 0;  // a peer's process has ended
  return std::any_of(fds.begin(), fds.end(), [](const pollfd& fd) { return fd.revents != 0; });
}

// The worker leaves the field to threads that drive while they wait. It comes back when they have been gone for a
// while, or when one of them rings because there is work that nobody waits for. Each look costs whoever has the core a
// switch of context, so it looks less and less often while it finds somebody there.
void Engine::park(int64_t hold, bool deep) {
  std::vector<pollfd> fds{{worker_bell_.fd(), POLLIN, 0}};
  hand_over();
  worker_rest_.store(deep ? Rest::kParkedDeep : Rest::kParked, std::memory_order_seq_cst);
  const bool others = inline_waiters_.load(std::memory_order_seq_cst) > 0;
  // Who has found us driving and put something into the queue has rung nobody.
  if (others || (!deep && !commands_.pushed())) sleep_on(fds, hold);
  worker_rest_.store(Rest::kNone, std::memory_order_relaxed);
  if (fds[0].revents) {
    worker_bell_.clear();
    // Out of a deep park it is called by whoever leaves, and may be back at once.
    if (!deep && inline_waiters_.load(std::memory_order_seq_cst) == 0) {
      last_inline_ns_.store(0, std::memory_order_relaxed);
    }
  }
}

void Engine::worker_main() {
  prctl(PR_SET_TIMERSLACK, kMicrosecond, 0, 0, 0);  // else a nap of 20 us lasts 70
  int64_t last_busy = now_ns();
  int64_t hold = kParkHold;
  uint32_t submissions = 0;
  bool parked = false;
  bool napping = false;  // the last sleep ended by itself
  int64_t spin = kWorkerSpin;
  bool event_since_sleep = false;
  while (!stop_worker_.load(std::memory_order_acquire)) {
    std::unique_lock lock(drive_, std::defer_lock);
    if (!options_.spin) {
      const bool others = inline_waiters_.load(std::memory_order_seq_cst) > 0;
      const int64_t quiet = now_ns() - last_inline_ns_.load(std::memory_order_relaxed);
      // Between two waits a thread submits, which may take a provider long. But who only submits is not waited for.
      const uint32_t seen = std::exchange(submissions, inline_submissions_.load(std::memory_order_relaxed));
      const bool submitting = quiet < kSubmitHold && seen != submissions;
      if (others || submitting || quiet < kParkHold || (parked && !lock.try_lock())) {
        const bool deep = others && quiet > kDeepAfter;
        // Threads that submit and look at their operations by themselves drive when they have to. Nobody does for those
        // who only want to be told.
        const bool left_alone = others || (submitting && listeners_.load(std::memory_order_relaxed) <= 0);
        if (left_alone) hold = std::min(2 * hold, deep ? kDeepHold : kLongestHold);
        park(left_alone ? hold : kParkHold, deep);
        last_busy = now_ns();
        parked = true;
        // Nobody may be driving: they look at operations that have ended, or stop for a moment between two.
        if (inline_waiters_.load(std::memory_order_seq_cst) == 0 && lock.try_lock()) {
          drive(last_busy);
          tell_sleeper();
        }
        continue;
      }
      hold = kParkHold;
      parked = false;
    }
    if (!lock) {
      while (lock_waiters_.load(std::memory_order_relaxed) > 0 && !stop_worker_.load()) sched_yield();
      lock.lock();
    }
    const int64_t now = now_ns();
    bool busy = false;
    for (int i = 0; i < (spin == kLoneSpin ? 2 : 16); ++i) {
      busy |= drive(now);
      if (napping || inline_waiters_.load(std::memory_order_relaxed) > 0) break;
    }
    napping = false;
    tell_sleeper();
    if (options_.spin) continue;
    if (busy) {
      if (event_since_sleep) spin = kWorkerSpin;
      event_since_sleep = true;
      last_busy = now_ns();
    } else if (now - last_busy > spin) {
      // Woken by a NIC, it spins again even if nothing has ended: a long write is coming in piece by piece.
      const int64_t begin = now_ns();
      napping = !sleep_as_driver(lock, true, last_busy, kNever);
      const int64_t end = now_ns();
      spin = end - begin > kLongSleep ? kLoneSpin : kWorkerSpin;
      event_since_sleep = false;
      if (!napping) last_busy = end;
    } else {
      lock.unlock();
      cpu_relax();
    }
  }
}

}  // namespace railwire
