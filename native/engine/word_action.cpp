// What follows by itself when a watched word moves.
#include "engine/word_action.h"

#include <algorithm>
#include <new>
#include <string>

#include "engine/engine.h"

namespace railwire {

WordAction::WordAction(std::shared_ptr<PreparedScatter> plan, bool tell_all)
    : plan_(std::move(plan)),
      tell_all_(tell_all),
      progress_(static_cast<uint64_t*>(std::aligned_alloc(4096, 4096)), &std::free) {
  if (!progress_) throw std::bad_alloc();
  std::fill_n(progress_.get(), 4096 / sizeof(uint64_t), 0);
}

void WordAction::publish(size_t index, uint64_t value) {
  std::atomic_ref<uint64_t>(progress_.get()[index]).store(value, std::memory_order_release);
}

bool WordAction::step(Engine& engine, uint64_t word) {
  uint64_t due = word - posted_;
  if (due == 0) return false;
  if (due > kMostDue) {
    if (!under_way_.empty()) return false;  // they end under their own numbers first
    const std::string what = "the word has gone from " + std::to_string(posted_) + " to " + std::to_string(word) +
                             ": it counts operations, and grows by one for each";
    auto refused = std::make_shared<Transfer>(plan_->engine(), Transfer::Kind::kWrite, -1);
    refused->refused = true;
    refused->first_failure = std::make_unique<Failure>(Failure{Reason::kRejected, 0, "", what});
    posted_ = word;  // what comes next counts from here
    ended_ = word - 1;
    publish(0, posted_);
    under_way_.push_back(refused);
    engine.start_transfer(std::move(refused));
    return true;
  }
  bool any = false;
  for (; due > 0 && under_way_.size() < kMostUnderWay; --due) {
    const size_t slot = posted_ % plan_->depth();
    std::shared_ptr<Transfer> transfer;
    if (plan_->region()->closed.load()) {
      transfer = plan_->make_refused(slot, {Reason::kClosed, 0, "", "the region that it writes from is closed"});
    } else {
      auto made = plan_->make(slot);
      transfer = made.problem.empty() ? std::move(made.transfer)
                                      : plan_->make_refused(slot, {Reason::kRejected, 0, "", made.problem});
    }
    transfer->poll();  // its end is waited for: the source may be filled again then
    under_way_.push_back(transfer);
    engine.start_transfer(std::move(transfer));
    publish(0, ++posted_);  // the slot has been read, and what the NICs take at once is with them
    any = true;
  }
  return any;
}

bool WordAction::collect() {
  bool tell = false;
  bool any = false;
  while (!under_way_.empty() && under_way_.front()->done()) {
    auto transfer = std::move(under_way_.front());
    under_way_.pop_front();
    ++ended_;
    any = true;
    const bool failed = transfer->state() != State::kDone;
    if (failed) publish(16, ++failed_);
    if (failed || tell_all_) {
      keep(ended_, std::move(transfer));
      tell = true;
    }
  }
  if (any) publish(8, ended_);
  return tell && !told_.exchange(true, std::memory_order_acq_rel);
}

void WordAction::keep(uint64_t number, std::shared_ptr<Transfer> transfer) {
  std::lock_guard lock(mutex_);
  kept_.push_back({number, std::move(transfer)});
  if (kept_.size() > kMostKept) kept_.pop_front();
}

std::vector<WordAction::Ended> WordAction::take_ended() {
  told_.exchange(false, std::memory_order_acq_rel);  // as in Watcher::take()
  std::lock_guard lock(mutex_);
  std::vector<Ended> taken(std::make_move_iterator(kept_.begin()), std::make_move_iterator(kept_.end()));
  kept_.clear();
  return taken;
}

}  // namespace railwire
