// A scatter whose targets are settled once and that is then posted again and again: each time a row of a table says
// what a target gets. The table is plain memory, so a kernel can fill it as well as a thread.
//
// A row is copied before it is checked: whoever fills the table may do so at any time, and harms nobody but himself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine/memory.h"
#include "engine/transfer.h"

namespace railwire {

// What one target gets: `length` bytes from `source` of the plan's source to `destination` of the target's memory, and
// an arrival at counter `immediate`. No bytes and no immediate: nothing at all.
struct ScatterRow {
  static constexpr uint64_t kNoImmediate = ~uint64_t{0};
  uint64_t source, destination, length, immediate;
};

class PreparedScatter : public std::enable_shared_from_this<PreparedScatter> {
 public:
  struct Target {
    std::shared_ptr<Peer> peer;
    std::shared_ptr<const RemoteAccess> remote;  // null: it gets immediates only
    uint64_t offset = 0;                         // of the window in the peer's region
    uint64_t length = 0;
  };
  // The window of `region` that is the source; the table has `depth` slots of a row per target.
  PreparedScatter(std::weak_ptr<Engine> engine, std::shared_ptr<Region> region, uint64_t offset, uint64_t length,
                  std::vector<Target> targets, size_t depth);

  size_t targets() const { return targets_.size(); }
  size_t depth() const { return depth_; }
  const std::shared_ptr<Region>& region() const { return region_; }
  const std::weak_ptr<Engine>& engine() const { return engine_; }
  ScatterRow* slot(size_t index) const { return table_.get() + index * targets_.size(); }

  struct Made {
    std::shared_ptr<Transfer> transfer;
    std::string problem;  // of a row; the transfer is empty then
  };
  // What the slot says now, not yet submitted.
  Made make(size_t slot) const;
  // A transfer that fails, and lets whoever the slot promises an arrival know.
  std::shared_ptr<Transfer> make_refused(size_t slot, Failure why) const;

 private:
  std::string check(size_t index, const ScatterRow& row) const;

  std::weak_ptr<Engine> engine_;
  std::shared_ptr<Region> region_;
  uint64_t offset_;
  uint64_t length_;
  std::vector<Target> targets_;
  size_t depth_;
  std::unique_ptr<ScatterRow, decltype(&std::free)> table_;  // has pages of its own, so that a GPU can map it
};

}  // namespace railwire
