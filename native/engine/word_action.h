// A prepared scatter that is posted whenever a watched word moves: no thread and no Python between the word and the
// NIC. Whoever moves the word (a kernel, a CPU thread) has filled the table before.
//
// Operation n is posted when the word reaches n, from slot (n - 1) % depth of the table. All in the driver's hands:
//
//   due ----posted (the slot has been read, and may be filled again)----> under way ----ended----> told
//
// Three words of memory tell whoever fills the table how far this has come, without a call: posted, ended, failed.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/prepared.h"

namespace railwire {

class Engine;

class WordAction {
 public:
  // `tell_all`: keep what has ended for take_ended(), and not only what has failed.
  WordAction(std::shared_ptr<PreparedScatter> plan, bool tell_all);

  // Driver. Posts what is due as the word now stands, and looks at what is under way. True if there was anything.
  bool step(Engine& engine, uint64_t word);
  // Driver. Without posting; true if there is something to tell.
  bool collect();
  bool idle() const { return under_way_.empty(); }

  struct Ended {
    uint64_t number;
    std::shared_ptr<Transfer> transfer;
  };
  // Dispatcher. Of very many that nobody took, the oldest are left out.
  std::vector<Ended> take_ended();

  // A page: words 0, 8 and 16 are the numbers of operations posted and ended (in their order), and of those that have
  // failed.
  uint64_t* progress() const { return progress_.get(); }

 private:
  static constexpr size_t kMostUnderWay = 256;   // later ones wait for them
  static constexpr uint64_t kMostDue = 1 << 16;  // more at once nobody can have meant
  static constexpr size_t kMostKept = 1 << 14;   // of what has ended

  void publish(size_t index, uint64_t value);
  void keep(uint64_t number, std::shared_ptr<Transfer> transfer);

  const std::shared_ptr<PreparedScatter> plan_;
  const bool tell_all_;
  std::unique_ptr<uint64_t, decltype(&std::free)> progress_;
  uint64_t posted_ = 0, ended_ = 0, failed_ = 0;
  std::deque<std::shared_ptr<Transfer>> under_way_;
  std::mutex mutex_;
  std::deque<Ended> kept_;
  std::atomic<bool> told_{false};  // an event is on its way
};

}  // namespace railwire
