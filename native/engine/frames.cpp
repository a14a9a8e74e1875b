// Parsing of control frames; nothing in them is trusted.
#include "engine/frames.h"

#include <algorithm>

namespace railwire {

std::string FrameReader::text(size_t most) const {
  std::string out;
  for (size_t i = 0; i < std::min(most, data_.size()); ++i) {
    const char c = static_cast<char>(data_[i]);
    out.push_back(c >= 32 && c < 127 ? c : '?');
  }
  return out;
}

std::optional<Frame> parse_frame(std::span<const std::byte> data) {
  if (data.size() < kFrameHeaderBytes) return std::nullopt;
  FrameReader reader(data);
  if (reader.get<uint32_t>() != kFrameMagic) return std::nullopt;
  const auto type = reader.get<uint8_t>();
  if (type == 0 || type > kLastFrameType) return std::nullopt;
  Frame frame;
  frame.header.type = static_cast<FrameType>(type);
  const auto role = reader.get<uint8_t>();
  if (role > 1) return std::nullopt;
  frame.header.to_initiator = role == 1;
  frame.header.link = reader.get<uint16_t>();
  frame.header.connection = reader.get<uint64_t>();
  frame.header.ack = reader.get<uint64_t>();
  if (reader.get<uint32_t>() != 0) return std::nullopt;
  frame.payload = reader.rest();
  return frame;
}

void set_frame_ack(std::vector<std::byte>& frame, uint64_t ack) { std::memcpy(frame.data() + 16, &ack, sizeof ack); }

std::optional<Record> parse_record(std::span<const std::byte> payload) {
  if (payload.size() < kRecordHeaderBytes) return std::nullopt;
  FrameReader reader(payload);
  Record record;
  record.sequence = reader.get<uint64_t>();
  const auto type = reader.get<uint8_t>();
  if (type == 0 || type > kLastRecordType || record.sequence == 0) return std::nullopt;
  record.type = static_cast<RecordType>(type);
  record.body = reader.rest();
  return record;
}

}  // namespace railwire
