// Links: how the two halves find each other, and how they end.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "nic/host_internal.h"

namespace railwire {
namespace {

constexpr int64_t kUpWithin = 10'000'000'000;  // ns for the other half to come
constexpr size_t kDrainAtClose = 2 * kLinkRingBytes / sizeof(RecordHead);

}  // namespace

std::unique_ptr<Link> HostNic::create_link() { return std::make_unique<HostLink>(*this); }

HostLink::HostLink(HostNic& nic) : nic_(nic), token_(random_token()) {
  std::lock_guard lock(nic_.mutex_);
  nic_.links_by_token_[token_] = this;
}

HostLink::~HostLink() {
  close();
  await_gpu();
  std::shared_ptr<HostPeer> peer;  // goes after the lock
  std::lock_guard lock(nic_.mutex_);
  const auto first = nic_.held_.begin() + static_cast<ptrdiff_t>(nic_.next_held_);
  nic_.held_.erase(std::remove_if(first, nic_.held_.end(), [&](const Completion& c) { return c.link == this; }),
                   nic_.held_.end());
  std::erase(nic_.links_, this);
  std::erase(nic_.hot_links_, this);
  std::erase(nic_.draining_links_, this);
  for (auto& [key, region] : nic_.shared_) std::erase(region.holders, this);
  if (peer_) {
    std::erase(peer_->links, this);
    peer = peer_;
    nic_.let_go(*peer_);
  }
}

// Nobody may write into memory that is no longer ours to write to. A copy takes milliseconds at most.
void HostLink::await_gpu() {
  while (true) {
    {
      std::lock_guard lock(nic_.mutex_);
      if (!last_batch_ || !gpu_under_way()) return;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

std::vector<std::byte> HostLink::address() const {
  return pack(HostLinkAddress{.nic = nic_.own_address(), .token = token_});
}

void HostLink::connect(std::span<const std::byte> remote_address) {
  HostLinkAddress remote;
  if (remote_address.size() != sizeof remote) throw NicError("shm: malformed link address of a peer");
  if (connected_ || closed_) throw NicError("shm: the link is connected or closed already");
  std::memcpy(&remote, remote_address.data(), sizeof remote);
  if (remote.nic.magic != kHostMagic || remote.nic.version != kHostVersion) {
    throw NicError("shm: malformed link address of a peer");
  }
  SharedMemory memory = SharedMemory::create("railwire-link", ring_bytes(kLinkRingBytes));
  std::shared_ptr<HostPeer> peer = nic_.find_or_dial(remote.nic);
  std::lock_guard lock(nic_.mutex_);
  peer_ = std::move(peer);
  peer_->links.push_back(this);
  out_memory_ = std::move(memory);
  out_ = RingProducer(out_memory_.data(), kLinkRingBytes);
  if (attached_ && remote_token_ != remote.token) broken_ = true;  // it came to the wrong one
  remote_token_ = remote.token;
  connected_ = true;
  up_by_ns_ = host_clock_ns() + kUpWithin;
  nic_.links_.push_back(this);
  const int descriptors[] = {out_memory_.fd(), nic_.table_.fd()};
  nic_.send_packet(*peer_, {.type = HostFrame::kLink, .from = token_, .to = remote_token_}, descriptors);
  out_memory_.drop_fd();
  up_if_ready();
}

// Called under the lock, as is everything below but close().
void HostLink::peer_says(const HostFrame& frame, std::vector<UniqueFd>& descriptors) {
  if (attached_ || closed_ || broken_ || descriptors.size() != 2) return;
  if (connected_ && frame.from != remote_token_) return;
  std::string why;
  SharedMemory ring = SharedMemory::map(descriptors[0].get(), 0, ring_bytes(kLinkRingBytes), true, &why);
  SharedMemory table = SharedMemory::map(descriptors[1].get(), 0, kTableBytes, false, &why);
  if (!ring || !table || !RingConsumer::check(ring.data(), kLinkRingBytes, &why)) {
    if (connected_) break_now(EPROTO);
    return;
  }
  remote_token_ = frame.from;
  in_memory_ = std::move(ring);
  table_memory_ = std::move(table);
  in_ = RingConsumer(in_memory_.data(), kLinkRingBytes);
  remote_regions_ = RegionView(table_memory_.data());
  attached_ = true;
  up_if_ready();
}

void HostLink::up_if_ready() {
  up_ = connected_ && attached_ && !broken_ && !closed_;
  if (up_) nic_.heat(*this);
}

void HostLink::break_now(int32_t error) {
  if (broken_) return;
  broken_ = true;
  up_ = false;
  take_back(Status::kUnreachable, error);
}

// Hands back all WRs: those that have ended with their own status, the others with this one. What a GPU still copies
// cannot be taken back: it, and what was posted behind it, comes when that has ended.
void HostLink::take_back(Status status, int32_t error) {
  const bool was_draining = std::exchange(draining_, false);
  if (out_ && !was_draining) complete();
  for (; first_ != end_; ++first_) {
    Work& work = at(first_);
    if (work.batch > nic_.gpu_.finished() && !nic_.gpu_.failed()) {
      draining_ = true;
      break;
    }
    if (work.bounce >= 0) nic_.gpu_.give_bounce(std::exchange(work.bounce, -1));
    nic_.held_.push_back({.kind = Completion::kWorkRequest,
                          .status = work.status == Status::kOk ? status : work.status,
                          .provider_error = work.status == Status::kOk ? error : work.error,
                          .context = work.request.context,
                          .link = this});
  }
  answered_ = next_ = end_;
  blocked_ = false;
  if (draining_ && !was_draining) nic_.draining_links_.push_back(this);
}

// The peer's process looks at consumer_closed after it has set `copying`, and we look the other way round: so it is not
// copying now, and will not begin. A peer that has not told us of its ring may have ours already.
bool HostLink::fenced() const {
  if (!closed_) return false;
  if (!in_) return !connected_;
  return in_.header().copying.load(std::memory_order_seq_cst) == 0;
}

void HostLink::close() {
  std::lock_guard lock(nic_.mutex_);
  if (closed_) return;
  // What has come before stays come.
  if (up_) {
    Completion arrivals[64];
    for (size_t taken = 0; up_ && taken < kDrainAtClose;) {
      const size_t count = consume(arrivals);
      nic_.held_.insert(nic_.held_.end(), arrivals, arrivals + count);
      if (count < std::size(arrivals)) break;
      taken += count;
    }
  }
  nic_.links_by_token_.erase(token_);
  closed_ = true;
  up_ = false;
  take_back(Status::kFlushed, 0);
  broken_ = true;
  if (out_) out_.header().producer_closed.store(1, std::memory_order_seq_cst);
  if (in_) in_.header().consumer_closed.store(1, std::memory_order_seq_cst);
  if (peer_) nic_.ring(*peer_);
}

}  // namespace railwire
