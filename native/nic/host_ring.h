// A ring of records in memory that two processes share: one produces, the other consumes.
//
// Neither trusts the other. Whatever stands in the memory, a producer writes and a consumer reads nothing outside of
// the ring, and both notice indices and lengths that cannot be; the link is then given up. What a record says is
// copied before it is looked at, because the other side could change it in between.
//
//   header page | data: records of whole 8 bytes, one after the other; none crosses the end (a pad fills it up)
//
// A record is a RecordHead, for writes a WriteTarget, and its payload. `head` and `tail` count bytes from the
// beginning of time, so head - tail is what is in the ring. Version 1 is described by kRingVersion, RingHeader,
// RecordHead, WriteTarget and RecordKind; a change of any is another version.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace railwire {

inline constexpr uint32_t kRingMagic = 0x52575231;  // "1RWR" in memory
inline constexpr uint32_t kRingVersion = 1;
inline constexpr size_t kCacheLine = 64;

// Each line has one writer. The sleep words are taken back by whoever rings.
struct RingHeader {
  // Written before the ring is shown to anybody.
  uint32_t magic;
  uint32_t version;
  uint64_t capacity;

  // The producer's.
  alignas(kCacheLine) std::atomic<uint64_t> head;
  std::atomic<uint32_t> copying;  // it is writing into the consumer's memory by itself, or reading there
  alignas(kCacheLine) std::atomic<uint32_t> producer_asleep;
  std::atomic<uint32_t> producer_closed;  // nothing follows after `head`

  // The consumer's.
  alignas(kCacheLine) std::atomic<uint64_t> tail;
  alignas(kCacheLine) std::atomic<uint32_t> consumer_asleep;
  std::atomic<uint32_t> consumer_closed;  // nothing may be written into its memory any more
};
static_assert(sizeof(RingHeader) == 5 * kCacheLine);
inline constexpr size_t kRingDataOffset = 4096;
constexpr size_t ring_bytes(size_t capacity) { return kRingDataOffset + capacity; }

enum class RecordKind : uint8_t { kPad = 1, kImmediate, kWrite, kWriteImmediate, kMessage };

struct RecordHead {
  uint32_t word = 0;       // kind << 24 | length of the payload; the consumer sets the top bit where it refuses a write
  uint32_t immediate = 0;  // of kImmediate and kWriteImmediate

  static constexpr uint32_t kRefused = 0x80000000u;
  static constexpr uint32_t kLongest = 0x00ffffffu;
  RecordKind kind() const { return static_cast<RecordKind>(word >> 24 & 0x7f); }
  uint32_t length() const { return word & kLongest; }
};
struct WriteTarget {
  uint64_t rkey = 0;
  uint64_t remote = 0;
};

constexpr size_t record_bytes(RecordKind kind, size_t length) {
  const size_t extra = kind == RecordKind::kWrite || kind == RecordKind::kWriteImmediate ? sizeof(WriteTarget) : 0;
  return (sizeof(RecordHead) + extra + length + 7) & ~size_t{7};
}

// The producer's view.
class RingProducer {
 public:
  RingProducer() = default;
  // `memory`: ring_bytes(capacity) bytes that nobody else sees yet; capacity is a multiple of 64.
  RingProducer(std::byte* memory, size_t capacity);

  // Adds a record and returns where its payload goes (`length` bytes), or null: no room. Nobody sees it before
  // publish(). A pad that precedes it stays in the ring even if there is no room for the record.
  std::byte* add(RecordKind kind, size_t length, uint32_t immediate = 0, const WriteTarget& target = {});
  // Shows the consumer all that was added. False: there was nothing new.
  bool publish();
  // Looks at how far the consumer has come. False: it says what cannot be.
  bool look();

  uint64_t added() const { return head_; }       // position behind the last record
  uint64_t consumed() const { return tail_; }    // as of the last look()
  uint64_t last_at() const { return last_at_; }  // position of the record added last
  bool refused(uint64_t at) const;               // of a write whose record was added at `at` and has been consumed

  RingHeader& header() const { return *header_; }
  explicit operator bool() const { return header_ != nullptr; }

 private:
  std::byte* at(uint64_t position) const { return data_ + position % capacity_; }

  RingHeader* header_ = nullptr;
  std::byte* data_ = nullptr;
  size_t capacity_ = 0;
  uint64_t head_ = 0, published_ = 0, tail_ = 0, last_at_ = 0;
};

// The consumer's view.
class RingConsumer {
 public:
  struct Record {
    RecordHead head;
    WriteTarget target;
    const std::byte* payload = nullptr;  // head.length() bytes that may change under our eyes
  };
  enum class Next : uint8_t { kNone, kRecord, kGarbage };

  RingConsumer() = default;
  // Of memory that another process made. Throws nothing; `why` says why the ring is not one of ours.
  static bool check(const std::byte* memory, size_t capacity, std::string* why);
  RingConsumer(std::byte* memory, size_t capacity);

  // The next record; it is consumed with the next call of next() or finish().
  Next next(Record* out);
  void refuse();  // the record that next() gave last
  // Tells the producer how far we have come. False: no further than before.
  bool finish();
  // Whether there is anything to consume, by a fresh look.
  bool empty() const { return header_->head.load(std::memory_order_acquire) == tail_; }

  RingHeader& header() const { return *header_; }
  explicit operator bool() const { return header_ != nullptr; }

 private:
  RingHeader* header_ = nullptr;
  std::byte* data_ = nullptr;
  size_t capacity_ = 0;
  uint64_t head_ = 0, tail_ = 0, published_ = 0;
  uint64_t current_ = 0;  // bytes of the record that next() gave last
  std::byte* current_at_ = nullptr;
};

}  // namespace railwire
