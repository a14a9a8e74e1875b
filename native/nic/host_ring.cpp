#include "nic/host_ring.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace railwire {

// ---- producer ----------------------------------------------------------------------------------------------------
RingProducer::RingProducer(std::byte* memory, size_t capacity)
    : header_(new(memory) RingHeader{}), data_(memory + kRingDataOffset), capacity_(capacity) {
  header_->magic = kRingMagic;
  header_->version = kRingVersion;
  header_->capacity = capacity;
}

std::byte* RingProducer::add(RecordKind kind, size_t length, uint32_t immediate, const WriteTarget& target) {
  const size_t needs = record_bytes(kind, length);
  size_t room = capacity_ - static_cast<size_t>(head_ - tail_);
  const size_t to_end = capacity_ - static_cast<size_t>(head_ % capacity_);
  if (to_end < needs) {
    if (room < to_end) return nullptr;
    const RecordHead pad{
        static_cast<uint32_t>(RecordKind::kPad) << 24 | static_cast<uint32_t>(to_end - sizeof(RecordHead)), 0};
    std::memcpy(at(head_), &pad, sizeof pad);
    head_ += to_end;
    room -= to_end;
  }
  if (room < needs) return nullptr;
  std::byte* place = at(head_);
  const RecordHead head{static_cast<uint32_t>(kind) << 24 | static_cast<uint32_t>(length), immediate};
  std::memcpy(place, &head, sizeof head);
  place += sizeof head;
  if (kind == RecordKind::kWrite || kind == RecordKind::kWriteImmediate) {
    std::memcpy(place, &target, sizeof target);
    place += sizeof target;
  }
  last_at_ = head_;
  head_ += needs;
  return place;
}

bool RingProducer::publish() {
  if (published_ == head_) return false;
  published_ = head_;
  header_->head.store(head_, std::memory_order_release);
  return true;
}

bool RingProducer::look() {
  const uint64_t tail = header_->tail.load(std::memory_order_acquire);
  if (tail == tail_) [[likely]]
    return true;
  if (tail < tail_ || tail > published_ || tail % 8 != 0) return false;
  tail_ = tail;
  return true;
}

bool RingProducer::refused(uint64_t at) const {
  RecordHead head;
  std::memcpy(&head, this->at(at), sizeof head);
  return head.word & RecordHead::kRefused;
}

// ---- consumer ----------------------------------------------------------------------------------------------------
bool RingConsumer::check(const std::byte* memory, size_t capacity, std::string* why) {
  const auto* header = reinterpret_cast<const RingHeader*>(memory);
  if (header->magic != kRingMagic) {
    *why = "it is no ring";
  } else if (header->version != kRingVersion) {
    *why = "its ring has version " + std::to_string(header->version) + " and ours " + std::to_string(kRingVersion);
  } else if (header->capacity != capacity) {
    *why = "its ring has another size than ours";
  } else {
    return true;
  }
  return false;
}

RingConsumer::RingConsumer(std::byte* memory, size_t capacity)
    : header_(reinterpret_cast<RingHeader*>(memory)), data_(memory + kRingDataOffset), capacity_(capacity) {}

RingConsumer::Next RingConsumer::next(Record* out) {
  while (true) {
    tail_ += current_;
    current_ = 0;
    if (head_ == tail_) {
      const uint64_t head = header_->head.load(std::memory_order_acquire);
      if (head == tail_) return Next::kNone;
      if (head < tail_ || head - tail_ > capacity_ || head % 8 != 0) return Next::kGarbage;
      head_ = head;
    }
    const size_t offset = static_cast<size_t>(tail_ % capacity_);
    const size_t most = std::min<size_t>(static_cast<size_t>(head_ - tail_), capacity_ - offset);
    std::byte* place = data_ + offset;
    std::memcpy(&out->head, place, sizeof out->head);
    const RecordKind kind = out->head.kind();
    if (kind < RecordKind::kPad || kind > RecordKind::kMessage) return Next::kGarbage;
    const size_t needs = record_bytes(kind, out->head.length());
    if (needs > most) return Next::kGarbage;
    current_ = needs;
    current_at_ = place;
    if (kind == RecordKind::kPad) {
      if (offset + needs != capacity_) return Next::kGarbage;  // nothing else is what a pad is for
      continue;
    }
    place += sizeof(RecordHead);
    if (kind == RecordKind::kWrite || kind == RecordKind::kWriteImmediate) {
      std::memcpy(&out->target, place, sizeof out->target);
      place += sizeof out->target;
    }
    out->payload = place;
    return Next::kRecord;
  }
}

void RingConsumer::refuse() {
  RecordHead head;
  std::memcpy(&head, current_at_, sizeof head);
  head.word |= RecordHead::kRefused;
  std::memcpy(current_at_, &head, sizeof head);
}

bool RingConsumer::finish() {
  tail_ += current_;
  current_ = 0;
  if (tail_ == published_) return false;
  published_ = tail_;
  header_->tail.store(tail_, std::memory_order_release);
  return true;
}

}  // namespace railwire
