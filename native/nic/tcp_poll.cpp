// A turn of the tcp NIC: what the sockets say, who reads and writes, what is told and handed out; and going to sleep.
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>

#include "nic/tcp_internal.h"

namespace railwire {
namespace {

constexpr int kEvents = 64;
constexpr size_t kMostImmediates = 4096;  // that wait to be handed out, before more is read
constexpr uint64_t kClockTurns = 1024;

}  // namespace

void TcpNic::note_work(TcpLink& link) {
  if (link.listed_ || !link.has_work()) return;
  link.listed_ = true;
  working_.push_back(&link);
}

void TcpNic::note_ended(TcpLink& link) {
  if (link.ended_listed_ || !link.machine_.has_ended()) return;
  link.ended_listed_ = true;
  ended_.push_back(&link);
  wake_if_asleep();
}

void TcpNic::note_owes(TcpLink& link) {
  if (link.owes_) return;
  link.owes_ = true;
  owing_.push_back(&link);
}

void TcpNic::note_gpu(TcpLink& link) {
  if (link.gpu_listed_ || !link.machine_.waits_for_gpu()) return;
  link.gpu_listed_ = true;
  copying_.push_back(&link);
  wake_if_asleep();
}

// What the GPU has copied: blocks to send, and bytes that have landed.
void TcpNic::look_at_gpu() {
  gpu_.progress();
  size_t kept = 0;
  for (size_t i = 0; i < copying_.size(); ++i) {
    TcpLink* link = copying_[i];
    link->machine_.settle(immediates_);
    link->look_at_machine();
    if (link->machine_.untold() > 0) note_owes(*link);
    note_work(*link);
    if (link->machine_.waits_for_gpu()) {
      copying_[kept++] = link;
    } else {
      link->gpu_listed_ = false;
    }
  }
  copying_.resize(kept);
}

size_t TcpNic::poll(std::span<Completion> out) {
  std::lock_guard lock(mutex_);
  armed_ = false;
  for (TcpInbox* inbox : lent_) inbox->give_back();
  lent_.clear();
  size_t filled = hand_out(out);
  if (filled == out.size()) return filled;
  progress();
  return filled + hand_out(out.subspan(filled));
}

size_t TcpNic::hand_out(std::span<Completion> out) {
  size_t filled = 0;
  while (filled < out.size() && next_immediate_ < immediates_.size()) {
    Completion& completion = out[filled++];
    completion.kind = Completion::kImmediate;
    completion.status = Status::kOk;
    completion.immediate = immediates_[next_immediate_++];
    completion.provider_error = 0;
    completion.context = nullptr;
    completion.link = nullptr;
  }
  if (next_immediate_ == immediates_.size()) {
    immediates_.clear();
    next_immediate_ = 0;
  }
  while (!ended_.empty() && filled < out.size()) {
    TcpLink* link = ended_.back();
    filled += link->machine_.hand_out(out.subspan(filled), link);
    if (link->machine_.has_ended()) break;
    link->ended_listed_ = false;
    ended_.pop_back();
  }
  while (!sends_.empty() && filled < out.size()) {
    out[filled++] = sends_.front();
    sends_.pop_front();
  }
  if (!talking_.empty() && filled < out.size()) filled += hand_out_messages(out.subspan(filled));
  return filled;
}

void TcpNic::progress() {
  if (++turn_number_ % kClockTurns == 0) look_at_clock();
  look_at_sockets();
  if (!copying_.empty()) look_at_gpu();
  if (immediates_.size() - next_immediate_ < kMostImmediates) {
    turn_.swap(working_);
    for (TcpLink* link : turn_) {
      link->listed_ = false;
      link->progress();
    }
    for (TcpLink* link : turn_) note_work(*link);
    turn_.clear();
  }
  if (!owing_.empty()) tell_landed(false);
}

void TcpNic::look_at_sockets() {
  epoll_event events[kEvents];
  const int count = epoll_wait(epoll_.get(), events, kEvents, 0);
  for (int i = 0; i < count; ++i) {
    const Watch& watch = watches_[events[i].data.u64 >> 32];
    if (!watch.object || watch.generation != static_cast<uint32_t>(events[i].data.u64)) continue;  // gone by now
    watch.object->event(events[i].events);
  }
}

// Who has landed something and has nothing to send that would tell, says so when nothing more comes in.
void TcpNic::tell_landed(bool all) {
  size_t kept = 0;
  for (size_t i = 0; i < owing_.size(); ++i) {
    TcpLink* link = owing_[i];
    const bool owes = link->machine_.untold() > 0 && link->fd_ && link->up_;
    if (owes && (!link->writable_ || (!all && link->read_turn_ == turn_number_))) {
      owing_[kept++] = link;
      continue;
    }
    link->owes_ = false;
    if (owes) link->write(1 << 20, true);
  }
  owing_.resize(kept);
}

bool TcpNic::idle() const {
  return next_immediate_ == immediates_.size() && ended_.empty() && sends_.empty() && talking_.empty() &&
         working_.empty() && copying_.empty();
}

bool TcpNic::arm() {
  std::lock_guard lock(mutex_);
  look_at_clock();
  if (!owing_.empty()) tell_landed(true);
  if (!idle()) return false;
  armed_ = true;
  return true;
}

void TcpNic::disarm() {
  std::lock_guard lock(mutex_);
  armed_ = false;
}

}  // namespace railwire
