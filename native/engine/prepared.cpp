// Prepared scatters: from the rows of a table to a transfer.
#include "engine/prepared.h"

#include <algorithm>
#include <new>
#include <utility>

#include "engine/engine.h"

namespace railwire {
namespace {

constexpr size_t kPage = 4096;
// Rows up to here count as short: they go to the NIC at once, and take turns with bulk to the same peer.
constexpr uint64_t kPromptBytes = 4 << 20;

std::string bytes_outside(const char* what, uint64_t offset, uint64_t length, uint64_t size) {
  return std::string(what) + " bytes " + std::to_string(offset) + " and " + std::to_string(length) +
         " more lie outside " + std::to_string(size);
}

// As check(), which has the words for it.
bool fits(const ScatterRow& row, uint64_t source, uint64_t target) {
  return row.source <= source && row.length <= source - row.source && row.destination <= target &&
         row.length <= target - row.destination &&
         (row.immediate < kImmediateIds || row.immediate == ScatterRow::kNoImmediate);
}

// What choose_rails() mostly says, without a call: the first rails have both memories, and are up.
bool first_rails_do(const Peer& peer, const Region& region, const RemoteAccess* remote) {
  if (peer.sets.empty() || !remote || !(remote->sets & 1)) return false;
  const RailSet& rails = peer.sets.front();
  return (region.nics & rails.local_nics) == rails.local_nics && rails.usable.load(std::memory_order_relaxed);
}

}  // namespace

PreparedScatter::PreparedScatter(std::weak_ptr<Engine> engine, std::shared_ptr<Region> region, uint64_t offset,
                                 uint64_t length, std::vector<Target> targets, size_t depth)
    : engine_(std::move(engine)),
      region_(std::move(region)),
      offset_(offset),
      length_(length),
      targets_(std::move(targets)),
      depth_(depth),
      table_(nullptr, &std::free) {
  const size_t rows = std::max<size_t>(targets_.size() * depth_, 1);
  const size_t bytes = (rows * sizeof(ScatterRow) + kPage - 1) / kPage * kPage;
  table_.reset(static_cast<ScatterRow*>(std::aligned_alloc(kPage, bytes)));
  if (!table_) throw std::bad_alloc();
  std::fill_n(table_.get(), rows, ScatterRow{0, 0, 0, ScatterRow::kNoImmediate});
}

std::string PreparedScatter::check(size_t index, const ScatterRow& row) const {
  const Target& target = targets_[index];
  if (row.source > length_ || row.length > length_ - row.source) {
    return bytes_outside("source", row.source, row.length, length_);
  }
  if (row.destination > target.length || row.length > target.length - row.destination) {
    return bytes_outside("destination", row.destination, row.length, target.length);
  }
  if (row.immediate != ScatterRow::kNoImmediate && row.immediate >= kImmediateIds) {
    return "an immediate is 0 to " + std::to_string(kImmediateIds - 1) + ", or none (all bits set), not " +
           std::to_string(row.immediate);
  }
  return {};
}

PreparedScatter::Made PreparedScatter::make(size_t index) const {
  Made made{std::make_shared<Transfer>(engine_, Transfer::Kind::kWrite, -1), {}};
  const auto engine = engine_.lock();
  if (!engine) {
    made.problem = "the engine is closed";
    return made;
  }
  Transfer& transfer = *made.transfer;
  transfer.lanes.reserve(targets_.size());
  const auto* rows = static_cast<const volatile ScatterRow*>(slot(index));
  for (size_t i = 0; i < targets_.size(); ++i) {
    const ScatterRow row{rows[i].source, rows[i].destination, rows[i].length, rows[i].immediate};
    if (row.length == 0 && row.immediate == ScatterRow::kNoImmediate) continue;
    const Target& target = targets_[i];
    if (!fits(row, length_, target.length)) {
      made.problem = "row " + std::to_string(i) + " of slot " + std::to_string(index) + ": " + check(i, row);
      return made;
    }
    uint32_t set = 0;
    if (!first_rails_do(*target.peer, *region_, target.remote.get())) {
      try {
        set = row.length ? engine->choose_rails(*target.peer, region_.get(), target.remote.get())
                         : engine->choose_rails(*target.peer, nullptr, nullptr);
      } catch (const NicError& error) {
        made.problem = "row " + std::to_string(i) + " of slot " + std::to_string(index) + ": " + error.what();
        return made;
      }
    }
    const int64_t immediate = row.immediate == ScatterRow::kNoImmediate ? -1 : static_cast<int64_t>(row.immediate);
    Piece piece{offset_ + row.source, row.length ? target.remote : nullptr, target.offset + row.destination,
                row.length};
    Lane& lane = transfer.add_lane_for<PieceSource>(immediate, target.peer, row.length ? region_ : nullptr,
                                                    std::move(piece), false, immediate, target.peer->sets[set].limits);
    lane.set = set;
    lane.is_short = row.length <= kPromptBytes;
  }
  return made;
}

std::shared_ptr<Transfer> PreparedScatter::make_refused(size_t index, Failure why) const {
  auto transfer = std::make_shared<Transfer>(engine_, Transfer::Kind::kWrite, -1);
  transfer->refused = true;
  transfer->first_failure = std::make_unique<Failure>(std::move(why));
  transfer->lanes.reserve(targets_.size());
  const auto* rows = static_cast<const volatile ScatterRow*>(slot(index));
  for (size_t i = 0; i < targets_.size(); ++i) {
    const uint64_t immediate = rows[i].immediate;
    if (immediate >= kImmediateIds) continue;
    transfer->add_lane_for<PieceSource>(static_cast<int64_t>(immediate), targets_[i].peer, nullptr, Piece{}, false,
                                        static_cast<int64_t>(immediate), targets_[i].peer->limits());
  }
  return transfer;
}

}  // namespace railwire
