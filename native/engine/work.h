// Turns one request (a write, a read, a page list, scatter targets) into work requests, a batch at a time.
//
// Everything here is arithmetic: no NIC, no clock, no state of a peer. A source is asked by whichever link has room
// next, so several links share one request by themselves; that is what striping is.
#pragma once

#include <cstdint>
#include <forward_list>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "engine/few.h"
#include "engine/immediate.h"
#include "engine/memory.h"
#include "engine/recent_ids.h"

namespace railwire {

inline constexpr uint64_t kStripeBytes = 32 * 1024;      // a write is cut for several NICs into parts of at least this
inline constexpr uint64_t kChunkBytes = 64ull << 20;     // no WR needs to be longer: keeps a link's progress visible
inline constexpr uint64_t kLongestPart = 256ull << 20;   // but may be, if that saves the trailing immediate
inline constexpr uint64_t kLongestMerge = 1ull << 20;    // merged pages beyond this gain nothing
inline constexpr uint64_t kLongestList = 2ull << 20;     // what a WR with a list of pages carries
inline constexpr uint32_t kLongestListEntries = 1024;    // stretches of all its pages
inline constexpr uint64_t kGatheredBytes = 256 * 1024;   // that one immediate tells of at most
inline constexpr uint32_t kMaxParts = kUnitsPerArrival;  // weights are whole sixteenths

// The two ends of a link, as far as a WR needs them.
struct LinkEnds {
  uint32_t index = 0;  // of the link, in its peer
  uint32_t local_nic = 0;
  uint32_t remote_nic = 0;
  uint64_t pad_address = 0;  // the remote NIC's landing pad: where zero-length and flush writes point
  uint64_t pad_rkey = 0;
};

// What the sources need to know of the peer's links together.
struct SplitLimits {
  uint32_t links = 1;
  uint64_t max_write_bytes = kChunkBytes;  // the smallest of all links
};

// How a contiguous write is cut. `trailing`: more parts than an arrival has sixteenths; the parts go without immediate
// and a zero-length WR with the whole weight follows once they are known to have landed.
struct Split {
  uint64_t part_bytes = 0;
  uint64_t parts = 1;
  bool trailing = false;
};
Split split_write(uint64_t length, const SplitLimits& limits, bool immediate);
// Weight of part `index` of `parts` (<= 16): whole numbers that sum to 16.
uint32_t part_weight(uint64_t index, uint64_t parts);

// For a link that lands in the order of posting: an immediate there tells of all before it, so that of neighbours that
// count for one id only the last carries it, with the weight of all. The receiver has fewer completions to look at, and
// its queue fewer receive WRs to give. Never over more than kGatheredBytes: what has landed is told soon.
void gather_immediates(std::span<WorkRequest> batch);

// Keeps a region from being deregistered while WRs may name it.
class RegionUse {
 public:
  explicit RegionUse(std::shared_ptr<Region> region) : region_(std::move(region)) {
    if (region_) region_->users.fetch_add(1, std::memory_order_relaxed);
  }
  ~RegionUse() {
    if (region_) region_->users.fetch_sub(1, std::memory_order_release);
  }
  RegionUse(RegionUse&&) = default;  // leaves an empty one
  RegionUse& operator=(RegionUse&&) = delete;
  Region* operator->() const { return region_.get(); }

 private:
  std::shared_ptr<Region> region_;
};

class WorkSource {
 public:
  virtual ~WorkSource() = default;
  // Writes up to out.size() WRs for a link and returns how many; none left is exhausted().
  virtual size_t fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) = 0;
  virtual bool exhausted() const = 0;
  // About how long the next WR will be; asked only while not exhausted().
  virtual uint64_t next_length() const = 0;
  // Units of weight to send after everything else has landed; 0 if the WRs carry them.
  virtual uint64_t trailing_units() const = 0;
  virtual uint64_t total_bytes() const = 0;
  virtual bool touches(uint64_t region_id) const = 0;
  virtual bool touches_any(const RecentIds& region_ids) const = 0;
  // Makes a WR that was filled for one link fit another one, with that link's keys.
  virtual void redirect(WorkRequest& wr, const LinkEnds& from, const LinkEnds& to) const = 0;
};

