// Submission queue: many producers, one consumer, no lock (Vyukov's intrusive MPSC queue, 1024cores.net).
#pragma once

#include <atomic>

namespace railwire {

struct MpscNode {
  std::atomic<MpscNode*> next{nullptr};
};

class MpscQueue {
 public:
  void push(MpscNode* node) {
    node->next.store(nullptr, std::memory_order_relaxed);
    MpscNode* previous = head_.exchange(node, std::memory_order_acq_rel);
    previous->next.store(node, std::memory_order_release);
  }

  // The oldest node, or null if there is none (or its producer is between the two steps of push: it comes next time).
  MpscNode* pop() {
    MpscNode* tail = tail_;
    MpscNode* next = tail->next.load(std::memory_order_acquire);
    if (tail == &stub_) {
      if (!next) return nullptr;
      tail_ = tail = next;
      next = tail->next.load(std::memory_order_acquire);
    }
    if (next) {
      tail_ = next;
      return tail;
    }
    if (tail != head_.load(std::memory_order_acquire)) return nullptr;
    push(&stub_);
    next = tail->next.load(std::memory_order_acquire);
    if (!next) return nullptr;
    tail_ = next;
    return tail;
  }

  // As maybe_nonempty(), for others than the consumer.
  bool pushed() const { return head_.load(std::memory_order_seq_cst) != &stub_; }

  // Something has been pushed and not popped. Sequentially consistent with a producer's push and the sleeper's flag.
  bool maybe_nonempty() const { return tail_ != &stub_ || head_.load(std::memory_order_seq_cst) != &stub_; }

 private:
  MpscNode stub_;
  std::atomic<MpscNode*> head_{&stub_};
  MpscNode* tail_ = &stub_;
};

}  // namespace railwire
