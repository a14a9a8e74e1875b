// Engines before and after fork().
#include "engine/fork.h"

#include <chrono>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "engine/clock.h"
#include "engine/engine.h"
#include "nic/process_lock.h"

namespace railwire {
namespace {

constexpr int64_t kPatience = 1'000'000'000;  // ns

// Never destroyed: engines may end while the process does.
struct All {
  std::mutex mutex;
  std::unordered_set<Engine*> engines;
  std::vector<std::shared_ptr<Engine>> held;  // between before_fork() and its end
  std::vector<bool> locked;                   // of each: whether its driver's lock is ours
};
All& all() {
  static auto* one = new All;
  return *one;
}

}  // namespace

void note_engine(Engine& engine) {
  const std::lock_guard lock(all().mutex);
  all().engines.insert(&engine);
}

void forget_engine(Engine& engine) {
  const std::lock_guard lock(all().mutex);
  all().engines.erase(&engine);
}

void before_fork() {
  all().mutex.lock();
  const int64_t deadline = now_ns() + kPatience;
  for (Engine* engine : all().engines) {
    // One that is being destroyed on another thread is not found here; its half-dead copy harms nobody.
    if (auto alive = engine->weak_from_this().lock()) {
      all().locked.push_back(alive->hold_still(deadline));
      all().held.push_back(std::move(alive));
    }
  }
  ProcessLock::hold_all(std::chrono::nanoseconds(deadline - now_ns()));
}

void after_fork_in_parent() {
  ProcessLock::let_go_all();
  auto held = std::move(all().held);
  for (size_t i = 0; i < held.size(); ++i) {
    if (all().locked[i]) held[i]->go_on();
  }
  all().held.clear();
  all().locked.clear();
  all().mutex.unlock();
  // Only now: the last reference of one may be ours.
}

void after_fork_in_child() {
  ProcessLock::renew_all();
  static auto* inherited = new std::vector<std::shared_ptr<Engine>>;  // their destructors never run
  for (size_t i = 0; i < all().held.size(); ++i) {
    all().held[i]->note_inherited(all().locked[i]);
    inherited->push_back(std::move(all().held[i]));
  }
  all().engines.clear();
  all().held.clear();
  all().locked.clear();
  all().mutex.unlock();
}

}  // namespace railwire