struct Piece {
  uint64_t local_offset = 0;
  std::shared_ptr<const RemoteAccess> remote;  // null: the landing pad (a bare immediate)
  uint64_t remote_offset = 0;
  uint64_t length = 0;
};

// Contiguous pieces: write, read, scatter, barrier. Each piece is one arrival.
class PieceSource final : public WorkSource {
 public:
  // `immediate_id` < 0: none. `region` may be null if every piece is empty.
  PieceSource(std::shared_ptr<Region> region, Few<Piece> pieces, bool read, int64_t immediate_id,
              const SplitLimits& limits);
  size_t fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) override;
  bool exhausted() const override { return piece_ == pieces_.size(); }
  uint64_t next_length() const override { return split_.part_bytes; }
  uint64_t trailing_units() const override { return trailing_units_; }
  uint64_t total_bytes() const override { return total_bytes_; }
  bool touches(uint64_t region_id) const override;
  bool touches_any(const RecentIds& region_ids) const override;
  void redirect(WorkRequest& wr, const LinkEnds& from, const LinkEnds& to) const override;

 private:
  void enter_piece();

  RegionUse region_;
  Few<Piece> pieces_;
  bool read_;
  int64_t immediate_id_;
  SplitLimits limits_;
  size_t piece_ = 0;
  uint64_t part_ = 0;
  Split split_;
  uint64_t trailing_units_ = 0;
  uint64_t total_bytes_ = 0;
};

// One side of a page list: page i begins at offset + indices[i] * stride and consists of `runs` runs, run_stride apart.
struct PageSide {
  std::vector<uint32_t> indices;
  uint64_t offset = 0;
  uint64_t stride = 0;
  uint64_t runs = 1;
  uint64_t run_stride = 0;
};

// Page lists. Each page is one arrival; pages that are contiguous on both sides share a WR, and where both memories
// take lists, any pages do.
class PageSource final : public WorkSource {
 public:
  PageSource(std::shared_ptr<Region> region, PageSide local, std::shared_ptr<const RemoteAccess> remote, PageSide dst,
             uint64_t page_bytes, int64_t immediate_id, const SplitLimits& limits);
  size_t fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) override;
  bool exhausted() const override { return page_ == local_.indices.size(); }
  uint64_t next_length() const override;
  uint64_t trailing_units() const override { return trailing_units_; }
  uint64_t total_bytes() const override { return page_bytes_ * local_.indices.size(); }
  bool touches(uint64_t region_id) const override { return remote_->region_id == region_id; }
  bool touches_any(const RecentIds& region_ids) const override { return region_ids.contains(remote_->region_id); }
  void redirect(WorkRequest& wr, const LinkEnds& from, const LinkEnds& to) const override;

 private:
  using Fragment = PageList::Stretch;  // of one page, contiguous on both sides
  bool takes_lists(const LinkEnds& ends) const;
  size_t fill_lists(const LinkEnds& ends, void* context, std::span<WorkRequest> out);
  size_t fill_whole_pages(const LinkEnds& ends, void* context, std::span<WorkRequest> out);
  size_t fill_fragments(const LinkEnds& ends, void* context, std::span<WorkRequest> out);

  RegionUse region_;
  PageSide local_;
  std::shared_ptr<const RemoteAccess> remote_;
  PageSide dst_;
  uint64_t page_bytes_;
  int64_t immediate_id_;
  uint64_t merge_pages_ = 1;
  std::forward_list<PageList> lists_;  // of the WRs that carry one
  Fragment whole_;                     // a page that is one WR
  std::vector<Fragment> fragments_;    // of every page alike; empty: a page is one WR
  size_t page_ = 0;
  size_t fragment_ = 0;
  uint64_t trailing_units_ = 0;
};

}  // namespace railwire
