// The thread that makes those set-up calls of NICs which nobody waits for: deregistering what was let go, destroying
// links, forgetting addresses, registering anew. They may block, and whoever drives must not.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace railwire {

class SetupThread {
 public:
  ~SetupThread() { finish(); }
  // Has `task` run on the thread, in the order of pushing; starts the thread at the first. False, and nothing happens,
  // after finish().
  bool push(std::function<void()> task);
  // Runs what is queued and ends the thread. Not with a lock in hand that a task may want.
  void finish();

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;
  bool finished_ = false;
};

}  // namespace railwire
