// The memory that peers may reach over tcp, by key.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>

namespace railwire {

class TcpRegions {
 public:
  struct Region {
    std::byte* bytes = nullptr;
    uint64_t length = 0;
    bool writable = true;
    bool gpu = false;  // a GPU's: no CPU touches it
  };

  bool add(uint64_t rkey, const Region& region) { return regions_.emplace(rkey, region).second; }
  void remove(uint64_t rkey) {
    regions_.erase(rkey);
    doubtful_.erase(rkey);
  }
  // Some of its memory was not there: it is looked at before bytes of it are promised.
  void doubt(uint64_t rkey) {
    if (regions_.contains(rkey)) doubtful_.insert(rkey);
  }
  bool doubtful(uint64_t rkey) const { return !doubtful_.empty() && doubtful_.contains(rkey); }

  // Where the bytes lie that a peer names; null: it may not. A null of its own for no bytes: `*allowed` tells.
  std::byte* find(uint64_t rkey, uint64_t offset, uint64_t length, bool write, bool* allowed,
                  bool* gpu = nullptr) const {
    *allowed = false;
    const auto found = regions_.find(rkey);
    if (found == regions_.end()) return nullptr;
    const Region& region = found->second;
    if (offset > region.length || length > region.length - offset || (write && !region.writable)) return nullptr;
    *allowed = true;
    if (gpu) *gpu = region.gpu;
    return region.bytes + offset;
  }

 private:
  std::unordered_map<uint64_t, Region> regions_;
  std::unordered_set<uint64_t> doubtful_;
};

}  // namespace railwire
