// The control endpoints of remote NICs that this engine sends to, by address. Peers keep theirs for as long as they
// live; a stranger's, who only shakes hands, is remembered for a while, and only so many are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "nic/nic.h"

namespace railwire {

class ControlAddresses {
 public:
  static constexpr size_t kMostIdle = 256;  // that nobody holds

  explicit ControlAddresses(const std::vector<std::unique_ptr<Nic>>& nics) : nics_(nics) {}

  // A handle for Nic::send(), valid until the address is let go as often as it was taken. Both may block as
  // Nic::resolve() and forget() do; the first throws NicError.
  uint64_t take(uint32_t nic, const std::vector<std::byte>& address);
  void let_go(uint32_t nic, const std::vector<std::byte>& address);
  // Before the NICs go. Nothing is held any more.
  void forget_all();
  size_t size() const;

 private:
  using Name = std::pair<uint32_t, std::vector<std::byte>>;
  struct Entry {
    uint64_t handle = 0;
    size_t holders = 0;
    std::list<Name>::iterator idle;  // its place there, while nobody holds it
  };

  const std::vector<std::unique_ptr<Nic>>& nics_;
  mutable std::mutex mutex_;
  std::map<Name, Entry> entries_;
  std::list<Name> idle_;  // the longest idle first
};

}  // namespace railwire
