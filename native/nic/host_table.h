// The memory of a NIC that peers may name: a table which its owner writes, and which the peers' processes can read.
//
// A writer looks here before it writes: a key that is gone or a range that does not fit is refused without a message.
// A key holds the number of its slot (20 bits) and 44 random bits, and is never given out twice.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "nic/host_memory.h"

namespace railwire {

struct RegionSlot {
  enum Flags : uint64_t {
    kWritable = 1,
    kShared = 2,  // a memfd, which the owner hands out to peers
    kGpu = 4,     // a GPU's: no CPU touches it
  };
  std::atomic<uint64_t> key;  // 0: none
  std::atomic<uint64_t> base;
  std::atomic<uint64_t> length;
  std::atomic<uint64_t> flags;
};
static_assert(sizeof(RegionSlot) == 32);

inline constexpr uint32_t kSlotBits = 20;
inline constexpr size_t kSlots = size_t{1} << kSlotBits;
inline constexpr size_t kTableBytes = kSlots * sizeof(RegionSlot);  // address space; memory as far as it is used

struct RegionRange {
  uint64_t base = 0;
  uint64_t length = 0;
  uint64_t flags = 0;
};

// The reader's side; also used by the owner.
class RegionView {
 public:
  RegionView() = default;
  explicit RegionView(const std::byte* table) : slots_(reinterpret_cast<const RegionSlot*>(table)) {}

  // Whether `key` stands for memory that holds [remote, remote + length), writable if `write`.
  bool allows(uint64_t key, uint64_t remote, uint64_t length, bool write, RegionRange* range) const;
  explicit operator bool() const { return slots_ != nullptr; }

 private:
  const RegionSlot* slots_ = nullptr;
};

// The owner's side. Not for several threads at once.
class RegionTable {
 public:
  RegionTable();  // throws NicError

  // Returns the key. Throws NicError if all slots are taken.
  uint64_t add(const RegionRange& range);
  void remove(uint64_t key);
  int fd() const { return memory_.fd(); }
  RegionView view() const { return RegionView(memory_.data()); }

 private:
  RegionSlot& slot(uint64_t key) const { return reinterpret_cast<RegionSlot*>(memory_.data())[key & (kSlots - 1)]; }

  SharedMemory memory_;
  std::vector<uint32_t> free_;
  size_t used_ = 0;
};

}  // namespace railwire
