#include "nic/host_table.h"

#include <sys/random.h>

#include "nic/nic.h"

namespace railwire {

bool RegionView::allows(uint64_t key, uint64_t remote, uint64_t length, bool write, RegionRange* range) const {
  if (key == 0) return false;
  const RegionSlot& slot = slots_[key & (kSlots - 1)];
  if (slot.key.load(std::memory_order_acquire) != key) return false;
  range->base = slot.base.load(std::memory_order_relaxed);
  range->length = slot.length.load(std::memory_order_relaxed);
  range->flags = slot.flags.load(std::memory_order_acquire);
  // The slot may have been given to another region in between.
  if (slot.key.load(std::memory_order_relaxed) != key) return false;
  if (write && !(range->flags & RegionSlot::kWritable)) return false;
  return remote >= range->base && length <= range->length && remote - range->base <= range->length - length;
}

RegionTable::RegionTable() : memory_(SharedMemory::create("railwire-regions", kTableBytes, true)) {}

uint64_t RegionTable::add(const RegionRange& range) {
  uint32_t index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else if (used_ < kSlots) {
    index = static_cast<uint32_t>(used_++);
  } else {
    throw NicError("shm: at most " + std::to_string(kSlots) +
                   " regions can be registered at once; register fewer, larger ones");
  }
  uint64_t random = 0;
  while (random >> kSlotBits == 0) {
    if (getrandom(&random, sizeof random, 0) != sizeof random) throw NicError("shm: the kernel gives no random bytes");
  }
  const uint64_t key = (random & ~(kSlots - 1)) | index;
  RegionSlot& slot = this->slot(key);
  slot.base.store(range.base, std::memory_order_relaxed);
  slot.length.store(range.length, std::memory_order_relaxed);
  slot.flags.store(range.flags, std::memory_order_relaxed);
  slot.key.store(key, std::memory_order_release);
  return key;
}

void RegionTable::remove(uint64_t key) {
  RegionSlot& slot = this->slot(key);
  if (key == 0 || slot.key.load(std::memory_order_relaxed) != key) return;
  slot.key.store(0, std::memory_order_seq_cst);
  free_.push_back(static_cast<uint32_t>(key & (kSlots - 1)));
}

}  // namespace railwire
