// Immediate counters: how a receiver learns that everything has landed, whatever the order.
//
// Each id has a count of units (sixteenths of an arrival). An expectation waits for a number of units, in the order in
// which expectations were made, and consumes them when reached. Arrivals before an expectation are kept. A writer that
// failed poisons the id: nobody can know how much of it is still to come, so every expectation that depends on that
// writer fails, also later ones, until reset(). Driver only.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/immediate.h"
#include "engine/members.h"
#include "engine/operation.h"

namespace railwire {

class ArrivalWords;
class Counters;

class Expectation final : public Operation {
 public:
  // `peers` empty: any writer may be meant, so losing any peer ends it. `timeout_ns` counts from the submission.
  Expectation(std::weak_ptr<Engine> engine, uint32_t id, uint64_t units, std::vector<uint64_t> peers,
              int64_t timeout_ns);
  void start(Engine& engine, std::shared_ptr<Operation> self) override;
  void stop(Engine& engine) override;

  bool depends_on(uint64_t peer) const;

  const uint32_t id;
  const uint64_t units;
  const std::vector<uint64_t> peers;
  const int64_t timeout_ns;
  const int64_t deadline_ns;
  size_t place = Members<Expectation*>::kNowhere;  // in the pending ones
};

class Counters {
 public:
  void arrive(uint32_t immediate) {
    const uint32_t id = immediate_id(immediate);
    Page* page = pages_[id / kPageSize].get();
    if (!page) page = add_page(id);
    Slot& slot = (*page)[id % kPageSize];
    const uint32_t weight = immediate_weight(immediate);
    slot.units += weight;
    units_seen_ += weight;
    if (slot.detail) settle(id, slot);
  }

  void expect(std::shared_ptr<Expectation> expectation);
  void cancel(Expectation& expectation);
  // A writer told us that it failed. `peer`: which. False: so many have been told, and not been reset, that this one is
  // not kept.
  bool poison(uint32_t id, uint64_t peer, const std::string& why);
  // Makes room for others: forgets what peers told that are gone.
  void forget_poisons(auto&& gone) {
    for (uint32_t id = 0; poisons_ > 0 && id < kImmediateIds; id += pages_[id / kPageSize] ? 1 : kPageSize) {
      const auto& page = pages_[id / kPageSize];
      if (!page || !(*page)[id % kPageSize].detail) continue;
      Slot& s = (*page)[id % kPageSize];
      poisons_ -= std::erase_if(s.detail->poisons, [&](const auto& p) { return gone(p.peer); });
      settle(id, s);
    }
  }
  void reset(uint32_t id);
  // Keeps the words up to date until unfollow(). False: one of the ids is followed already.
  bool follow(std::shared_ptr<ArrivalWords> words);
  void unfollow(const ArrivalWords& words);
  // The first of `count` consecutive ids, at or after `first` and around the end, that nobody has written to, waits for
  // or has failed to write to since they were used up.
  std::optional<uint32_t> find_unused(uint32_t first, uint32_t count) const;
  uint64_t units(uint32_t id) const;

  // Ends what depends on a lost peer. `named`: only where it was named; it cannot have been meant otherwise.
  void peer_lost(uint64_t peer, const std::string& why, bool named);
  // Ends what is past its deadline; returns the next deadline, or INT64_MAX.
  int64_t expire(int64_t now);
  void fail_all(const Failure& failure);

  size_t pending() const { return pending_.size(); }
  uint64_t units_seen() const { return units_seen_; }

 private:
  struct Detail {
    std::deque<std::shared_ptr<Expectation>> waiting;
    struct Poison {
      uint64_t peer;
      std::string why;
    };
    std::vector<Poison> poisons;
    ArrivalWords* words = nullptr;  // that follow this id
  };
  struct Slot {
    uint64_t units = 0;
    std::unique_ptr<Detail> detail;
  };
  static constexpr uint32_t kPageSize = 1024;
  static constexpr size_t kMostPoisons = 1 << 17;
  using Page = std::array<Slot, kPageSize>;

  Page* add_page(uint32_t id);
  Slot& slot(uint32_t id);
  Detail& detail(Slot& slot);
  void settle(uint32_t id, Slot& slot);
  void end(Expectation& expectation, State state, Failure failure);
  std::vector<std::shared_ptr<Expectation>> take_if(auto&& predicate);
  // The same of one id.
  void take_of(uint32_t id, auto&& predicate, std::vector<std::shared_ptr<Expectation>>& taken);

  std::vector<std::unique_ptr<Page>> pages_{kImmediateIds / kPageSize};
  Members<Expectation*> pending_;
  // No pending one ends before this. Found anew when it is past: most expectations end long before they must.
  int64_t earliest_ = std::numeric_limits<int64_t>::max();
  // Of the last id that somebody waited for, for the next: where there is one at a time, nothing is allocated for it.
  std::unique_ptr<Detail> spare_detail_;
  std::vector<std::shared_ptr<ArrivalWords>> followers_;
  uint64_t units_seen_ = 0;
  size_t poisons_ = 0;
};

}  // namespace railwire
