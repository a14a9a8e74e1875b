// What most NICs have in common: words for the ends of work requests, and the blob of base and rkey.
#include "nic/nic.h"

#include <cstring>

namespace railwire {

const char* to_string(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kFlushed:
      return "taken back unfinished";
    case Status::kRemoteAccess:
      return "refused by the peer (wrong key or out of range)";
    case Status::kUnreachable:
      return "the connection is gone";
    case Status::kLocal:
      return "wrong local key or length";
    case Status::kOther:
      return "failed";
  }
  return "unknown status";
}

std::vector<std::byte> plain_blob(uint64_t base, uint64_t rkey) {
  std::vector<std::byte> blob(2 * sizeof(uint64_t));
  std::memcpy(blob.data(), &base, sizeof base);
  std::memcpy(blob.data() + sizeof base, &rkey, sizeof rkey);
  return blob;
}

RemoteMemory parse_plain_blob(std::span<const std::byte> blob, const std::string& name) {
  RemoteMemory memory;
  if (blob.size() != sizeof memory.base + sizeof memory.rkey) {
    throw NicError(name + ": a peer's key of " + std::to_string(blob.size()) + " bytes instead of 16");
  }
  std::memcpy(&memory.base, blob.data(), sizeof memory.base);
  std::memcpy(&memory.rkey, blob.data() + sizeof memory.base, sizeof memory.rkey);
  return memory;
}

std::string Nic::refuses(const MemorySpec&) const { return {}; }

RemoteMemory Nic::import_memory(std::span<const std::byte> blob) { return parse_plain_blob(blob, info().name); }

void Nic::release_memory(RemoteMemory& memory) { memory = {}; }

}  // namespace railwire
