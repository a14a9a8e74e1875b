// A tcp link's bytes on their way out of and into a GPU's memory.
#include <algorithm>
#include <cerrno>

#include "nic/tcp_machine.h"

namespace railwire {

// Has what our writes name copied into blocks, as far as there is room: ahead of what is being sent.
void TcpMachine::stage() {
  for (; stage_next_ < posted_; ++stage_next_, stage_offset_ = 0) {
    const WorkRequest& request = slot(stage_next_).request;
    if (!request.local_key || (request.flags & WorkRequest::kRead)) continue;
    while (stage_offset_ < request.length) {
      const uint64_t from = reinterpret_cast<uint64_t>(request.local) + stage_offset_;
      const uint64_t taken = work_out_->add(from, request.length - stage_offset_);
      if (taken == 0) break;
      stage_offset_ += taken;
      last_copy_ = gpu_->asked();
    }
    if (stage_offset_ < request.length) break;
  }
  gpu_->progress();
}

// The same for the peer's reads of a GPU's memory.
void TcpMachine::stage_answers() {
  for (Answer& answer : answers_) {
    while (answer.staged < answer.left) {
      bool allowed = false, gpu = false;
      const uint64_t left = answer.left - answer.staged;
      std::byte* const bytes = regions_.find(answer.rkey, answer.offset + answer.staged, left, false, &allowed, &gpu);
      if (!allowed) return gpu_->progress();  // it is refused when its turn comes
      if (!gpu) break;
      const uint64_t taken = answers_out_->add(reinterpret_cast<uint64_t>(bytes), left);
      if (taken == 0) return gpu_->progress();
      answer.staged += taken;
      last_copy_ = gpu_->asked();
    }
  }
  gpu_->progress();
}

void TcpMachine::add_staged(TcpGpuOut& staged, size_t length) {
  while (length > 0) {
    const std::span<std::byte> bytes = staged.take(length);
    add_bytes(bytes.data(), bytes.size());
    length -= bytes.size();
  }
}

// What lands behind a copy counts behind it, too.
void TcpMachine::landed_later(const TcpEntry& entry) {
  const uint64_t before = landings_.empty() ? 0 : landings_.back().copy;
  landings_.push_back({.copy = std::max(before, piece_copy_),
                       .immediate = entry.immediate,
                       .tells = entry.flags == TcpEntry::kImmediate,
                       .counts = entry.flags != TcpEntry::kMore});
  piece_copy_ = 0;
}

void TcpMachine::settle(std::vector<uint32_t>& immediates) {
  if (state() == State::kFailed) return;
  if (gpu_->failed() && waits_for_gpu()) return fail_with_gpu();
  const uint64_t copied = gpu_->copied();
  for (; !landings_.empty() && landings_.front().copy <= copied; landings_.pop_front()) {
    const Landing& landing = landings_.front();
    if (landing.tells) {
      immediates.push_back(landing.immediate);
      ++immediates_landed_;
    }
    landed_ += landing.counts;
  }
  for (; !read_landings_.empty() && read_landings_.front().copy <= copied; read_landings_.pop_front()) {
    slot(read_landings_.front().number).answered = true;
    heard_landed(heard_);
  }
  if (stalled_) received(0, immediates);
  if (stage_next_ < posted_) stage();
}

// The GPU copies nothing any more: whatever it had to do with is not worth another link.
void TcpMachine::fail_with_gpu() {
  const uint64_t first = done_;
  fail(Status::kOther, EREMOTEIO);
  for (uint64_t number = first; number < posted_; ++number) {
    Slot& ended = slot(number);
    if (!ended.request.local_key) continue;
    ended.status = Status::kOther;
    ended.error = EREMOTEIO;
  }
}

// What has not been counted comes again over another link, or has failed.
void TcpMachine::drop_gpu() {
  landings_.clear();
  read_landings_.clear();
  work_out_->drop();
  answers_out_->drop();
  in_->finish();
  stage_next_ = posted_;
  stalled_ = false;
}

}  // namespace railwire
