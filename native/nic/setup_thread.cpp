// The queue behind setup_thread.h.
#include "nic/setup_thread.h"

#include <pthread.h>

#include <utility>

namespace railwire {

bool SetupThread::push(std::function<void()> task) {
  {
    std::lock_guard lock(mutex_);
    if (finished_) return false;
    tasks_.push_back(std::move(task));
    if (!thread_.joinable()) {
      thread_ = std::thread([this] { run(); });
      pthread_setname_np(thread_.native_handle(), "railwire-setup");
    }
  }
  more_.notify_one();
  return true;
}

void SetupThread::finish() {
  {
    std::lock_guard lock(mutex_);
    finished_ = true;
  }
  more_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void SetupThread::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    more_.wait(lock, [this] { return finished_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what it holds goes here, without the lock
    lock.lock();
  }
}

}  // namespace railwire
