// The ring of the shm NIC: what goes in comes out, and nothing that stands in it makes us leave it. The memory is
// ordinary here, so that AddressSanitizer sees every step beside it.
#include "nic/host_ring.h"

#include <doctest/doctest.h>

#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

namespace railwire {
namespace {

constexpr size_t kCapacity = 4096;

struct Ring {
  explicit Ring(size_t capacity = kCapacity)
      : bytes(ring_bytes(capacity)), memory(new(std::align_val_t{kCacheLine}) std::byte[bytes]()) {
    producer = RingProducer(memory, capacity);
    std::string why;
    CHECK(RingConsumer::check(memory, capacity, &why));
    consumer = RingConsumer(memory, capacity);
  }
  ~Ring() { ::operator delete[](memory, std::align_val_t{kCacheLine}); }
  size_t bytes;
  std::byte* memory;
  RingProducer producer;
  RingConsumer consumer;
};

uint32_t seed() {
  static const uint32_t value = std::random_device{}();
  return value;
}

TEST_CASE("records come out as they went in, over many laps and with every length") {
  Ring ring;
  std::mt19937 random(seed());
  CAPTURE(seed());
  struct Sent {
    RecordKind kind;
    uint32_t immediate;
    uint64_t remote;
    std::vector<unsigned char> payload;
  };
  std::deque<Sent> under_way;
  size_t received = 0;
  for (int step = 0; step < 200'000; ++step) {
    if (random() % 2) {
      const auto kind = static_cast<RecordKind>(2 + random() % 4);
      const size_t length = kind == RecordKind::kImmediate ? 0 : random() % 900;
      Sent sent{kind, static_cast<uint32_t>(random()), random(), {}};
      std::byte* place = ring.producer.add(kind, length, sent.immediate, {7, sent.remote});
      if (place) {
        for (size_t i = 0; i < length; ++i) sent.payload.push_back(static_cast<unsigned char>(random()));
        if (length > 0) std::memcpy(place, sent.payload.data(), length);
        under_way.push_back(std::move(sent));
      }
      if (random() % 4 == 0) ring.producer.publish();
    } else {
      RingConsumer::Record record;
      const auto next = ring.consumer.next(&record);
      CHECK(next != RingConsumer::Next::kGarbage);
      if (next == RingConsumer::Next::kRecord) {
        REQUIRE(!under_way.empty());
        const Sent& sent = under_way.front();
        REQUIRE(record.head.kind() == sent.kind);
        CHECK(record.head.immediate == sent.immediate);
        REQUIRE(record.head.length() == sent.payload.size());
        if (!sent.payload.empty()) CHECK(std::memcmp(record.payload, sent.payload.data(), sent.payload.size()) == 0);
        if (sent.kind == RecordKind::kWrite) CHECK(record.target.remote == sent.remote);
        under_way.pop_front();
        ++received;
      }
      if (random() % 3 == 0) {
        ring.consumer.finish();
        CHECK(ring.producer.look());
      }
    }
  }
  CHECK(received > 10'000);
}

TEST_CASE("a refused write is told from one that was not") {
  Ring ring;
  std::vector<uint64_t> at;
  for (int i = 0; i < 3; ++i) {
    REQUIRE(ring.producer.add(RecordKind::kWrite, 8));
    at.push_back(ring.producer.last_at());
  }
  ring.producer.publish();
  RingConsumer::Record record;
  for (int i = 0; i < 3; ++i) {
    REQUIRE(ring.consumer.next(&record) == RingConsumer::Next::kRecord);
    if (i == 1) ring.consumer.refuse();
  }
  ring.consumer.finish();
  REQUIRE(ring.producer.look());
  CHECK(ring.producer.consumed() == ring.producer.added());
  CHECK(!ring.producer.refused(at[0]));
  CHECK(ring.producer.refused(at[1]));
  CHECK(!ring.producer.refused(at[2]));
}

TEST_CASE("a full ring takes no more, and all again once it is empty") {
  Ring ring;
  size_t taken = 0;
  while (ring.producer.add(RecordKind::kImmediate, 0)) ++taken;
  CHECK(taken == kCapacity / sizeof(RecordHead));
  ring.producer.publish();
  RingConsumer::Record record;
  while (ring.consumer.next(&record) == RingConsumer::Next::kRecord) --taken;
  CHECK(taken == 0);
  ring.consumer.finish();
  CHECK(ring.producer.look());
  CHECK(ring.producer.add(RecordKind::kMessage, kCapacity - 64) != nullptr);
}

TEST_CASE("another version, another size and no ring at all are told") {
  Ring ring;
  std::string why;
  ring.producer.header().version = kRingVersion + 1;
  CHECK(!RingConsumer::check(ring.memory, kCapacity, &why));
  CHECK(why.find("version") != std::string::npos);
  ring.producer.header().version = kRingVersion;
  CHECK(!RingConsumer::check(ring.memory, 2 * kCapacity, &why));
  ring.producer.header().magic = 1;
  CHECK(!RingConsumer::check(ring.memory, kCapacity, &why));
}

// Whatever a hostile producer writes anywhere, at any time: the consumer stays within the ring, and ends.
TEST_CASE("a million steps of a consumer whose producer scribbles") {
  std::mt19937_64 random(seed());
  CAPTURE(seed());
  size_t records = 0, garbage = 0;
  for (int round = 0; round < 2000; ++round) {
    Ring ring;
    std::byte* data = ring.memory + kRingDataOffset;
    for (size_t i = 0; i < kCapacity; i += 8) {
      // Mostly what could be the head of a record.
      const bool plausible = random() % 16 != 0;
      const RecordHead head{plausible
                                ? static_cast<uint32_t>(2 + random() % 4) << 24 | static_cast<uint32_t>(random() % 300)
                                : static_cast<uint32_t>(random()),
                            0};
      std::memcpy(data + i, &head, sizeof head);
    }
    RingHeader& header = ring.producer.header();
    uint64_t head = 0;
    for (int step = 0; step < 500; ++step) {
      switch (random() % 8) {
        case 0:
          header.head.store(random());  // anything
          break;
        case 1:
          header.head.store(head + kCapacity + 8);
          break;
        case 2:
          header.head.store(head - 8);
          break;
        case 3: {  // a head that could be, somewhere
          const RecordHead one{static_cast<uint32_t>(random() % 8) << 24 | static_cast<uint32_t>(random() % 6000), 1};
          std::memcpy(data + random() % (kCapacity / 8) * 8, &one, sizeof one);
          break;
        }
        default:
          head += 8 * (random() % 64);
          header.head.store(head);
      }
      RingConsumer::Record record;
      const auto next = ring.consumer.next(&record);
      if (next == RingConsumer::Next::kRecord) {
        ++records;
        REQUIRE(record.payload >= data);
        REQUIRE(record.payload + record.head.length() <= data + kCapacity);
        if (random() % 2) ring.consumer.refuse();
      }
      if (next == RingConsumer::Next::kGarbage) ++garbage;
      if (random() % 4 == 0) ring.consumer.finish();
      header.tail.store(random());                      // it is not read back
      if (next == RingConsumer::Next::kGarbage) break;  // a NIC gives the link up
    }
  }
  CHECK(records > 100);
  CHECK(garbage > 1000);
}

TEST_CASE("a million steps of a producer whose consumer scribbles") {
  std::mt19937_64 random(seed());
  CAPTURE(seed());
  size_t caught = 0;
  for (int round = 0; round < 2000; ++round) {
    Ring ring;
    std::byte* data = ring.memory + kRingDataOffset;
    RingHeader& header = ring.producer.header();
    for (int step = 0; step < 500; ++step) {
      const size_t length = random() % 600;
      const auto kind = static_cast<RecordKind>(2 + random() % 4);
      if (std::byte* place = ring.producer.add(kind, length)) {
        REQUIRE(place >= data);
        REQUIRE(place + length <= data + kCapacity);
        std::memset(place, 1, length);
      }
      ring.producer.publish();
      header.head.store(random());  // nor is this
      switch (random() % 4) {
        case 0:
          header.tail.store(random());
          break;
        case 1:
          header.tail.store(ring.producer.consumed() + 8 * (random() % 100));
          break;
        default:
          header.tail.store(ring.producer.added());
      }
      if (!ring.producer.look()) {
        ++caught;
        break;
      }
      (void)ring.producer.refused(random() % 8 * 8);
    }
  }
  CHECK(caught > 1000);
}

}  // namespace
}  // namespace railwire
