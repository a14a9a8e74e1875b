// A set of objects that know their own place in it: nothing is hashed or allocated when one comes or goes.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace railwire {

// Of anything that has a `size_t place`, and is in one such set at a time. `Pointer` may own. In no order.
template <class Pointer>
class Members {
 public:
  static constexpr size_t kNowhere = static_cast<size_t>(-1);

  void insert(Pointer member) {
    member->place = all_.size();
    all_.push_back(std::move(member));
  }
  // What was inserted; null if it is not in the set.
  template <class T>
  Pointer take(T& member) {
    const size_t place = std::exchange(member.place, kNowhere);
    if (place == kNowhere) return {};
    Pointer taken = std::move(all_[place]);
    if (place + 1 < all_.size()) {
      all_[place] = std::move(all_.back());
      all_[place]->place = place;
    }
    all_.pop_back();
    return taken;
  }
  // Nothing happens if it is not in the set.
  template <class T>
  void erase(T& member) {
    take(member);
  }
  bool empty() const { return all_.empty(); }
  size_t size() const { return all_.size(); }
  auto begin() const { return all_.begin(); }
  auto end() const { return all_.end(); }

 private:
  std::vector<Pointer> all_;
};

}  // namespace railwire
