// The sending side of a tcp link: our work requests, the answers to the peer's reads, and what has landed here.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "nic/tcp_machine.h"

namespace railwire {
namespace {

// Whether all of it can be read. By the kernel, which is not killed by what is gone.
bool readable(const std::byte* bytes, size_t length) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  std::array<char, 64> taken;  // a byte of each page
  std::array<iovec, taken.size()> pages;
  auto at = reinterpret_cast<uintptr_t>(bytes);
  const uintptr_t end = at + length;
  while (at < end) {
    size_t count = 0;
    for (; count < pages.size() && at < end; ++count) {
      pages[count] = {reinterpret_cast<void*>(at), 1};
      at = (at / page + 1) * page;
    }
    const iovec here{taken.data(), count};
    if (process_vm_readv(getpid(), &here, 1, pages.data(), count, 0) != static_cast<ssize_t>(count)) return false;
  }
  return true;
}

}  // namespace

TcpMachine::TcpMachine(const TcpRegions& regions, uint32_t depth, TcpGpu* gpu)
    : regions_(regions), depth_(depth), slots_(kFewestSlots), buffer_(new std::byte[kBuffer]), gpu_(gpu) {
  if (!gpu) return;
  work_out_ = std::make_unique<TcpGpuOut>(*gpu);
  answers_out_ = std::make_unique<TcpGpuOut>(*gpu);
  in_ = std::make_unique<TcpGpuIn>(*gpu);
}

size_t TcpMachine::post(std::span<const WorkRequest> batch) {
  if (state() != State::kOpen) return 0;
  const size_t most = std::min<size_t>(batch.size(), depth_ - outstanding());
  while (outstanding() + most > slots_.size()) grow();
  size_t count = 0;
  for (; count < most && unsent_ < kMostUnsent; ++count) {
    Slot& made = slot(posted_++);
    made.request = batch[count];
    made.status = Status::kOk;
    made.error = 0;
    made.answered = false;
    if (stage_next_ + 1 == posted_ && !made.request.local_key) stage_next_ = posted_;
    if (!(made.request.flags & WorkRequest::kRead)) unsent_ += made.request.length;
  }
  return count;
}

// Most links never have more than a few in flight.
void TcpMachine::grow() {
  std::vector<Slot> longer(slots_.size() * 2);
  for (uint64_t number = handed_; number < posted_; ++number) longer[number & (longer.size() - 1)] = slot(number);
  slots_.swap(longer);
}

size_t TcpMachine::hand_out(std::span<Completion> out, Link* link) {
  size_t filled = 0;
  if (!has_ended()) return 0;
  for (; filled < out.size() && handed_ < done_; ++filled, ++handed_) {
    const Slot& ended = slot(handed_);
    Completion& completion = out[filled];
    completion.kind = Completion::kWorkRequest;
    completion.status = ended.status;
    completion.provider_error = ended.error;
    completion.context = ended.request.context;
    completion.link = link;
    completion.request = ended.status == Status::kOk ? nullptr : &ended.request;
    if (ended.status == Status::kOk) immediates_completed_ += (ended.request.flags & WorkRequest::kImmediate) != 0;
  }
  return filled;
}

void TcpMachine::fail(Status status, int error) { fail_at(done_, status, error); }

void TcpMachine::fail_at(uint64_t number, Status status, int error) {
  if (state() == State::kFailed) return;
  state_.store(State::kFailed, std::memory_order_relaxed);
  for (; done_ < posted_; ++done_) {
    Slot& ended = slot(done_);
    ended.status = done_ == number ? status : Status::kFlushed;
    ended.error = done_ == number ? error : 0;
  }
  next_ = heard_ = posted_;
  unsent_ = 0;
  if (gpu_) drop_gpu();
  reads_.clear();
  answers_.clear();
  out_.clear();
  first_out_ = 0;
}

std::span<iovec> TcpMachine::output(bool landed_too) {
  if (first_out_ == out_.size() && state() != State::kFailed) {
    if (state() == State::kRefusing) {
      if (refusal_made_ || !landings_.empty()) return {};  // what was before it counts first
      if (refused_read_ || !make_answer()) {               // the reads before it are answered
        refusal_made_ = true;
        make_plain(TcpFrame::kRefused, refused_read_ ? TcpFrame::kOfRead : 0);
      }
    } else {
      // Work and answers take turns.
      answer_turn_ = !answer_turn_;
      const bool made = answer_turn_ ? make_answer() || make_work() : make_work() || make_answer();
      if (!made && state() == State::kRefusing) return output(landed_too);  // a read of what is gone
      if (!made && landed_too && untold() > 0) make_plain(TcpFrame::kLanded, 0);
    }
  }
  return std::span(out_).subspan(first_out_);
}

void TcpMachine::sent(size_t bytes) {
  while (bytes > 0) {
    iovec& part = out_[first_out_];
    const size_t of_it = std::min(bytes, part.iov_len);
    part.iov_base = static_cast<std::byte*>(part.iov_base) + of_it;
    part.iov_len -= of_it;
    bytes -= of_it;
    if (part.iov_len == 0) ++first_out_;
  }
  if (first_out_ < out_.size()) return;
  out_.clear();
  first_out_ = 0;
  if (gpu_) {
    work_out_->sent();
    answers_out_->sent();
  }
  if (refusal_made_) fail(Status::kFlushed, 0);
}

