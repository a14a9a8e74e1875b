// A queue of objects that carry their own place in it: any of them leaves at once, wherever it stands.
#pragma once

namespace railwire {

// Of anything that has `T* before` and `T* behind`, and is in one chain at a time.
template <class T>
class Chain {
 public:
  bool empty() const { return !first_; }
  T* front() const { return first_; }
  void push_back(T* member) {
    member->before = last_;
    member->behind = nullptr;
    (last_ ? last_->behind : first_) = member;
    last_ = member;
  }
  void pop_front() { erase(first_); }
  // Of one that is in it.
  void erase(T* member) {
    (member->before ? member->before->behind : first_) = member->behind;
    (member->behind ? member->behind->before : last_) = member->before;
    member->before = member->behind = nullptr;
  }

 private:
  T* first_ = nullptr;
  T* last_ = nullptr;
};

}  // namespace railwire
