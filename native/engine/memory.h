// Memory the engine may touch: our own registered regions, and what a peer told us of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "nic/nic.h"

namespace railwire {

class Engine;
class Peer;

// Both are shared with Python, which must get no hold on the references that transfers keep: letting go of such a one
// would wait for the GIL, with the driver's lock in hand. enable_shared_from_this has nanobind give us ours.

// A registration on every NIC of the engine. Alive as long as Python or a transfer in flight holds it; the last
// reference has the driver deregister it and then tells Python (Event::kRelease) that the owner may go.
class Region : public std::enable_shared_from_this<Region> {
 public:
  Region(std::weak_ptr<Engine> engine, MemorySpec memory, uint64_t owner)
      : memory(memory), owner(owner), engine_(std::move(engine)) {}
  ~Region();

  const MemorySpec memory;                  // with descriptors of our own
  const uint64_t owner;                     // token of the Python object that keeps the memory alive; 0: see `keep`
  uint64_t id = 0;                          // as peers know it; a new one after each revoke()
  std::vector<Registration> registrations;  // by NIC index
  uint64_t nics = 0;                        // a bit for each NIC that takes it; the same ones for ever
  std::atomic<bool> closed{false};
  std::atomic<uint32_t> users{0};    // requests in flight that read or fill it locally
  std::shared_ptr<const void> keep;  // one for all that were registered together: the last to go lets their owner go
  // Peers that a revoke could not keep out; the driver's.
  std::vector<std::shared_ptr<Peer>> unfenced;

  std::byte* at(uint64_t offset) const { return static_cast<std::byte*>(memory.address) + offset; }

 private:
  std::weak_ptr<Engine> engine_;
};

// A peer's registration that a NIC of ours has imported; released with it, by the engine's set-up thread.
class ImportedMemory {
 public:
  ImportedMemory(std::weak_ptr<Engine> engine, uint32_t nic, RemoteMemory memory)
      : nic(nic), memory(memory), engine_(std::move(engine)) {}
  ImportedMemory(const ImportedMemory&) = delete;
  ImportedMemory& operator=(const ImportedMemory&) = delete;
  ~ImportedMemory();

  const uint32_t nic;
  RemoteMemory memory;

 private:
  std::weak_ptr<Engine> engine_;
};

// A peer's region as one connection reaches it: imported by our NICs.
struct RemoteAccess {
  struct Key {
    uint64_t base = 0;
    uint64_t rkey = 0;
    bool takes_lists = false;
  };
  std::shared_ptr<const Peer> peer;  // null in tests of what needs none
  uint64_t region_id = 0;
  uint64_t sets = 1;      // of rails: a bit for each over which it can be reached
  std::string unreached;  // why the others are not
  std::vector<Key> keys;  // by the peer's link index; of the others, nothing that means anything
  std::vector<std::shared_ptr<const ImportedMemory>> imported;  // what must be released in the end
};

// A peer's region as its descriptor tells of it: a blob for each of the peer's NICs, empty where it is not registered.
struct RemoteKeys : std::enable_shared_from_this<RemoteKeys> {
  RemoteKeys(uint64_t region_id, uint64_t length, std::vector<std::vector<std::byte>> blobs, bool writable = true)
      : region_id(region_id), length(length), writable(writable), blobs(std::move(blobs)) {}

  const uint64_t region_id;
  const uint64_t length;
  const bool writable;  // false: its owner lets it be read only; its NICs refuse the writes of who does not ask
  const std::vector<std::vector<std::byte>> blobs;  // by the peer's NIC index

 private:
  friend class Engine;
  std::mutex mutex_;
  std::shared_ptr<const RemoteAccess> access_;  // over the connection that was used last
};

}  // namespace railwire
