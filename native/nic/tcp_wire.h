// The bytes of the tcp NIC: addresses, the first bytes of a connection, and the frames of a link. Little endian.
//
// A connection begins with a hello of whoever dialled. Behind that of a control connection come messages, each with its
// length before it, one way. Behind that of a link come frames, both ways:
//
//   kWork      `count` entries, then `payload` bytes: of all its writes, in order
//   kLanded    nothing
//   kReadData  `payload` bytes of the oldest read that is not answered yet; `count` 1: the last of it
//   kRefused   nothing, and nothing after it. The work request behind those that `landed` counts may not touch what it
//              names; with kOfRead it is the oldest read that is not answered yet
//
// Each says in `landed` how many work requests of the other half have been served: writes that lie in memory, and reads
// that have been taken in. An entry is a work request, or a piece of a long one (kMore: there are more).
#pragma once

#include <netinet/in.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace railwire {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

inline constexpr uint16_t kTcpVersion = 1;
inline constexpr size_t kTcpMostEntries = 512;          // of one frame
inline constexpr uint32_t kTcpLongestFrame = 1u << 20;  // bytes of payload, so that what is short waits for little
inline constexpr uint32_t kTcpLongestWrite = 1u << 30;  // and read
inline constexpr uint32_t kTcpLongestMessage = 65536;

struct TcpFrame {
  enum Type : uint8_t { kWork = 1, kLanded, kReadData, kRefused };
  enum Flags : uint8_t { kOfRead = 1 };
  uint8_t type = 0;
  uint8_t flags = 0;
  uint16_t count = 0;
  uint32_t payload = 0;
  uint64_t landed = 0;
};
static_assert(sizeof(TcpFrame) == 16);

struct TcpEntry {
  enum Flags : uint32_t { kRead = 1, kImmediate = 2, kMore = 4 };
  uint64_t rkey = 0;
  uint64_t offset = 0;
  uint32_t length = 0;
  uint32_t immediate = 0;
  uint32_t flags = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(TcpEntry) == 32);

using TcpToken = std::array<std::byte, 16>;  // random: who knows it was told
TcpToken random_tcp_token();

struct TcpHello {
  static constexpr uint64_t kMagic = 0x0a5043542d4c5752;  // "RWL-TCP\n"
  enum Kind : uint16_t { kControl = 1, kLink = 2 };
  uint64_t magic = kMagic;
  uint16_t version = kTcpVersion;
  uint16_t kind = kControl;
  uint32_t reserved = 0;
  TcpToken to{}, from{};  // of the two halves of a link
};
static_assert(sizeof(TcpHello) == 48);

// An address of a socket, IPv4 or IPv6.
struct TcpEnd {
  sockaddr_storage storage{};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  uint16_t port() const;
  void set_port(uint16_t port);
  bool is_wildcard() const;
  bool is_link_local() const;
  std::string host() const;  // without a port or brackets
  std::string text() const;  // "10.0.0.1:7000", "[fd00::2]:7000"
};

// Of the control endpoint: without a token. Of a link: with its half's.
std::vector<std::byte> pack_tcp_address(const TcpEnd& end, const TcpToken* token = nullptr);
// Throws NicError, which begins with `name`, unless the bytes are such an address.
TcpEnd unpack_tcp_address(std::span<const std::byte> blob, TcpToken* token, const std::string& name);

}  // namespace railwire
