// Messages that are longer than a packet, in pieces: for NICs whose control endpoint takes packets only (UD queue
// pairs, EFA's SRD without libfabric's protocol over it). Pieces come in any order; one that is lost loses its message,
// and the engine repeats what must arrive. What comes from the network is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace railwire {

inline constexpr uint32_t kLongestMessage = 65536;
inline constexpr uint32_t kMostPieces = 256;  // of a message

// In front of every piece; little endian, as all of Railwire's frames.
struct PieceHeader {
  uint32_t magic = 0x31565752;  // "RWV1"
  uint32_t message = 0;
  uint64_t sender = 0;  // random: tells messages of one sender from another's
  uint16_t index = 0;
  uint16_t count = 0;
  uint32_t offset = 0;
  uint32_t total = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(PieceHeader) == 32);

inline size_t pieces_of(size_t bytes, uint32_t payload) { return bytes == 0 ? 1 : (bytes + payload - 1) / payload; }

// Writes piece `index` of the message to `to`, and returns how long it is.
size_t write_piece(std::byte* to, std::span<const std::byte> message, uint64_t sender, uint32_t number, size_t index,
                   uint32_t payload);

// Makes messages whole. What has been begun is bounded: the oldest goes when there is too much.
class PieceAssembler {
 public:
  enum Taken : uint8_t {
    kNothing,    // a part of something, a repetition, or no piece of ours
    kInPlace,    // `message` lies in the packet
    kAssembled,  // `message` lies here, until let_go()
  };
  Taken take(std::span<const std::byte> packet, std::span<const std::byte>& message);
  void let_go() { lent_.clear(); }

 private:
  struct Partial {
    std::vector<std::byte> bytes;
    std::vector<bool> seen;
    size_t missing = 0;
    uint64_t since = 0;
  };
  std::map<std::pair<uint64_t, uint32_t>, Partial> partials_;  // by sender and message
  uint64_t made_ = 0;
  std::deque<std::vector<std::byte>> lent_;
};

}  // namespace railwire
