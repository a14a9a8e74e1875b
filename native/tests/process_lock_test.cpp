// Locks of the whole process across fork(): a child finds them open, whoever had them.
#include "nic/process_lock.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <thread>

using namespace railwire;

TEST_CASE("locks of the process: a child of fork() finds them open, and the parent's stay as they were") {
  static ProcessLock free_one, busy_one;  // they never end
  std::atomic<bool> busy{false}, done{false};
  std::thread other([&] {  // as one that loads a library
    busy_one.lock();
    busy = true;
    while (!done) std::this_thread::yield();
    busy_one.unlock();
  });
  while (!busy) std::this_thread::yield();
  ProcessLock::hold_all(std::chrono::milliseconds(20));  // busy_one cannot be had
  const pid_t child = fork();
  if (child == 0) {
    ProcessLock::renew_all();
    alarm(10);  // it would hang
    for (ProcessLock* one : {&free_one, &busy_one}) {
      one->lock();
      one->unlock();
    }
    _exit(0);
  }
  ProcessLock::let_go_all();
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  free_one.lock();  // not left held
  free_one.unlock();
  done = true;
  other.join();
  busy_one.lock();
  busy_one.unlock();
}
