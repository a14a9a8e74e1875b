// Watched words: who looks at which, and what the driver does about those that post by themselves.
#include <algorithm>
#include <utility>

#include "engine/engine.h"
#include "engine/watched_words.h"

namespace railwire {

std::shared_ptr<Watcher> Engine::watch(std::shared_ptr<PreparedScatter> plan, bool tell_all) {
  std::shared_ptr<Watcher> watcher;
  {
    const auto lock = lock_driver();
    if (closed()) throw NicError("the engine is closed");
    watcher = std::make_shared<Watcher>(next_request_++);
    if (plan) {
      watcher->action = std::make_unique<WordAction>(std::move(plan), tell_all);
      watcher_activity_ns_ = now_ns();
    }
    watchers_.push_back(watcher);
    acting_ += watcher->action != nullptr;
    if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
  }
  if (watcher->action && options_.spin) return watcher;  // the driver sees it at once
  WatchedWords::Word word{watcher, options_.event_tag, options_.spin, {}};
  if (watcher->action) {
    word.wake = [weak = weak_from_this()] {
      if (const auto engine = weak.lock()) engine->wake();
    };
  }
  events().words().add(std::move(word));
  events().words_added();
  return watcher;
}

void Engine::unwatch(Watcher& watcher) {
  if (inherited_) return;
  events().words().remove(watcher);
  const auto lock = lock_driver();
  watcher.disarmed = true;
  if (!watcher.action || watcher.action->idle()) drop_watcher(watcher);
}

void Engine::drop_watcher(const Watcher& watcher) {
  const auto dropped = std::erase_if(watchers_, [&](const auto& other) { return other.get() == &watcher; });
  if (dropped && watcher.action) --acting_;
}

// A driver that sleeps looks again.
void Engine::wake() {
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
  if (inline_asleep_.load()) inline_bell_.ring();
}

bool Engine::act_on_words(int64_t now) {
  bool busy = false;
  for (size_t i = 0; i < watchers_.size(); ++i) {
    const auto watcher = watchers_[i];
    if (!watcher->action) continue;
    WordAction& action = *watcher->action;
    if (!watcher->disarmed && action.step(*this, std::atomic_ref<uint64_t>(*watcher->word()).load())) {
      watcher_activity_ns_ = now;
      busy = true;
    }
    tell_of_action(*watcher);
    if (watcher->disarmed && action.idle()) drop_watcher(*watcher);
  }
  return busy;
}

void Engine::tell_of_action(Watcher& watcher) {
  if (watcher.action->collect()) events().push({Event::kAction, options_.event_tag, watcher.id, {}});
}

// At the end of the engine, when all its transfers have ended.
void Engine::end_watchers() {
  for (const auto& watcher : std::exchange(watchers_, {})) {
    if (watcher->action) tell_of_action(*watcher);
  }
  acting_ = 0;
}

}  // namespace railwire
