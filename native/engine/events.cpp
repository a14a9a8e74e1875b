// The queue between the driver and Python's dispatcher.
#include "engine/events.h"

#include <chrono>
#include <cstdint>
#include <utility>

namespace railwire {

void EventQueue::push(Event event) { push_if_room(std::move(event), SIZE_MAX); }

bool EventQueue::push_if_room(Event event, size_t most) {
  bool wake;
  {
    std::lock_guard lock(mutex_);
    if (events_.size() >= most) return false;
    wake = events_.empty();
    events_.push_back(std::move(event));
  }
  if (wake) ready_.notify_one();
  return true;
}

std::vector<Event> EventQueue::pop(int64_t timeout_ns, size_t most) {
  std::vector<Event> out;
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return !events_.empty(); });
  while (!events_.empty() && out.size() < most) {
    out.push_back(std::move(events_.front()));
    events_.pop_front();
  }
  return out;
}

}  // namespace railwire
