// A submitted operation and its way through the engine.
//
// A transfer has one *lane* per peer it touches (one for a write, many for a scatter). Life of a lane, all in the
// driver's hands:
//
//   ready ----fill/post----> draining ----last WR back----> proving ----landed everywhere----> finished
//     \____ failure or cancel: nothing more is posted ____/    \__ trailing immediates: ready again __/
//
// finished: nothing of it is under way. The transfer ends with its last lane, or a little later if that lane was
// refused: whether its peer lives is then asked first (endings.cpp).
//
// proving: NICs whose completion does not prove landing get a flush on the link; a broken link needs the other side's
// word that it has closed its half. Where that word cannot come (the peer is lost), the transfer says may_still_land.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>

#include "engine/few.h"
#include "engine/members.h"
#include "engine/operation.h"
#include "engine/work.h"

namespace railwire {

class Peer;
class Transfer;
struct Lane;
struct PeerLink;

inline constexpr uint64_t kShortBytes = 64 * 1024;  // lanes up to this do not queue behind longer ones

// What WorkRequest::context points to.
struct WrContext {
  enum Kind : uint8_t { kLane, kFlush } wr_kind;
};

// Sends what a lane's WRs could not carry: zero-length writes with up to 1024 units each.
class TrailingSource final : public WorkSource {
 public:
  TrailingSource(uint64_t units, uint32_t immediate_id) : units_(units), immediate_id_(immediate_id) {}
  size_t fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) override;
  bool exhausted() const override { return units_ == 0; }
  uint64_t next_length() const override { return 0; }
  uint64_t trailing_units() const override { return 0; }
  uint64_t total_bytes() const override { return 0; }
  bool touches(uint64_t) const override { return false; }
  bool touches_any(const RecentIds&) const override { return false; }
  void redirect(WorkRequest& wr, const LinkEnds&, const LinkEnds& to) const override {
    wr.remote = to.pad_address;
    wr.rkey = to.pad_rkey;
  }

 private:
  uint64_t units_;
  uint32_t immediate_id_;
};

// The source of a lane, or none any more. Lies in the lane: a write needs no memory of its own for it.
class LaneSource {
 public:
  template <class Source, class... Args>
  Source& emplace(Args&&... args) {
    return any_.emplace<Source>(std::forward<Args>(args)...);
  }
  void reset() { any_.emplace<std::monostate>(); }
  explicit operator bool() const { return any_.index() != 0; }
  WorkSource* operator->() { return std::visit(Base{}, any_); }
  const WorkSource* operator->() const { return const_cast<LaneSource*>(this)->operator->(); }

 private:
  struct Base {
    WorkSource* operator()(std::monostate&) const { return nullptr; }
    WorkSource* operator()(WorkSource& source) const { return &source; }
  };

  std::variant<std::monostate, PieceSource, PageSource, TrailingSource> any_;
};

// A lane's share on one link.
struct LaneLink : WrContext {
  Lane* lane = nullptr;
  PeerLink* link = nullptr;
  uint32_t outstanding = 0;  // WRs filled and not come back
  bool used = false;
  bool landed = false;
  bool taken_back =
      false;  // a WR came back because the link was closed or broke: the peer's process may still be at it
  bool last_proves = false;  // the last WR is a flush at the same time
};

struct Lane {
  enum class Phase : uint8_t { kReady, kDraining, kProving, kFinished };

  Transfer* transfer = nullptr;
  std::shared_ptr<Peer> peer;
  uint32_t set = 0;  // of rails, in the peer's
  LaneSource source;
  Few<LaneLink> links;                      // its shares, by the links' place in the set
  size_t place = Members<Lane*>::kNowhere;  // in the peer's lanes
  Lane* before = nullptr;                   // in the peer's queue
  Lane* behind = nullptr;
  int64_t immediate_id = -1;  // of its arrivals; -1: none
  uint64_t trailing_units = 0;
  uint32_t outstanding = 0;
  uint32_t unproven = 0;  // links whose landing is not yet proven, while proving
  Phase phase = Phase::kReady;
  bool in_ready_list = false;
  bool is_short = false;  // does not wait behind bulk
  bool stopping = false;  // failed or cancelled: nothing more is posted
  bool may_still_land = false;
  std::unique_ptr<Failure> failure;  // why it is stopping
  uint64_t question = 0;             // the peer's acknowledgement of this record shows that it lived after a refusal
  int64_t doubt_until = 0;           // without it, the refusal is taken for what it says
};

class Transfer final : public Operation {
 public:
  enum class Kind : uint8_t { kWrite, kRead };

  Transfer(std::weak_ptr<Engine> engine, Kind kind, int64_t immediate_id)
      : Operation(std::move(engine)), kind(kind), immediate_id(immediate_id) {}
  void start(Engine& engine, std::shared_ptr<Operation> self) override;
  void stop(Engine& engine) override;

  // Source: of what its WRs are to be made, from these arguments.
  template <class Source, class... Args>
  Lane& add_lane(std::shared_ptr<Peer> peer, Args&&... args) {
    return add_lane_for<Source>(immediate_id, std::move(peer), std::forward<Args>(args)...);
  }
  // With an immediate of its own. `args` name it again.
  template <class Source, class... Args>
  Lane& add_lane_for(int64_t immediate, std::shared_ptr<Peer> peer, Args&&... args) {
    Lane& lane = lanes.emplace_back();
    lane.immediate_id = immediate;
    const Source& source = lane.source.emplace<Source>(std::forward<Args>(args)...);
    lane.transfer = this;
    lane.peer = std::move(peer);
    lane.trailing_units = source.trailing_units();
    lane.is_short = source.total_bytes() <= kShortBytes;
    bytes += source.total_bytes();
    return lane;
  }

  const Kind kind;
  const int64_t immediate_id;                                   // of lanes that have none of their own; -1: none
  Few<Lane> lanes;                                              // all of them, before start()
  size_t place = Members<std::shared_ptr<Transfer>>::kNowhere;  // in the engine's active ones
  size_t lanes_left = 0;  // that have not ended; one more while it is being started
  uint64_t bytes = 0;
  int64_t submitted_ns = 0;                // 0: not to be timed
  std::unique_ptr<Failure> first_failure;  // of its lanes; null: none has failed
  bool any_may_still_land = false;
  bool cancelled = false;
  bool refused = false;  // it fails with first_failure, and whoever counts on it is told
  // It starts when a CUDA stream has come so far (gates.cpp); null: at once.
  std::shared_ptr<const cuda::StreamWord> after;
};

}  // namespace railwire
