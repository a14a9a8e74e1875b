// Memory: our own, registered with the NICs, and peers', imported. None of it holds the driver's lock while a NIC
// works: to pin hundreds of gigabytes takes seconds, in which the engine answers and posts.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/engine.h"

namespace railwire {
namespace {

// A descriptor of our own of the same file: the region may be registered anew when the caller has closed his.
int own_descriptor(int fd) {
  if (fd < 0) return -1;
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) throw NicError(std::string("keeping the descriptor of a region's memory: ") + std::strerror(errno));
  return own;
}

}  // namespace

Region::~Region() {
  if (const auto engine = engine_.lock()) engine->retire_region(*this);
  for (const int fd : {memory.dmabuf_fd, memory.shared_fd}) {
    if (fd >= 0) ::close(fd);
  }
}

ImportedMemory::~ImportedMemory() {
  if (const auto engine = engine_.lock()) engine->retire_import(*this);
}

std::shared_lock<std::shared_mutex> Engine::enter_setup() {
  if (inherited_) throw NicError("this engine belongs to the process that was forked; open one in this process");
  std::shared_lock lock(setup_gate_);
  if (closed()) throw NicError("the engine is closed");
  return lock;
}

std::shared_ptr<Region> Engine::register_memory(MemorySpec memory, uint64_t owner) {
  const auto setup = enter_setup();
  memory.key_hint = random_u64();
  memory.dmabuf_fd = own_descriptor(memory.dmabuf_fd);
  try {
    memory.shared_fd = own_descriptor(memory.shared_fd);
  } catch (...) {
    if (memory.dmabuf_fd >= 0) ::close(memory.dmabuf_fd);
    throw;
  }
  auto region = std::make_shared<Region>(weak_from_this(), memory, owner);
  region->id = memory.key_hint;
  {
    std::lock_guard guard(memory_mutex_);
    live_regions_.insert(region.get());
  }
  // On failure ~Region hands back what has been registered so far.
  register_all(memory, region->registrations);
  for (size_t i = 0; i < nics_.size(); ++i) region->nics |= uint64_t{!region->registrations[i].blob.empty()} << i;
  return region;
}

void Engine::release_owner(uint64_t owner) {
  if (!inherited_) events().push({Event::kRelease, options_.event_tag, owner, {}});
}

std::vector<std::shared_ptr<Region>> Engine::register_many(std::span<const AddressRange> ranges,
                                                           std::span<const uint64_t> ids, bool writable,
                                                           uint64_t owner) {
  const auto setup = enter_setup();
  // A region's destructor runs while its engine exists, or the engine has made all its regions let go.
  const std::shared_ptr<const void> keep(static_cast<const void*>(this), [weak = weak_from_this(), owner](const void*) {
    if (const auto engine = weak.lock()) engine->release_owner(owner);
  });
  std::vector<std::shared_ptr<Region>> regions;
  regions.reserve(ranges.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    const MemorySpec memory{.address = reinterpret_cast<void*>(ranges[i].address),
                            .length = ranges[i].length,
                            .key_hint = ids[i],
                            .writable = writable};
    auto region = std::make_shared<Region>(weak_from_this(), memory, 0);
    region->id = ids[i];
    region->keep = keep;
    {
      std::lock_guard guard(memory_mutex_);
      live_regions_.insert(region.get());
    }
    // On failure the destructors hand back what has been registered so far.
    register_all(memory, region->registrations);
    for (size_t nic = 0; nic < nics_.size(); ++nic) {
      region->nics |= uint64_t{!region->registrations[nic].blob.empty()} << nic;
    }
    regions.push_back(std::move(region));
  }
  return regions;
}

Engine::RegionColumns Engine::region_columns(std::span<const std::shared_ptr<Region>> regions) {
  const auto lock = lock_driver();
  RegionColumns columns;
  columns.keys.resize(nics_.size());
  for (const auto& region : regions) {
    if (region->closed.load() || region->registrations.empty()) throw NicError("a region is closed");
    columns.ids.push_back(region->id);
    columns.lengths.push_back(region->memory.length);
    for (size_t nic = 0; nic < columns.keys.size(); ++nic) {
      const auto& blob = region->registrations[nic].blob;
      columns.keys[nic].lengths.push_back(blob.size());
      columns.keys[nic].data.append(reinterpret_cast<const char*>(blob.data()), blob.size());
    }
  }
  return columns;
}

// With every NIC that takes such memory. Throws NicError if there is none, or if one fails.
void Engine::register_all(const MemorySpec& memory, std::vector<Registration>& registrations) {
  std::string refusals;
  bool any = false;
  for (const auto& nic : nics_) {
    const std::string why = nic->refuses(memory);
    registrations.push_back(why.empty() ? nic->register_memory(memory) : Registration{});
    any |= why.empty();
    if (!why.empty()) refusals += (refusals.empty() ? "" : "; ") + why;
  }
  if (!any) throw NicError(refusals);
}

void Engine::deregister_all(std::vector<Registration>& registrations) {
  for (size_t i = 0; i < registrations.size(); ++i) nics_[i]->deregister(registrations[i]);
  registrations.clear();
}

std::vector<std::vector<std::byte>> Engine::region_keys(const Region& region, uint64_t* id) {
  const auto lock = lock_driver();
  *id = region.id;
  std::vector<std::vector<std::byte>> blobs;
  for (const Registration& registration : region.registrations) blobs.push_back(registration.blob);
  return blobs;
}

