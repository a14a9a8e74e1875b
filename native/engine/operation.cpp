// The end of operations and the ways to wait for it.
#include "engine/operation.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <utility>

#include "cuda/stream_words.h"
#include "engine/clock.h"
#include "engine/engine.h"
#include "nic/process_lock.h"

namespace railwire {
namespace {

ProcessLock stream_words_mutex;  // of all operations: held for a moment, by the few that streams wait for

}  // namespace

const char* to_string(Reason reason) {
  switch (reason) {
    case Reason::kNone:
      return "none";
    case Reason::kPeerLost:
      return "peer_lost";
    case Reason::kLinkFailed:
      return "link_failed";
    case Reason::kRemoteAccess:
      return "remote_access";
    case Reason::kRevoked:
      return "revoked";
    case Reason::kClosed:
      return "closed";
    case Reason::kTimeout:
      return "timeout";
    case Reason::kWriterFailed:
      return "writer_failed";
    case Reason::kNotFenced:
      return "not_fenced";
    case Reason::kCancelled:
      return "cancelled";
    case Reason::kRejected:
      return "rejected";
    case Reason::kLocal:
      return "local";
  }
  return "unknown";
}

const Failure& Operation::failure() const {
  static const Failure none;
  return failure_ ? *failure_ : none;
}

void Operation::finish(State state, Failure failure, bool may_still_land) {
  if (done()) return;
  if (failure.reason != Reason::kNone) failure_ = std::make_unique<Failure>(std::move(failure));
  may_still_land_ = may_still_land;
  tell(state);
}

void Operation::finish_done() {
  if (!done()) tell(State::kDone);
}

void Operation::tell(State state) {
  state_.store(state, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    syscall(SYS_futex, &state_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }
  if (has_stream_words_.load(std::memory_order_seq_cst)) raise_stream_words();
  if (!driver_) return;
  driver_->note_finished();
  // The store above and notify()'s of the token are in one order, so that one of the two sees the other.
  if (token_.load(std::memory_order_seq_cst) == 0) return;
  if (const uint64_t token = token_.exchange(0, std::memory_order_seq_cst)) {
    driver_->note_listeners(-1);
    driver_->events().push({Event::kFinished, driver_->options().event_tag, token, {}});
  }
}

bool Operation::notify(uint64_t token) {
  wanted_.store(true, std::memory_order_relaxed);
  const auto engine = engine_.lock();
  if (token_.exchange(token, std::memory_order_seq_cst) == 0 && engine) engine->note_listeners(1);
  if (state_.load(std::memory_order_seq_cst) == State::kPending) return true;
  // It ended meanwhile: whoever takes the token back first tells.
  if (token_.exchange(0, std::memory_order_seq_cst) == 0) return true;
  if (engine) engine->note_listeners(-1);
  return false;
}

void Operation::raise_at_end(std::shared_ptr<const cuda::StreamWord> word) {
  wanted_.store(true, std::memory_order_relaxed);
  {
    std::lock_guard lock(stream_words_mutex);
    if (!stream_words_) stream_words_ = std::make_unique<std::vector<std::shared_ptr<const cuda::StreamWord>>>();
    stream_words_->push_back(std::move(word));
  }
  // As for notify(): either the end sees the word, or we see the end; both may, and raising twice is once.
  has_stream_words_.store(true, std::memory_order_seq_cst);
  if (state_.load(std::memory_order_seq_cst) != State::kPending) raise_stream_words();
}

void Operation::raise_stream_words() {
  std::lock_guard lock(stream_words_mutex);
  for (const auto& word : *stream_words_) word->raise();
}

bool Operation::wait(int64_t timeout_ns) {
  const bool over = poll();
  const auto engine = engine_.lock();
  if (over) {
    if (engine) engine->note_wait();
    return true;
  }
  return engine ? engine->wait_for(*this, timeout_ns) : sleep(timeout_ns);
}

void Operation::cancel() {
  if (done()) return;
  if (const auto engine = engine_.lock()) engine->request_stop(shared_from_this());
}

void Operation::nudge() { syscall(SYS_futex, &state_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }

bool Operation::sleep(int64_t timeout_ns) {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  if (state_.load(std::memory_order_seq_cst) == State::kPending) {
    syscall(SYS_futex, &state_, FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(State::kPending), &timeout, nullptr, 0);
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return done();
}

}  // namespace railwire
