// A lock of the whole process, which a child of fork() finds open, whoever had it in the parent (engine/fork.h).
//
// For what is opened once and for all engines, such as a library: a child may open engines of its own, and no thread is
// left there that would ever unlock what another one had locked.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>

namespace railwire {

class ProcessLock {
 public:
  ProcessLock() : next_(first().load()) {
    while (!first().compare_exchange_weak(next_, this)) {
    }
  }
  ProcessLock(const ProcessLock&) = delete;
  ProcessLock& operator=(const ProcessLock&) = delete;  // nor does one ever end

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  // Around fork(): takes all of them, as far as they are free within `patience`. What they guard is whole then.
  static void hold_all(std::chrono::nanoseconds patience) {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (ProcessLock* one = first().load(); one; one = one->next_) {
      while (!(one->held_ = one->mutex_.try_lock()) && std::chrono::steady_clock::now() < deadline) sched_yield();
    }
  }
  static void let_go_all() {
    for (ProcessLock* one = first().load(); one; one = one->next_) {
      if (one->held_) one->mutex_.unlock();
      one->held_ = false;
    }
  }
  // In the child, whose copy of a lock that could not be had belongs to nobody.
  static void renew_all() {
    for (ProcessLock* one = first().load(); one; one = one->next_) {
      new (&one->mutex_) std::mutex;
      one->held_ = false;
    }
  }

 private:
  static std::atomic<ProcessLock*>& first() {
    static std::atomic<ProcessLock*> head{nullptr};
    return head;
  }

  std::mutex mutex_;
  bool held_ = false;  // by hold_all()
  ProcessLock* next_;
};

}  // namespace railwire
