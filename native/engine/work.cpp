// Cutting requests into work requests. Checked against a plain model in native/tests/work_test.cpp.
#include "engine/work.h"

#include <algorithm>
#include <utility>

namespace railwire {
namespace {

uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

bool dense(const PageSide& side, uint64_t run_bytes) { return side.runs == 1 || side.run_stride == run_bytes; }

}  // namespace

Split split_write(uint64_t length, const SplitLimits& limits, bool immediate) {
  Split split{length, 1, false};
  const uint64_t longest = std::min(limits.max_write_bytes, kChunkBytes);
  if (length <= longest && (limits.links == 1 || length < 2 * kStripeBytes)) return split;
  uint64_t parts = divide_up(length, longest);
  if (limits.links > 1) parts = std::max(parts, std::min<uint64_t>(kMaxParts, length / kStripeBytes));
  if (immediate && parts > kMaxParts) {
    if (divide_up(length, kMaxParts) <= std::min(limits.max_write_bytes, kLongestPart)) {
      parts = kMaxParts;
    } else {
      split.trailing = true;
    }
  }
  split.part_bytes = divide_up(length, parts);
  // Whole pages per part keep copies aligned, unless that would exceed what one WR may carry.
  const uint64_t aligned = divide_up(split.part_bytes, 4096) * 4096;
  if (parts > 1 && aligned <= limits.max_write_bytes) split.part_bytes = aligned;
  split.parts = divide_up(length, split.part_bytes);
  return split;
}

uint32_t part_weight(uint64_t index, uint64_t parts) {
  if (parts == 1) return kUnitsPerArrival;  // nearly always, and two divisions less
  return static_cast<uint32_t>(kUnitsPerArrival / parts + (index < kUnitsPerArrival % parts ? 1 : 0));
}

void gather_immediates(std::span<WorkRequest> batch) {
  WorkRequest* teller = nullptr;
  uint64_t bytes = 0;
  for (size_t i = batch.size(); i-- > 0;) {
    WorkRequest& wr = batch[i];
    if (!(wr.flags & WorkRequest::kImmediate)) continue;
    bytes += wr.length;
    if (teller && bytes <= kGatheredBytes && immediate_id(wr.immediate) == immediate_id(teller->immediate)) {
      const uint32_t weight = immediate_weight(wr.immediate) + immediate_weight(teller->immediate);
      if (weight <= kMaxWeight) {
        teller->immediate = encode_immediate(immediate_id(wr.immediate), weight);
        wr.flags &= ~uint32_t{WorkRequest::kImmediate};
        continue;
      }
    }
    teller = &wr;
    bytes = wr.length;
  }
}

PieceSource::PieceSource(std::shared_ptr<Region> region, Few<Piece> pieces, bool read, int64_t immediate_id,
                         const SplitLimits& limits)
    : region_(std::move(region)),
      pieces_(std::move(pieces)),
      read_(read),
      immediate_id_(immediate_id),
      limits_(limits) {
  for (const Piece& piece : pieces_) {
    total_bytes_ += piece.length;
    if (immediate_id_ >= 0 && split_write(piece.length, limits_, true).trailing) trailing_units_ += kUnitsPerArrival;
  }
  enter_piece();
}

void PieceSource::enter_piece() {
  part_ = 0;
  // Nothing to move and nobody to tell: no WR at all.
  while (immediate_id_ < 0 && piece_ < pieces_.size() && pieces_[piece_].length == 0) ++piece_;
  if (piece_ < pieces_.size()) split_ = split_write(pieces_[piece_].length, limits_, immediate_id_ >= 0);
}

bool PieceSource::touches(uint64_t region_id) const {
  return std::any_of(pieces_.begin(), pieces_.end(),
                     [=](const Piece& piece) { return piece.remote && piece.remote->region_id == region_id; });
}

bool PieceSource::touches_any(const RecentIds& region_ids) const {
  return std::any_of(pieces_.begin(), pieces_.end(),
                     [&](const Piece& piece) { return piece.remote && region_ids.contains(piece.remote->region_id); });
}

namespace {

// The same bytes of the same region through another pair of NICs.
void move_target(WorkRequest& wr, const RemoteAccess& remote, const LinkEnds& from, const LinkEnds& to) {
  wr.remote = wr.remote - remote.keys[from.index].base + remote.keys[to.index].base;
  wr.rkey = remote.keys[to.index].rkey;
}

}  // namespace

void PieceSource::redirect(WorkRequest& wr, const LinkEnds& from, const LinkEnds& to) const {
  if (wr.length == 0) {
    wr.remote = to.pad_address;
    wr.rkey = to.pad_rkey;
    return;
  }
  wr.local_key = region_->registrations[to.local_nic].local;
  // All pieces of a lane go to one peer, but they may be of several regions: the key and the place tell which.
  for (const Piece& piece : pieces_) {
    if (!piece.remote) continue;
    const auto& key = piece.remote->keys[from.index];
    const uint64_t begin = key.base + piece.remote_offset;
    if (key.rkey != wr.rkey || wr.remote < begin || wr.remote - begin >= piece.length) continue;
    move_target(wr, *piece.remote, from, to);
    return;
  }
}

size_t PieceSource::fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) {
  size_t n = 0;
  while (n < out.size() && piece_ < pieces_.size()) {
    const Piece& piece = pieces_[piece_];
    const uint64_t start = part_ * split_.part_bytes;
    const uint64_t length = std::min(split_.part_bytes, piece.length - start);
    WorkRequest& wr = out[n++];
    wr = {};
    wr.context = context;
    wr.length = length;
    wr.flags = read_ ? WorkRequest::kRead : WorkRequest::kWrite;
    if (length == 0) {  // a bare immediate still needs a valid target on some NICs
      wr.remote = ends.pad_address;
      wr.rkey = ends.pad_rkey;
    } else {
      const auto& key = piece.remote->keys[ends.index];
      wr.local = region_->at(piece.local_offset + start);
      wr.local_key = region_->registrations[ends.local_nic].local;
      wr.remote = key.base + piece.remote_offset + start;
      wr.rkey = key.rkey;
    }
    if (immediate_id_ >= 0 && !split_.trailing) {
      wr.flags |= WorkRequest::kImmediate;
      wr.immediate = encode_immediate(static_cast<uint32_t>(immediate_id_), part_weight(part_, split_.parts));
    }
    if (++part_ == split_.parts) {
      ++piece_;
      enter_piece();
    }
  }
  return n;
}

