// Control frames: the small messages that engines exchange over the NICs' control endpoints.
//
//   frame  = magic u32 | type u8 | to_initiator u8 | link u16 | connection u64 | ack u64 | payload     (little endian)
//   RECORD payload = sequence u64 | record type u8 | body
//
// PING, PONG, ACK and GONE may be lost; records are sent again until acknowledged and are taken in order, once.
// HANDSHAKE payloads belong to Python (railwire/handshake.py). Everything here comes from the network: a reader never
// reads past its end, and a frame that does not parse is dropped and counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace railwire {

inline constexpr uint32_t kFrameMagic = 0x31525752;  // "RWR1"
inline constexpr size_t kFrameHeaderBytes = 28;
inline constexpr size_t kRecordHeaderBytes = 9;

enum class FrameType : uint8_t { kHandshake = 1, kPing, kPong, kAck, kGone, kRecord };
inline constexpr uint8_t kLastFrameType = static_cast<uint8_t>(FrameType::kRecord);

enum class RecordType : uint8_t {
  kMessage = 1,  // the user's bytes: all, or the last of those that did not fit into one record
  kPoison,       // id u32 | text: a write to this counter failed or was cancelled
  // link u16, generation u32, immediates u64 (that landed here through it): I have closed my half; close yours and say
  // so
  kLinkDown,
  kLinkClosed,  // the same three: nothing of yours can land through this link any more
  kRevoke,      // region u64, request u64: stop writing to this region and confirm
  kRevoked,     // request u64
  kClose,       // stop writing to me altogether, close your halves and confirm
  kClosed,
  kCredit,       // total u64: bytes of messages that the user has taken so far
  kLinkOffer,    // link u16, generation u32, address: my new half of a link that is closed at both ends
  kLinkAnswer,   // the same: mine, connected to yours; without an address: not now
  kLinkReady,    // link u16, generation u32: connected; write
  kMessagePart,  // the next bytes of a message that is longer than the NICs between us carry in one
};
inline constexpr uint8_t kLastRecordType = static_cast<uint8_t>(RecordType::kMessagePart);
inline constexpr size_t kMaxMessageBytes = 60 * 1024;  // of the user, in however many records

struct FrameHeader {
  FrameType type = FrameType::kPing;
  bool to_initiator = false;  // which end of the connection it is for (an engine may be connected to itself)
  uint16_t link = 0;
  uint64_t connection = 0;
  uint64_t ack = 0;  // all records up to this sequence number have been taken
};

class FrameWriter {
 public:
  explicit FrameWriter(const FrameHeader& header) {
    bytes_.reserve(64);
    put<uint32_t>(kFrameMagic);
    put<uint8_t>(static_cast<uint8_t>(header.type));
    put<uint8_t>(header.to_initiator);
    put<uint16_t>(header.link);
    put<uint64_t>(header.connection);
    put<uint64_t>(header.ack);
    put<uint32_t>(0);  // reserved
  }
  template <class T>
  FrameWriter& put(T value) {
    const auto* p = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), p, p + sizeof value);
    return *this;
  }
  FrameWriter& put_bytes(std::span<const std::byte> data) {
    bytes_.insert(bytes_.end(), data.begin(), data.end());
    return *this;
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

// Reads values off the front; after the first read past the end everything is zero and ok() is false.
class FrameReader {
 public:
  explicit FrameReader(std::span<const std::byte> data) : data_(data) {}
  template <class T>
  T get() {
    T value{};
    if (data_.size() < sizeof value) {
      ok_ = false;
      data_ = {};
      return value;
    }
    std::memcpy(&value, data_.data(), sizeof value);
    data_ = data_.subspan(sizeof value);
    return value;
  }
  std::span<const std::byte> rest() const { return data_; }
  // At most `most` characters of what is left, with anything unprintable replaced.
  std::string text(size_t most) const;
  bool ok() const { return ok_; }

 private:
  std::span<const std::byte> data_;
  bool ok_ = true;
};

struct Frame {
  FrameHeader header;
  std::span<const std::byte> payload;
};
std::optional<Frame> parse_frame(std::span<const std::byte> data);

// Overwrites the acknowledgement of an encoded frame, so that a record sent again carries the newest one.
void set_frame_ack(std::vector<std::byte>& frame, uint64_t ack);

struct Record {
  uint64_t sequence = 0;
  RecordType type = RecordType::kMessage;
  std::span<const std::byte> body;
};
std::optional<Record> parse_record(std::span<const std::byte> payload);

}  // namespace railwire
