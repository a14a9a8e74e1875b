// The receiving side of a tcp link. Every frame is checked as a whole before a byte of its payload is taken.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/tcp_machine.h"

namespace railwire {

void TcpMachine::garbage() { fail(Status::kOther, EPROTO); }

void TcpMachine::refuse(bool of_read) {
  if (state() != State::kOpen) return;
  refused_read_ = of_read;
  stalled_ = false;
  state_.store(State::kRefusing, std::memory_order_relaxed);
}

size_t TcpMachine::room(std::span<iovec> places) {
  size_t used = 0;
  offered_ = 0;
  if (stalled_ || landings_.size() >= kMostLandings) return 0;
  if (state() == State::kOpen && frame_left_ > 0) {
    if (frame_.type == TcpFrame::kReadData) {
      WorkRequest& read = slot(reads_.front()).request;
      if (read.local_key) {
        offered_ = in_->offer(frame_left_, places, &used);
      } else {
        places[used++] = {static_cast<std::byte*>(read.local) + read_received_, frame_left_};
        offered_ = frame_left_;
      }
    } else {
      uint32_t begin = piece_got_;
      for (size_t i = piece_; i < refused_at_; ++i, begin = 0) {
        const Piece& piece = pieces_[i];
        if ((piece.entry.flags & TcpEntry::kRead) || piece.entry.length == begin) continue;
        if (piece.gpu) {
          const size_t left = piece.entry.length - begin;
          const size_t room = in_->offer(left, places.first(kMostPlaces - 1), &used);
          offered_ += room;
          if (room < left) break;
          continue;
        }
        places[used++] = {piece.place + begin, piece.entry.length - begin};
        offered_ += piece.entry.length - begin;
      }
    }
    if (offered_ < frame_left_) return used;  // not beyond what is refused
    // What of the next frame's payload comes with its header goes through the buffer. Short frames do, for fewer calls;
    // behind a long one the next is as long, mostly, and so is its header.
    const size_t header = frame_.type == TcpFrame::kWork ? sizeof frame_ + pieces_.size() * sizeof(TcpEntry) : 0;
    places[used++] = {buffer_.get(), frame_.payload < kLongFrame ? kHeader : std::max(header, kFewestAhead)};
    return used;
  }
  if (state() != State::kOpen) buffered_ = 0;  // thrown away
  places[used++] = {buffer_.get() + buffered_, kBuffer - buffered_};
  return used;
}

void TcpMachine::received(size_t bytes, std::vector<uint32_t>& immediates) {
  if (state() == State::kOpen) received_some(bytes, immediates);
  if (in_) in_->finish();
}

void TcpMachine::received_some(size_t bytes, std::vector<uint32_t>& immediates) {
  const size_t direct = std::min(bytes, offered_);
  offered_ = 0;
  if (direct > 0) take(direct, nullptr, immediates);
  buffered_ += bytes - direct;
  if (state() == State::kOpen && buffered_ > 0) parse(immediates);
}

// Takes what is whole out of the buffer, and leaves the beginning of a header at its front.
void TcpMachine::parse(std::vector<uint32_t>& immediates) {
  size_t at = 0;
  while (state() == State::kOpen) {
    const size_t left = buffered_ - at;
    if (frame_left_ > 0) {
      const size_t part = std::min<size_t>(left, frame_left_);
      if (part == 0) break;
      stalled_ = frame_gpu_ && !in_->has_room(part);
      if (stalled_) break;
      take(part, buffer_.get() + at, immediates);
      at += part;
      continue;
    }
    TcpFrame frame;
    if (left < sizeof frame) break;
    std::memcpy(&frame, buffer_.get() + at, sizeof frame);
    if (frame.type == TcpFrame::kWork && frame.count > kTcpMostEntries) return garbage();
    const size_t entries = frame.type == TcpFrame::kWork ? frame.count * sizeof(TcpEntry) : 0;
    if (left < sizeof frame + entries) break;
    if (!begin(frame, buffer_.get() + at + sizeof frame)) return;
    at += sizeof frame + entries;
    if (frame.type == TcpFrame::kWork) finish_entries(immediates);  // those without a payload
  }
  if (state() != State::kOpen) return;
  buffered_ -= at;
  if (at > 0 && buffered_ > 0) std::memmove(buffer_.get(), buffer_.get() + at, buffered_);
}

// False: the link is no longer open.
bool TcpMachine::begin(const TcpFrame& frame, const std::byte* entries) {
  const bool sound = frame.payload <= kTcpLongestFrame && (frame.flags & ~TcpFrame::kOfRead) == 0 &&
                     (frame.flags == 0 || frame.type == TcpFrame::kRefused);
  if (!sound) {
    garbage();
    return false;
  }
  if (frame.type == TcpFrame::kRefused) {
    peer_refuses(frame);
    return false;
  }
  if (!heard_landed(frame.landed)) {
    garbage();
    return false;
  }
  frame_ = frame;
  frame_left_ = frame.payload;
  frame_gpu_ = false;
  bool fits = false;
  switch (frame.type) {
    case TcpFrame::kWork:
      fits = check_entries(frame, entries);
      worked_ |= fits;
      break;
    case TcpFrame::kLanded:
      fits = frame.count == 0 && frame.payload == 0;
      break;
    case TcpFrame::kReadData:
      if (!reads_.empty() && frame.count <= 1) {
        const uint64_t left = slot(reads_.front()).request.length - read_received_;
        fits = frame.payload <= left && (frame.count == 1) == (frame.payload == left);
        fits = fits && (frame.payload > 0 || frame.count == 1);
        if (fits) frame_gpu_ = slot(reads_.front()).request.local_key != nullptr;
        if (fits && frame.payload == 0) read_answered(read_copy_);
      }
      break;
    default:
      break;
  }
  if (!fits) garbage();
  return fits;
}

bool TcpMachine::check_entries(const TcpFrame& frame, const std::byte* entries) {
  if (frame.count == 0) return false;
  uint64_t payload = 0;
  pieces_.resize(frame.count);
  refused_at_ = frame.count;
  for (size_t i = 0; i < frame.count; ++i) {
    Piece& piece = pieces_[i];
    TcpEntry& entry = piece.entry;
    std::memcpy(&entry, entries + i * sizeof entry, sizeof entry);
    const bool read = entry.flags == TcpEntry::kRead;
    const bool known =
        read || entry.flags == 0 || entry.flags == TcpEntry::kImmediate || entry.flags == TcpEntry::kMore;
    if (!known || entry.reserved != 0 || entry.length > kTcpLongestWrite) return false;
    if (!read) payload += entry.length;
    bool allowed = false;
    piece.gpu = false;
    piece.place = regions_.find(entry.rkey, entry.offset, entry.length, !read, &allowed, &piece.gpu);
    piece.gpu &= !read;
    allowed &= !piece.gpu || !gpu_->failed();
    frame_gpu_ |= piece.gpu;
    if (!allowed) refused_at_ = std::min(refused_at_, i);
  }
  piece_ = 0;
  piece_got_ = 0;
  return payload == frame.payload;
}

// So many of ours have landed, says the peer. Those that were not sent cannot have.
bool TcpMachine::heard_landed(uint64_t landed) {
  if (landed < heard_ || landed > next_) return false;
  heard_ = landed;
  worked_ |= landed > 0;
  while (done_ < heard_) {
    const Slot& served = slot(done_);
    if ((served.request.flags & WorkRequest::kRead) && !served.answered) break;
    ++done_;
  }
  return true;
}

void TcpMachine::peer_refuses(const TcpFrame& frame) {
  const bool of_read = frame.flags & TcpFrame::kOfRead;
  if (frame.count != 0 || frame.payload != 0 || !heard_landed(frame.landed) || (of_read && reads_.empty()) ||
      (!of_read && heard_ == posted_)) {
    return garbage();
  }
  worked_ = true;
  fail_at(of_read ? reads_.front() : heard_, Status::kRemoteAccess, EACCES);
}

void TcpMachine::room_gone() {
  if (frame_.type == TcpFrame::kReadData) {
    worked_ = true;
    fail_at(reads_.front(), Status::kLocal, EFAULT);
  } else {
    refused_at_ = piece_;
    refuse(false);
  }
}

// Bytes of the payload: out of the buffer, or (`from` null) they lie at their destination already.
void TcpMachine::take(size_t bytes, const std::byte* from, std::vector<uint32_t>& immediates) {
  if (frame_.type == TcpFrame::kReadData) {
    Slot& read = slot(reads_.front());
    std::byte* const place = static_cast<std::byte*>(read.request.local) + read_received_;
    if (read.request.local_key) {
      read_copy_ = last_copy_ = in_->land(from, reinterpret_cast<uint64_t>(place), bytes);
    } else if (from) {
      std::memcpy(place, from, bytes);
    }
    read_received_ += bytes;
    frame_left_ -= static_cast<uint32_t>(bytes);
    if (frame_left_ == 0 && frame_.count == 1) read_answered(read_copy_);
    return;
  }
  frame_left_ -= static_cast<uint32_t>(bytes);
  while (bytes > 0) {
    const Piece& piece = pieces_[piece_];
    const auto part = static_cast<uint32_t>(std::min<size_t>(bytes, piece.entry.length - piece_got_));
    if (piece.gpu && part > 0) {
      piece_copy_ = last_copy_ = in_->land(from, reinterpret_cast<uint64_t>(piece.place) + piece_got_, part);
    } else if (from) {
      std::memcpy(piece.place + piece_got_, from, part);
    }
    if (from) from += part;
    piece_got_ += part;
    bytes -= part;
    finish_entries(immediates);
    if (state() != State::kOpen) return;
  }
}

// Those that have all their bytes; what comes next then is one that has not, or the end of the frame.
void TcpMachine::finish_entries(std::vector<uint32_t>& immediates) {
  while (piece_ < pieces_.size()) {
    if (piece_ == refused_at_) return refuse(false);
    const TcpEntry& entry = pieces_[piece_].entry;
    if (entry.flags == TcpEntry::kRead) {
      if (answers_.size() >= kMostAnswers) return garbage();
      answers_.push_back({entry.rkey, entry.offset, entry.length, 0});
    } else {
      if (piece_got_ < entry.length) return;
    }
    if (piece_copy_ > 0 || !landings_.empty()) {
      landed_later(entry);
    } else {
      if (entry.flags == TcpEntry::kImmediate) {
        immediates.push_back(entry.immediate);
        ++immediates_landed_;
      }
      if (entry.flags != TcpEntry::kMore) ++landed_;
    }
    ++piece_;
    piece_got_ = 0;
  }
}

// The oldest read has all its bytes; those of a GPU when this copy has ended.
void TcpMachine::read_answered(uint64_t copy) {
  const uint64_t number = reads_.front();
  reads_.pop_front();
  read_received_ = 0;
  read_copy_ = 0;
  if (copy > 0) {
    read_landings_.push_back({number, copy});
  } else {
    slot(number).answered = true;
    heard_landed(heard_);
  }
}

void TcpMachine::region_gone(uint64_t rkey) {
  if (state() != State::kOpen || frame_left_ == 0 || frame_.type != TcpFrame::kWork) return;
  for (size_t i = piece_; i < refused_at_; ++i) {
    if (pieces_[i].entry.rkey == rkey) refused_at_ = i;
  }
  if (piece_ == refused_at_ && piece_ < pieces_.size()) refuse(false);
}

}  // namespace railwire
