// The lock that guards the engine: exclusive, and nobody sleeps for ever.
#include <doctest/doctest.h>

#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "nic/quick_lock.h"

using namespace railwire;

TEST_CASE("the driver's lock: one at a time, whoever sleeps is woken, and a try does not wait") {
  DriverLock lock;
  uint64_t count = 0;  // of no atomic kind: the lock is all that guards it
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int k = 0; k < 20'000; ++k) {
        if (i % 2 == 0) {
          std::lock_guard guard(lock);
          ++count;
        } else {
          while (!lock.try_lock()) std::this_thread::yield();
          ++count;
          lock.unlock();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(count == 80'000);

  lock.lock();
  CHECK_FALSE(lock.try_lock());
  std::vector<std::thread> sleepers;
  for (int i = 0; i < 3; ++i) sleepers.emplace_back([&] { std::lock_guard guard(lock); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // long enough for them to sleep; right without, too
  lock.unlock();
  for (auto& thread : sleepers) thread.join();  // each wakes the next
  CHECK(lock.try_lock());
  lock.unlock();
}