std::optional<uint64_t> TcpMachine::output_gone() {
  if (answering_) return answering_;
  worked_ = true;  // which ends a work request, whatever has come of the link otherwise
  uint64_t left = 0;
  for (size_t i = std::max<size_t>(first_out_, 1); i < out_.size(); ++i) left += out_[i].iov_len;
  TcpFrame frame;
  std::memcpy(&frame, head_.data(), sizeof frame);
  uint64_t at = frame.payload - left;
  for (size_t i = 0; i < frame.count; ++i) {
    TcpEntry entry;
    std::memcpy(&entry, head_.data() + sizeof frame + i * sizeof entry, sizeof entry);
    if (entry.flags == TcpEntry::kRead) continue;
    if (at < entry.length) {
      fail_at(frame_first_ + i, Status::kLocal, EFAULT);
      return std::nullopt;
    }
    at -= entry.length;
  }
  fail(Status::kOther, EFAULT);
  return std::nullopt;
}

void TcpMachine::begin_frame(size_t entries) {
  answering_.reset();
  out_.clear();
  first_out_ = 0;
  head_.resize(sizeof(TcpFrame) + entries * sizeof(TcpEntry));
  out_.push_back({});
}

void TcpMachine::add_bytes(void* bytes, size_t length) {
  if (length == 0) return;
  iovec& last = out_.back();
  if (out_.size() > 1 && static_cast<std::byte*>(last.iov_base) + last.iov_len == bytes) {
    last.iov_len += length;
  } else {
    out_.push_back({bytes, length});
  }
}

void TcpMachine::finish_frame(TcpFrame frame) {
  frame.landed = told_ = landed_;
  std::memcpy(head_.data(), &frame, sizeof frame);
  out_[0] = {head_.data(), head_.size()};
}

void TcpMachine::make_plain(TcpFrame::Type type, uint8_t flags) {
  begin_frame(0);
  finish_frame({.type = type, .flags = flags});
}

bool TcpMachine::make_work() {
  if (next_ == posted_) return false;
  if (stage_next_ < posted_) stage();
  begin_frame(std::min<uint64_t>(posted_ - next_, kTcpMostEntries));
  frame_first_ = next_;
  TcpFrame frame{.type = TcpFrame::kWork};
  std::byte* at = head_.data() + sizeof frame;
  while (next_ < posted_ && frame.count < kTcpMostEntries) {
    const WorkRequest& request = slot(next_).request;
    TcpEntry entry{.rkey = request.rkey, .offset = request.remote, .length = static_cast<uint32_t>(request.length)};
    if (request.flags & WorkRequest::kRead) {
      entry.flags = TcpEntry::kRead;
      reads_.push_back(next_++);
    } else {
      const uint64_t left = request.length - next_offset_, fits = kTcpLongestFrame - frame.payload;
      if (left > fits && frame.payload > 0 && left <= kTcpLongestFrame) break;  // whole, in the next one
      if (left > 0 && fits == 0) break;
      entry.offset += next_offset_;
      entry.length = static_cast<uint32_t>(std::min(left, fits));
      if (!request.local_key) {
        add_bytes(static_cast<std::byte*>(request.local) + next_offset_, entry.length);
      } else if (left > 0) {
        entry.length = static_cast<uint32_t>(work_out_->ready(entry.length));
        if (entry.length == 0) break;  // not yet
        add_staged(*work_out_, entry.length);
      }
      frame.payload += entry.length;
      unsent_ -= entry.length;
      if (left > entry.length) {
        entry.flags = TcpEntry::kMore;
        next_offset_ += entry.length;
      } else {
        if (request.flags & WorkRequest::kImmediate) {
          entry.flags = TcpEntry::kImmediate;
          entry.immediate = request.immediate;
        }
        next_offset_ = 0;
        ++next_;
      }
    }
    std::memcpy(at, &entry, sizeof entry);
    at += sizeof entry;
    ++frame.count;
  }
  if (frame.count == 0) {
    out_.clear();
    return false;
  }
  head_.resize(static_cast<size_t>(at - head_.data()));
  finish_frame(frame);
  return true;
}

bool TcpMachine::make_answer() {
  if (answers_.empty()) return false;
  Answer& answer = answers_.front();
  bool allowed = false, gpu = false;
  auto length = static_cast<uint32_t>(std::min<uint64_t>(answer.left, kTcpLongestFrame));
  std::byte* bytes = regions_.find(answer.rkey, answer.offset, length, false, &allowed, &gpu);
  if (!allowed || (!gpu && regions_.doubtful(answer.rkey) && !readable(bytes, length))) {  // not any more
    refuse(true);
    return false;
  }
  if (gpu && length > 0) {
    stage_answers();
    length = static_cast<uint32_t>(answers_out_->ready(length));
    if (length == 0) return false;  // not yet
  }
  begin_frame(0);
  answering_ = answer.rkey;
  if (gpu && length > 0) {
    add_staged(*answers_out_, length);
    answer.staged -= length;
  } else {
    add_bytes(bytes, length);
  }
  answer.offset += length;
  answer.left -= length;
  const bool last = answer.left == 0;
  finish_frame({.type = TcpFrame::kReadData, .count = last, .payload = length});
  if (last) answers_.pop_front();
  return true;
}

}  // namespace railwire
