// What shm NICs say to each other besides the rings: the address that a user carries to a peer, and the packets over
// the unix socket. All are of one size, and of this version.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace railwire {

inline constexpr uint32_t kHostMagic = 0x48575231;
inline constexpr uint16_t kHostVersion = 1;  // of everything here, and of the sizes of the rings

using HostToken = std::array<std::byte, 16>;  // random: names a NIC, or a link
HostToken random_token();
std::string to_hex(const HostToken& token);

// NIC address.
struct HostAddress {
  uint32_t magic = kHostMagic;
  uint16_t version = kHostVersion;
  uint16_t reserved = 0;
  HostToken name{};
  uint64_t probe = 0;   // where in its process the name stands
  uint64_t kernel = 0;  // tells running kernels apart
  uint64_t pid = 0;     // as it sees itself; for people
};
// Link address.
struct HostLinkAddress {
  HostAddress nic;
  HostToken token{};
};

struct HostFrame {
  enum Type : uint16_t {
    kHello = 1,   // `from`: my NIC's name. With the ring of my messages.
    kLink,        // `from`: my link, `to`: yours. With the ring of what I post, and the table of my regions.
    kWantMemory,  // `to`: your link, `rkey`: map this region of yours for me
    kHaveMemory,  // `to`: your link, `rkey`, `offset`, `length`: here it is. With the memfd.
    kGoneMemory,  // `to`: your link, `rkey`: it is no more, unmap it
    // On a socket of its own. `rkey`: give me the descriptors of this region of yours, on a GPU, from chunk `offset`
    // on. The answer is one kHaveGpuMemory for each of some chunks, with its descriptor and `length`, and one without:
    // how many there are in all.
    kWantGpuMemory,
    kHaveGpuMemory,
  };
  uint32_t magic = kHostMagic;
  uint16_t version = kHostVersion;
  uint16_t type = 0;
  HostToken from{}, to{};
  uint64_t rkey = 0, offset = 0, length = 0;
};
// A packet of one byte is a bell: look at the rings.

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}
template <class T>
std::vector<std::byte> pack(const T& value) {
  const auto bytes = bytes_of(value);
  return {bytes.begin(), bytes.end()};
}

inline constexpr size_t kLinkRingBytes = 128 << 10;
inline constexpr size_t kMessageRingBytes = 144 << 10;  // any message fits behind any pad
inline constexpr uint32_t kLongestMessage = 65536;
inline constexpr uint32_t kLongestInline = 8192;  // writes up to so many bytes go through the ring

}  // namespace railwire