// Any thread may be here, also one that drives or closes the engine: nothing is waited for.
void Engine::retire_region(Region& region) {
  if (inherited_) return;
  std::lock_guard guard(memory_mutex_);
  live_regions_.erase(&region);
  // `keep` goes with it.
  const auto release = [this, owner = region.owner, keep = std::move(region.keep)] {
    if (owner) release_owner(owner);
  };
  auto registrations = std::make_shared<std::vector<Registration>>(std::move(region.registrations));
  region.registrations.clear();
  if (nics_gone_ || registrations->empty()) {
    release();
    return;
  }
  const auto task = [this, registrations, release] {
    deregister_all(*registrations);
    release();
  };
  if (!setup_thread_.push(task)) task();  // the engine is being closed
}

void Engine::retire_import(ImportedMemory& imported) {
  if (inherited_) return;
  std::lock_guard guard(memory_mutex_);
  if (live_imports_.erase(&imported) == 0) return;
  std::erase_if(imports_, [](const auto& entry) { return entry.second.expired(); });
  const uint32_t nic = imported.nic;
  const auto task = [this, nic, memory = imported.memory] {
    RemoteMemory released = memory;
    nics_[nic]->release_memory(released);
  };
  if (!setup_thread_.push(task)) task();
}

RemoteAccess::Key Engine::import_blob(uint32_t nic, const std::vector<std::byte>& blob,
                                      std::vector<std::shared_ptr<const ImportedMemory>>& keep) {
  {
    std::lock_guard guard(memory_mutex_);
    const auto known = imports_.find({nic, blob});
    if (known != imports_.end()) {
      if (auto imported = known->second.lock()) {
        keep.push_back(imported);
        return {imported->memory.base, imported->memory.rkey, imported->memory.takes_lists};
      }
    }
  }
  const RemoteMemory memory = nics_[nic]->import_memory(blob);
  if (memory.handle) {  // two threads may have imported it both: then it is released twice
    auto imported = std::make_shared<ImportedMemory>(weak_from_this(), nic, memory);
    std::lock_guard guard(memory_mutex_);
    live_imports_.insert(imported.get());
    imports_[{nic, blob}] = imported;
    keep.push_back(std::move(imported));
  }
  return {memory.base, memory.rkey, memory.takes_lists};
}

std::shared_ptr<const RemoteAccess> Engine::reach(const std::shared_ptr<Peer>& peer, RemoteKeys& keys) {
  {
    std::lock_guard guard(keys.mutex_);
    if (keys.access_ && keys.access_->peer == peer) return keys.access_;
  }
  const auto setup = enter_setup();
  auto access = std::make_shared<RemoteAccess>();
  access->peer = peer;
  access->region_id = keys.region_id;
  access->sets = 0;
  access->keys.resize(peer->links.size());
  for (size_t set = 0; set < peer->sets.size(); ++set) {
    const RailSet& rails = peer->sets[set];
    std::string why;
    for (size_t i = rails.first; i < rails.first + rails.count && why.empty(); ++i) {
      const LinkEnds& ends = peer->links[i]->ends;
      if (ends.remote_nic >= keys.blobs.size()) {
        throw BadKeys("the descriptor has no key for NIC " + std::to_string(ends.remote_nic) + " of peer " +
                      peer->name + ": is it a descriptor of another engine?");
      }
      const auto& blob = keys.blobs[ends.remote_nic];
      if (blob.empty()) {
        why = "it is not registered with NIC " + std::to_string(ends.remote_nic) + " (" + rails.kind + ") there";
        break;
      }
      try {
        access->keys[i] = import_blob(ends.local_nic, blob, access->imported);
      } catch (const NicError& error) {
        why = error.what();
      }
    }
    access->sets |= uint64_t{why.empty()} << set;
    if (!why.empty()) access->unreached += (access->unreached.empty() ? "" : "; ") + why;
  }
  if (access->sets == 0) {
    throw BadKeys("memory of peer " + peer->name + " cannot be reached: " + access->unreached);
  }
  if (!access->unreached.empty()) {
    const auto* text = reinterpret_cast<const std::byte*>(access->unreached.data());
    events().push({Event::kUnreached, options_.event_tag, peer->id, {text, text + access->unreached.size()}});
  }
  std::lock_guard guard(keys.mutex_);
  keys.access_ = access;
  return access;
}

uint32_t Engine::choose_rails(const Peer& peer, const Region* region, const RemoteAccess* remote) const {
  int fallback = -1;  // is down, but nothing else would do
  for (uint32_t set = 0; set < peer.sets.size(); ++set) {
    const RailSet& rails = peer.sets[set];
    if (region && (region->nics & rails.local_nics) != rails.local_nics) continue;
    if (remote && !(remote->sets >> set & 1)) continue;
    if (rails.usable.load(std::memory_order_relaxed)) return set;
    if (fallback < 0) fallback = static_cast<int>(set);
  }
  if (fallback >= 0) return static_cast<uint32_t>(fallback);
  std::string kinds;
  for (const RailSet& rails : peer.sets) kinds += (kinds.empty() ? "" : ", ") + rails.kind;
  throw BadKeys("no kind of NIC between us and peer " + peer.name + " (" + kinds +
                ") has both memories registered: our NICs refuse ours, or theirs theirs" +
                (remote && !remote->unreached.empty() ? " (" + remote->unreached + ")" : ""));
}

}  // namespace railwire
