// The queue between the driver and Python's dispatcher.
#include "engine/events.h"

#include <chrono>
#include <cstdint>
#include <utility>

#include "engine/clock.h"
#include "engine/watched_words.h"

namespace railwire {

EventQueue::EventQueue() : words_(std::make_unique<WatchedWords>()) {}
EventQueue::~EventQueue() = default;

void EventQueue::push(Event event) { push_if_room(std::move(event), SIZE_MAX); }

bool EventQueue::push_if_room(Event event, size_t most) {
  bool wake;
  {
    std::lock_guard lock(mutex_);
    if (events_.size() >= most) return false;
    wake = events_.empty();
    events_.push_back(std::move(event));
  }
  if (!wake) return true;
  ready_.notify_one();
  if (words_->any()) words_->interrupt();
  return true;
}

void EventQueue::words_added() {
  {
    std::lock_guard lock(mutex_);
  }  // not between the look and the sleep of who drains
  ready_.notify_all();
}

std::vector<Event> EventQueue::pop(int64_t timeout_ns, size_t most) {
  std::vector<Event> out;
  const int64_t deadline = now_ns() + timeout_ns;
  if (words_->any()) {
    const auto interrupted = [this] {
      std::lock_guard lock(mutex_);
      return !events_.empty();
    };
    words_->watch(deadline, interrupted, out);
  }
  std::unique_lock lock(mutex_);
  if (out.empty() && !words_->any()) {
    ready_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return !events_.empty() || words_->any(); });
  }
  while (!events_.empty() && out.size() < most) {
    out.push_back(std::move(events_.front()));
    events_.pop_front();
  }
  return out;
}

}  // namespace railwire
