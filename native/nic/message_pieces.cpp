#include "nic/message_pieces.h"

#include <algorithm>
#include <cstring>

namespace railwire {
namespace {

constexpr size_t kMostPartials = 64;

}  // namespace

size_t write_piece(std::byte* to, std::span<const std::byte> message, uint64_t sender, uint32_t number, size_t index,
                   uint32_t payload) {
  PieceHeader header;
  header.message = number;
  header.sender = sender;
  header.index = static_cast<uint16_t>(index);
  header.count = static_cast<uint16_t>(pieces_of(message.size(), payload));
  header.offset = static_cast<uint32_t>(index * payload);
  header.total = static_cast<uint32_t>(message.size());
  const auto part = message.subspan(header.offset, std::min<size_t>(payload, message.size() - header.offset));
  std::memcpy(to, &header, sizeof header);
  if (!part.empty()) std::memcpy(to + sizeof header, part.data(), part.size());
  return sizeof header + part.size();
}

PieceAssembler::Taken PieceAssembler::take(std::span<const std::byte> packet, std::span<const std::byte>& message) {
  PieceHeader header;
  if (packet.size() < sizeof header) return kNothing;
  std::memcpy(&header, packet.data(), sizeof header);
  const auto part = packet.subspan(sizeof header);
  const bool sound = header.magic == PieceHeader{}.magic && header.count >= 1 && header.count <= kMostPieces &&
                     header.index < header.count && header.total <= kLongestMessage && header.offset <= header.total &&
                     part.size() <= header.total - header.offset;
  if (!sound) return kNothing;
  if (header.count == 1) {
    if (part.size() != header.total) return kNothing;
    message = part;
    return kInPlace;
  }
  const std::pair key(header.sender, header.message);
  auto found = partials_.find(key);
  if (found == partials_.end()) {
    if (partials_.size() >= kMostPartials) {
      partials_.erase(std::min_element(partials_.begin(), partials_.end(),
                                       [](const auto& a, const auto& b) { return a.second.since < b.second.since; }));
    }
    found = partials_.emplace(key, Partial{}).first;
    found->second.bytes.resize(header.total);
    found->second.seen.resize(header.count);
    found->second.missing = header.count;
    found->second.since = ++made_;
  }
  Partial& partial = found->second;
  if (partial.bytes.size() != header.total || partial.seen.size() != header.count || partial.seen[header.index]) {
    return kNothing;  // a lie, or a repetition
  }
  if (!part.empty()) std::memcpy(partial.bytes.data() + header.offset, part.data(), part.size());
  partial.seen[header.index] = true;
  if (--partial.missing > 0) return kNothing;
  lent_.push_back(std::move(partial.bytes));
  partials_.erase(found);
  message = lent_.back();
  return kAssembled;
}

}  // namespace railwire
