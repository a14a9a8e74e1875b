// What is behind control_addresses.h.
#include "engine/control_addresses.h"

namespace railwire {

uint64_t ControlAddresses::take(uint32_t nic, const std::vector<std::byte>& address) {
  const Name name(nic, address);
  {
    std::lock_guard lock(mutex_);
    if (const auto known = entries_.find(name); known != entries_.end()) {
      if (known->second.holders++ == 0) idle_.erase(known->second.idle);
      return known->second.handle;
    }
  }
  const uint64_t handle = nics_[nic]->resolve(address);  // may block: without the lock
  std::unique_lock lock(mutex_);
  const auto [known, fresh] = entries_.try_emplace(name);
  Entry& entry = known->second;
  if (!fresh) {  // somebody else was faster
    if (entry.holders++ == 0) idle_.erase(entry.idle);
    const uint64_t first = entry.handle;
    lock.unlock();
    nics_[nic]->forget(handle);
    return first;
  }
  entry.handle = handle;
  entry.holders = 1;
  return handle;
}

void ControlAddresses::let_go(uint32_t nic, const std::vector<std::byte>& address) {
  uint64_t forgotten = 0;
  uint32_t of_nic = 0;
  {
    std::lock_guard lock(mutex_);
    const auto known = entries_.find({nic, address});
    if (known == entries_.end() || --known->second.holders > 0) return;
    known->second.idle = idle_.insert(idle_.end(), known->first);
    if (idle_.size() <= kMostIdle) return;
    const auto oldest = entries_.find(idle_.front());
    of_nic = oldest->first.first;
    forgotten = oldest->second.handle;
    entries_.erase(oldest);
    idle_.pop_front();
  }
  nics_[of_nic]->forget(forgotten);
}

void ControlAddresses::forget_all() {
  std::lock_guard lock(mutex_);
  for (const auto& [name, entry] : entries_) nics_[name.first]->forget(entry.handle);
  entries_.clear();
  idle_.clear();
}

size_t ControlAddresses::size() const {
  std::lock_guard lock(mutex_);
  return entries_.size();
}

}  // namespace railwire
