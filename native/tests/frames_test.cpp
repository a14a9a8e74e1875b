// Control frames: what is written is read back, and no bytes from the network do harm.
#include "engine/frames.h"

#include <doctest/doctest.h>

#include <random>

using namespace railwire;

TEST_CASE("a frame is read back as it was written") {
  const auto bytes =
      FrameWriter({.type = FrameType::kRecord, .to_initiator = true, .link = 3, .connection = 99, .ack = 7})
          .put<uint64_t>(12)
          .put<uint8_t>(static_cast<uint8_t>(RecordType::kRevoke))
          .put<uint32_t>(5)
          .take();
  const auto frame = parse_frame(bytes);
  REQUIRE(frame);
  CHECK(frame->header.type == FrameType::kRecord);
  CHECK(frame->header.to_initiator);
  CHECK(frame->header.link == 3);
  CHECK(frame->header.connection == 99);
  CHECK(frame->header.ack == 7);
  const auto record = parse_record(frame->payload);
  REQUIRE(record);
  CHECK(record->sequence == 12);
  CHECK(record->type == RecordType::kRevoke);
  FrameReader reader(record->body);
  CHECK(reader.get<uint32_t>() == 5);
  CHECK(reader.ok());
  CHECK(reader.get<uint16_t>() == 0);
  CHECK_FALSE(reader.ok());
}

TEST_CASE("set_frame_ack changes the acknowledgement alone") {
  auto bytes = FrameWriter({.type = FrameType::kPing, .link = 1, .connection = 5, .ack = 1}).take();
  set_frame_ack(bytes, 1234567890123);
  const auto frame = parse_frame(bytes);
  REQUIRE(frame);
  CHECK(frame->header.ack == 1234567890123);
  CHECK(frame->header.connection == 5);
}

TEST_CASE("garbage and mutilated frames are refused or harmless") {
  std::mt19937_64 random(3);
  const auto good = FrameWriter({.type = FrameType::kRecord, .connection = 1}).put<uint64_t>(1).put<uint8_t>(1).take();
  for (int i = 0; i < 200000; ++i) {
    std::vector<std::byte> bytes = good;
    if (i % 2) {
      bytes.resize(random() % 64);
      for (auto& b : bytes) b = static_cast<std::byte>(random());
    } else {
      bytes.resize(random() % (good.size() + 1));
      if (!bytes.empty()) bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    if (const auto frame = parse_frame(bytes)) {
      CHECK(frame->payload.size() == bytes.size() - kFrameHeaderBytes);
      if (const auto record = parse_record(frame->payload)) CHECK(record->sequence != 0);
    }
  }
}
