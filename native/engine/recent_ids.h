// The ids that a peer has told us of lately: at least so many of the newest, and never more than twice that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <utility>

namespace railwire {

class RecentIds {
 public:
  static constexpr size_t kAtLeast = 1 << 17;

  void insert(uint64_t id) {
    if (contains(id)) return;
    if (young_.size() >= kAtLeast) old_ = std::exchange(young_, {});
    young_.insert(id);
  }
  bool contains(uint64_t id) const { return young_.contains(id) || old_.contains(id); }
  bool empty() const { return young_.empty(); }
  size_t size() const { return young_.size() + old_.size(); }

 private:
  std::unordered_set<uint64_t> young_, old_;
};

}  // namespace railwire
