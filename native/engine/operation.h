// Anything that ends once: a transfer, an expectation, a fence. The native half of a Python future.
//
// States: pending -> done | failed | cancelled. The driver writes the result, then the state (release); readers load
// the state (acquire) and may then read the result without a lock. The state word is also the futex that a thread in
// wait() sleeps on.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/mpsc.h"

namespace railwire::cuda {
class StreamWord;
}

namespace railwire {

class Engine;

enum class State : uint32_t { kPending = 0, kDone = 1, kFailed = 2, kCancelled = 3 };

enum class Reason : uint8_t {
  kNone = 0,
  kPeerLost,
  kLinkFailed,
  kRemoteAccess,
  kRevoked,
  kClosed,
  kTimeout,
  kWriterFailed,
  kNotFenced,
  kCancelled,
  kRejected,
  kLocal,
};
const char* to_string(Reason reason);

struct Failure {
  Reason reason = Reason::kNone;
  uint64_t peer = 0;  // engine-local id; 0: none
  std::string nic;
  std::string message;
};

class Operation : public MpscNode, public std::enable_shared_from_this<Operation> {
 public:
  explicit Operation(std::weak_ptr<Engine> engine) : engine_(std::move(engine)) {}
  virtual ~Operation() = default;

  State state() const { return state_.load(std::memory_order_acquire); }
  bool done() const { return state() != State::kPending; }
  // As done(), by somebody who wants the end soon.
  bool poll() {
    wanted_.store(true, std::memory_order_relaxed);
    return done();
  }
  // Somebody waits for the end. Where nobody does, its proof may be put off to be had together with others.
  bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
  // Valid once done().
  const Failure& failure() const;
  bool may_still_land() const { return may_still_land_; }

  // Blocks until done or `timeout_ns` is over; true if done. The waiting thread drives the engine meanwhile, so that
  // no other thread needs to be woken between the NIC and the caller.
  bool wait(int64_t timeout_ns);
  // Asks for one Event::kFinished with this token. False if already done: no event will come.
  bool notify(uint64_t token);
  // Has the word raised when the operation ends, however it does: a CUDA stream waits for it.
  void raise_at_end(std::shared_ptr<const cuda::StreamWord> word);
  // Asks the driver to stop it. Returns at once; the end comes as for any other.
  void cancel();

  // Driver only. The first call wins, later ones are ignored.
  void finish(State state, Failure failure, bool may_still_land = false);
  void finish_done();

  // Driver only: what a submission does when it is the driver's turn, and what cancel() does. `self`: the submission's
  // own reference, for whoever keeps the operation until its end.
  virtual void start(Engine& engine, std::shared_ptr<Operation> self) = 0;
  virtual void stop(Engine& engine) = 0;

  // The command queue's own reference, from submission until start().
  std::shared_ptr<Operation> queued_self;

 protected:
  std::weak_ptr<Engine> engine_;

 private:
  friend class Engine;
  void tell(State state);          // that it has ended
  bool sleep(int64_t timeout_ns);  // on the futex
  void nudge();                    // wakes those who sleep, though it has not ended

  std::atomic<State> state_{State::kPending};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> wanted_{false};
  std::atomic<uint64_t> token_{0};
  void raise_stream_words();
  std::unique_ptr<std::vector<std::shared_ptr<const cuda::StreamWord>>> stream_words_;  // null: none
  std::atomic<bool> has_stream_words_{false};
  Engine* driver_ = nullptr;          // once started; it outlives whatever finishes the operation
  std::unique_ptr<Failure> failure_;  // null: none
  bool may_still_land_ = false;
};

}  // namespace railwire
