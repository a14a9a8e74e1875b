// A row of which there is nearly always one, which then needs no memory of its own: a write has one piece, one peer
// and one link.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace railwire {

// Contiguous, like a vector; T is default-constructible. Adding a second one moves the first.
template <class T>
class Few {
 public:
  Few() = default;
  Few(T one) : one_(std::move(one)), count_(1) {}  // NOLINT: a T is a row of one
  Few(std::vector<T> all) : count_(all.size()) {   // NOLINT: so is any vector
    if (count_ == 1) {
      one_ = std::move(all.front());
    } else {
      several_ = std::move(all);
    }
  }
  Few(Few&&) = default;
  Few& operator=(Few&&) = default;

  T& emplace_back() {
    if (++count_ == 1) return one_;
    if (count_ == 2) several_.push_back(std::move(one_));
    return several_.emplace_back();
  }
  // Of an empty row that is to have so many.
  void reserve(size_t count) {
    if (count > 1) several_.reserve(count);
  }
  // Only of an empty row: so many new ones.
  void resize(size_t count) {
    count_ = count;
    if (count > 1) several_.resize(count);
  }
  size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  T* begin() { return count_ > 1 ? several_.data() : &one_; }
  T* end() { return begin() + count_; }
  const T* begin() const { return count_ > 1 ? several_.data() : &one_; }
  const T* end() const { return begin() + count_; }
  T& operator[](size_t index) { return begin()[index]; }
  const T& operator[](size_t index) const { return begin()[index]; }

 private:
  T one_{};
  std::vector<T> several_;  // all of them, if they are more than one
  size_t count_ = 0;
};

}  // namespace railwire
