// The way of work requests: through the ring, into mapped memory, or by CMA.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/host_internal.h"

namespace railwire {
namespace {

constexpr uint64_t kCopyAtPost = 64 << 10;     // bytes copied by post() itself; poll() goes on
constexpr uint64_t kSlice = 256 << 10;         // bytes of one copy, so that nobody waits long for a turn
constexpr int64_t kLookAtProcess = 1'000'000;  // ns
constexpr size_t kMostMappings = 4096;         // of all peers; the kernel allows a process some 65,000

}  // namespace

size_t HostLink::post(std::span<const WorkRequest> batch) {
  std::lock_guard lock(nic_.mutex_);
  if (!up_) return 0;
  const size_t room = nic_.info_.link_depth - (end_ - first_);
  const size_t taken = std::min(room, batch.size());
  for (size_t i = 0; i < taken; ++i) {
    if (end_ - first_ == works_.size()) grow();
    at(end_++) = {.request = batch[i]};
  }
  outstanding_ += taken;
  nic_.heat(*this);
  advance(kCopyAtPost);
  return taken;
}

void HostLink::grow() {
  std::vector<Work> larger(std::max<size_t>(16, 2 * works_.size()));
  for (uint64_t i = first_; i != end_; ++i) larger[i & (larger.size() - 1)] = at(i);
  works_ = std::move(larger);
}

void HostLink::choose_way(Work& work) {
  const WorkRequest& request = work.request;
  const bool read = request.flags & WorkRequest::kRead;
  RegionRange range;
  // The pages of a list are looked at one by one.
  const uint64_t length = request.list ? 0 : request.length;
  if (!remote_regions_.allows(request.rkey, request.remote, length, !read, &range)) {
    work.status = Status::kRemoteAccess;
    work.error = EACCES;
    return;
  }
  const bool remote_gpu = range.flags & RegionSlot::kGpu;
  if (request.length == 0) {
    work.way = Way::kNone;
  } else if (remote_gpu || request.local_key) {
    choose_gpu_way(work, remote_gpu, range);
  } else if ((range.flags & RegionSlot::kShared) && (work.to = mapped_at(request, range))) {
    work.way = Way::kMapped;
  } else {
    work.way = !read && request.length <= kLongestInline ? Way::kInline : Way::kCma;
  }
}

// Where a shared region's bytes are mapped here; null: not (yet). The first WR there asks for it.
std::byte* HostLink::mapped_at(const WorkRequest& request, const RegionRange& range) {
  if (last_rkey_ != request.rkey) {
    auto& mappings = peer_->mappings;
    auto found = mappings.find(request.rkey);
    if (found == mappings.end()) {
      if (nic_.mapped_ >= kMostMappings) return nullptr;
      found = mappings.try_emplace(request.rkey).first;
      found->second.base = range.base;
      found->second.length = range.length;
      ++nic_.mapped_;
      nic_.send_packet(*peer_, {.type = HostFrame::kWantMemory, .to = remote_token_, .rkey = request.rkey});
    }
    last_rkey_ = request.rkey;
    last_mapping_ = &found->second;
  }
  if (!last_mapping_->bytes) return nullptr;
  const uint64_t offset = request.remote - last_mapping_->base;
  if (last_mapping_->base != range.base || last_mapping_->length != range.length) return nullptr;
  return last_mapping_->bytes + offset;
}

// Starts WRs, in order, until the ring is full or so many bytes have been copied. Returns bytes copied.
uint64_t HostLink::advance(uint64_t budget) {
  uint64_t copied = 0;
  // Copies end without the ring, whose immediates fill it all the same: nobody else looks how far the peer has come.
  if (blocked_ && !look_at_ring()) return 0;
  blocked_ = false;
  while (up_ && next_ != end_ && copied < budget) {
    Work& work = at(next_);
    const WorkRequest& request = work.request;
    if (work.way == Way::kUnknown && work.status == Status::kOk) choose_way(work);
    if (work.status != Status::kOk) {
      ++next_;
    } else if (work.way == Way::kInline) {
      if (!start_inline(work)) {
        blocked_ = true;
        break;
      }
      copied += request.length;
      ++next_;
    } else if (work.way == Way::kGpu) {
      if (!start_gpu()) break;
    } else if (work.way == Way::kBounce && work.copied < request.length) {
      if (!bounce(work)) break;
      copied += HostGpu::kBounceBytes;
    } else if (work.copied < request.length) {
      if (!copy(budget - copied, &copied)) break;
    } else {
      if ((request.flags & WorkRequest::kImmediate) && !out_.add(RecordKind::kImmediate, 0, request.immediate)) {
        blocked_ = true;
        break;
      }
      ++next_;
    }
  }
  publish();
  complete();
  return copied;
}

bool HostLink::start_inline(Work& work) {
  const WorkRequest& request = work.request;
  const bool immediate = request.flags & WorkRequest::kImmediate;
  std::byte* place = out_.add(immediate ? RecordKind::kWriteImmediate : RecordKind::kWrite,
                              static_cast<size_t>(request.length), request.immediate, {request.rkey, request.remote});
  if (!place) return false;
  std::memcpy(place, request.local, static_cast<size_t>(request.length));
  work.record = out_.last_at();
  work.wait_for = out_.added();
  return true;
}

// Copies for the next WRs. The word `copying` in the ring tells the peer that we may be writing into its memory;
// once it has closed its half we no longer start. False: the link has broken.
bool HostLink::copy(uint64_t budget, uint64_t* copied) {
  RingHeader& header = out_.header();
  header.copying.store(1, std::memory_order_seq_cst);
  bool good = true;
  if (header.consumer_closed.load(std::memory_order_seq_cst)) {
    good = false;
    break_now(ECONNRESET);
  } else if (at(next_).way == Way::kMapped) {
    *copied += copy_mapped(at(next_), std::min(budget, kSlice));
  } else {
    good = copy_listed(std::min(budget, kSlice), copied);
  }
  header.copying.store(0, std::memory_order_release);
  return good;
}

uint64_t HostLink::copy_mapped(Work& work, uint64_t budget) {
  const WorkRequest& request = work.request;
  const uint64_t length = std::min(request.length - work.copied, budget);
  std::byte* local = static_cast<std::byte*>(request.local) + work.copied;
  std::byte* remote = work.to + work.copied;
  if (request.flags & WorkRequest::kRead) {
    std::memcpy(local, remote, length);
  } else {
    copy_long(remote, local, length);
  }
  work.copied += length;
  return length;
}

// A process that has ended leaves its number to others, whose memory must not be touched. While we run, less than a
// look at the clock lies between this and the copy.
bool HostLink::peer_lives() {
  if (peer_->dead || !peer_->pidfd) return !peer_->dead;
  const int64_t now = host_clock_ns();
  if (now - seen_alive_ns_ < kLookAtProcess) return true;
  pollfd process{peer_->pidfd.get(), POLLIN, 0};
  if (::poll(&process, 1, 0) > 0) return false;
  seen_alive_ns_ = now;
  return true;
}

bool HostLink::copy_listed(uint64_t budget, uint64_t* copied) {
  CmaList& list = nic_.list_;
  const bool read = at(next_).request.flags & WorkRequest::kRead;
  list.clear();
  uint64_t end = next_;
  while (end != end_ && list.has_room() && list.bytes() < budget) {
    Work& work = at(end);
    const WorkRequest& request = work.request;
    if (work.way == Way::kUnknown && work.status == Status::kOk) choose_way(work);
    if (work.way != Way::kCma || static_cast<bool>(request.flags & WorkRequest::kRead) != read) break;
    const uint64_t length = std::min(request.length - work.copied, budget - list.bytes());
    list.add(static_cast<std::byte*>(request.local) + work.copied, request.remote + work.copied, length);
    ++end;
  }
  int64_t done = -ESRCH;
  if (peer_lives()) done = list.run(peer_->pid, read);
  if (done == -EFAULT && end - next_ > 1) {
    // One of them is bad; which, shows the first alone.
    const Work& work = at(next_);
    list.clear();
    list.add(static_cast<std::byte*>(work.request.local) + work.copied, work.request.remote + work.copied,
             std::min(work.request.length - work.copied, budget));
    done = list.run(peer_->pid, read);
  }
  if (done <= 0) {
    Work& work = at(next_);
    if (done == -ESRCH || done == -EPERM || done == -ENOSYS) {
      break_now(static_cast<int32_t>(-done));
      return false;
    }
    const bool ours = done == -EFAULT && !readable(work.request.local, work.request.length);
    work.status = done != -EFAULT ? Status::kOther : ours ? Status::kLocal : Status::kRemoteAccess;
    work.error = static_cast<int32_t>(-done);
    return true;
  }
  *copied += static_cast<uint64_t>(done);
  for (uint64_t i = next_, left = static_cast<uint64_t>(done); left > 0; ++i) {
    Work& work = at(i);
    const uint64_t part = std::min(left, work.request.length - work.copied);
    work.copied += part;
    left -= part;
  }
  return true;
}

void HostLink::publish() {
  if (!out_.publish()) return;
  // Either the peer, about to sleep, sees what we have published, or we see that it sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  RingHeader& header = out_.header();
  if (header.consumer_asleep.load(std::memory_order_relaxed) &&
      header.consumer_asleep.exchange(0, std::memory_order_relaxed)) {
    nic_.ring(*peer_);
  }
}

// Hands back what has ended, in the order of posting.
// How far the peer has come. What it says of a write stands in the write's record, whose place the next ones may take
// from now on: so it is read here. False: the link has broken.
bool HostLink::look_at_ring() {
  if (!out_.look()) {
    break_now(EPROTO);
    return false;
  }
  for (; answered_ != next_; ++answered_) {
    Work& work = at(answered_);
    if (work.way != Way::kInline) continue;
    if (out_.consumed() < work.wait_for) break;
    if (out_.refused(work.record)) {
      work.status = Status::kRemoteAccess;
      work.error = EACCES;
    }
  }
  return true;
}

void HostLink::complete() {
  if (first_ == next_ || !look_at_ring()) return;
  bool immediates = false;
  const uint64_t copied = last_batch_ ? nic_.gpu_.finished() : 0;  // looked at once: it is a look at the clock, too
  for (; first_ != next_; ++first_) {
    Work& work = at(first_);
    if (work.way == Way::kInline) {
      if (first_ == answered_) break;
    } else if (work.way == Way::kGpu && work.status == Status::kOk) {
      if (!gpu_done(work, copied)) break;
      immediates |= work.told;
    }
    nic_.held_.push_back({.kind = Completion::kWorkRequest,
                          .status = work.status,
                          .provider_error = work.error,
                          .context = work.request.context,
                          .link = this});
  }
  if (immediates) publish();
}

}  // namespace railwire