PageSource::PageSource(std::shared_ptr<Region> region, PageSide local, std::shared_ptr<const RemoteAccess> remote,
                       PageSide dst, uint64_t page_bytes, int64_t immediate_id, const SplitLimits& limits)
    : region_(std::move(region)),
      local_(std::move(local)),
      remote_(std::move(remote)),
      dst_(std::move(dst)),
      page_bytes_(page_bytes),
      immediate_id_(immediate_id) {
  const uint64_t local_run = page_bytes_ / local_.runs;
  const uint64_t remote_run = page_bytes_ / dst_.runs;
  if (dense(local_, local_run) && dense(dst_, remote_run) && page_bytes_ <= limits.max_write_bytes) {
    uint64_t longest = std::min(kLongestMerge, limits.max_write_bytes);
    // Every link should get several of the merged WRs.
    if (limits.links > 1) longest = std::min(longest, std::max(kStripeBytes, total_bytes() / (4 * limits.links)));
    merge_pages_ = std::clamp<uint64_t>(longest / std::max<uint64_t>(page_bytes_, 1), 1, kMaxMergedPages);
  } else {
    for (uint64_t at = 0; at < page_bytes_;) {
      const bool flat_local = dense(local_, local_run), flat_remote = dense(dst_, remote_run);
      const uint64_t local_left = flat_local ? page_bytes_ - at : local_run - at % local_run;
      const uint64_t remote_left = flat_remote ? page_bytes_ - at : remote_run - at % remote_run;
      const uint64_t length = std::min({local_left, remote_left, limits.max_write_bytes});
      fragments_.push_back({flat_local ? at : at / local_run * local_.run_stride + at % local_run,
                            flat_remote ? at : at / remote_run * dst_.run_stride + at % remote_run, length});
      at += length;
    }
    if (immediate_id_ >= 0 && fragments_.size() > kMaxParts) {
      trailing_units_ = uint64_t{kUnitsPerArrival} * local_.indices.size();
    }
  }
  if (page_bytes_ == 0 && immediate_id_ < 0) page_ = local_.indices.size();
}

uint64_t PageSource::next_length() const {
  if (!fragments_.empty()) return fragments_[fragment_].length;
  const auto& from = local_.indices;
  const bool merges = page_ + 1 < from.size() && from[page_ + 1] == from[page_] + 1;
  return merges ? merge_pages_ * page_bytes_ : page_bytes_;
}

void PageSource::redirect(WorkRequest& wr, const LinkEnds& from, const LinkEnds& to) const {
  wr.local_key = region_->registrations[to.local_nic].local;
  move_target(wr, *remote_, from, to);
}

size_t PageSource::fill(const LinkEnds& ends, void* context, std::span<WorkRequest> out) {
  if (takes_lists(ends)) return fill_lists(ends, context, out);
  return fragments_.empty() ? fill_whole_pages(ends, context, out) : fill_fragments(ends, context, out);
}

bool PageSource::takes_lists(const LinkEnds& ends) const {
  return fragment_ == 0 && page_bytes_ > 0 && page_bytes_ <= kLongestList / 2 &&
         fragments_.size() <= kLongestListEntries / 2 && remote_->keys[ends.index].takes_lists &&
         region_->registrations[ends.local_nic].takes_lists;
}

size_t PageSource::fill_lists(const LinkEnds& ends, void* context, std::span<WorkRequest> out) {
  const auto& key = remote_->keys[ends.index];
  const bool weighted = immediate_id_ >= 0 && trailing_units_ == 0;
  const uint32_t id = static_cast<uint32_t>(std::max<int64_t>(immediate_id_, 0));
  whole_ = {0, 0, page_bytes_};
  const std::span<const Fragment> stretches = fragments_.empty() ? std::span(&whole_, 1) : std::span(fragments_);
  const uint64_t most = std::clamp<uint64_t>(
      std::min(kLongestList / page_bytes_, kLongestListEntries / stretches.size()), 1, kMaxMergedPages);
  const size_t pages = local_.indices.size();
  size_t n = 0;
  for (; n < out.size() && page_ < pages; ++n) {
    const auto count = static_cast<uint32_t>(std::min<uint64_t>(most, pages - page_));
    lists_.push_front({.local_pages = local_.indices.data() + page_,
                       .remote_pages = dst_.indices.data() + page_,
                       .stretches = stretches.data(),
                       .local_stride = local_.stride,
                       .remote_stride = dst_.stride,
                       .pages = count,
                       .stretch_count = static_cast<uint32_t>(stretches.size())});
    out[n] = {.local = region_->at(local_.offset),
              .local_key = region_->registrations[ends.local_nic].local,
              .remote = key.base + dst_.offset,
              .rkey = key.rkey,
              .length = count * page_bytes_,
              .flags = weighted ? WorkRequest::kImmediate : WorkRequest::kWrite,
              .immediate = weighted ? encode_immediate(id, count * kUnitsPerArrival) : 0,
              .context = context,
              .list = &lists_.front()};
    page_ += count;
  }
  return n;
}

size_t PageSource::fill_whole_pages(const LinkEnds& ends, void* context, std::span<WorkRequest> out) {
  const auto& key = remote_->keys[ends.index];
  std::byte* const local_base = region_->at(local_.offset);
  void* const local_key = region_->registrations[ends.local_nic].local;
  const uint64_t remote_base = key.base + dst_.offset;
  const uint32_t* const from = local_.indices.data();
  const uint32_t* const to = dst_.indices.data();
  const size_t pages = local_.indices.size();
  const uint32_t flags = immediate_id_ >= 0 ? WorkRequest::kImmediate : WorkRequest::kWrite;
  const uint32_t id = static_cast<uint32_t>(std::max<int64_t>(immediate_id_, 0));
  // Contiguous pages are those whose indices grow by this much on both sides; 0: a stride that no step can bridge.
  const uint64_t local_step = local_.stride && page_bytes_ % local_.stride == 0 ? page_bytes_ / local_.stride : 0;
  const uint64_t remote_step = dst_.stride && page_bytes_ % dst_.stride == 0 ? page_bytes_ / dst_.stride : 0;
  const bool may_merge = merge_pages_ > 1 && local_step && remote_step && page_bytes_;
  size_t n = 0, page = page_;
  for (; n < out.size() && page < pages; ++n) {
    const uint64_t first_local = from[page], first_remote = to[page];
    uint64_t merged = 1;
    if (may_merge) {
      while (merged < merge_pages_ && page + merged < pages &&
             from[page + merged] == first_local + merged * local_step &&
             to[page + merged] == first_remote + merged * remote_step) {
        ++merged;
      }
    }
    WorkRequest& wr = out[n];
    wr.list = nullptr;
    wr.local = local_base + first_local * local_.stride;
    wr.local_key = local_key;
    wr.remote = remote_base + first_remote * dst_.stride;
    wr.rkey = key.rkey;
    wr.length = merged * page_bytes_;
    wr.flags = flags;
    wr.immediate = encode_immediate(id, static_cast<uint32_t>(merged) * kUnitsPerArrival);
    wr.context = context;
    page += merged;
  }
  page_ = page;
  return n;
}

size_t PageSource::fill_fragments(const LinkEnds& ends, void* context, std::span<WorkRequest> out) {
  const auto& key = remote_->keys[ends.index];
  const bool weighted = immediate_id_ >= 0 && trailing_units_ == 0;
  size_t n = 0;
  while (n < out.size() && page_ < local_.indices.size()) {
    const Fragment& fragment = fragments_[fragment_];
    WorkRequest& wr = out[n++];
    wr.list = nullptr;
    wr.local = region_->at(local_.offset + local_.indices[page_] * local_.stride + fragment.local);
    wr.local_key = region_->registrations[ends.local_nic].local;
    wr.remote = key.base + dst_.offset + dst_.indices[page_] * dst_.stride + fragment.remote;
    wr.rkey = key.rkey;
    wr.length = fragment.length;
    wr.flags = weighted ? WorkRequest::kImmediate : WorkRequest::kWrite;
    wr.immediate =
        weighted ? encode_immediate(static_cast<uint32_t>(immediate_id_), part_weight(fragment_, fragments_.size()))
                 : 0;
    wr.context = context;
    if (++fragment_ == fragments_.size()) {
      fragment_ = 0;
      ++page_;
    }
  }
  return n;
}

}  // namespace railwire
