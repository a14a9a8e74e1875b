// Packing and checking of addresses.
#include "nic/tcp_wire.h"

#include <arpa/inet.h>
#include <sys/random.h>

#include <cstring>

#include "nic/nic.h"

namespace railwire {
namespace {

constexpr size_t kHostBytes = 16;
constexpr size_t kPlainBytes = 2 + 1 + 1 + 2 + kHostBytes;  // version, family (4 or 6), a zero, port, host

const in6_addr& host_of_6(const TcpEnd& end) { return reinterpret_cast<const sockaddr_in6&>(end.storage).sin6_addr; }
const in_addr& host_of_4(const TcpEnd& end) { return reinterpret_cast<const sockaddr_in&>(end.storage).sin_addr; }

}  // namespace

TcpToken random_tcp_token() {
  TcpToken token;
  if (getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) {
    throw NicError("tcp: the kernel gives no random bytes");
  }
  return token;
}

uint16_t TcpEnd::port() const {
  return ntohs(reinterpret_cast<const sockaddr_in&>(storage).sin_port);  // lies alike in both kinds
}

void TcpEnd::set_port(uint16_t port) { reinterpret_cast<sockaddr_in&>(storage).sin_port = htons(port); }

bool TcpEnd::is_wildcard() const {
  if (family() == AF_INET6) return IN6_IS_ADDR_UNSPECIFIED(&host_of_6(*this));
  return host_of_4(*this).s_addr == INADDR_ANY;
}

bool TcpEnd::is_link_local() const { return family() == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&host_of_6(*this)); }

std::string TcpEnd::host() const {
  char text[INET6_ADDRSTRLEN] = "?";
  if (family() == AF_INET6) {
    inet_ntop(AF_INET6, &host_of_6(*this), text, sizeof text);
  } else {
    inet_ntop(AF_INET, &host_of_4(*this), text, sizeof text);
  }
  return text;
}

std::string TcpEnd::text() const {
  const std::string name = family() == AF_INET6 ? "[" + host() + "]" : host();
  return name + ":" + std::to_string(port());
}

std::vector<std::byte> pack_tcp_address(const TcpEnd& end, const TcpToken* token) {
  std::vector<std::byte> blob(kPlainBytes + (token ? sizeof *token : 0));
  const uint16_t version = kTcpVersion, port = end.port();
  std::memcpy(blob.data(), &version, sizeof version);
  blob[2] = std::byte{end.family() == AF_INET6 ? uint8_t{6} : uint8_t{4}};
  std::memcpy(blob.data() + 4, &port, sizeof port);
  if (end.family() == AF_INET6) {
    std::memcpy(blob.data() + 6, &host_of_6(end), sizeof(in6_addr));
  } else {
    std::memcpy(blob.data() + 6, &host_of_4(end), sizeof(in_addr));
  }
  if (token) std::memcpy(blob.data() + kPlainBytes, token->data(), sizeof *token);
  return blob;
}

TcpEnd unpack_tcp_address(std::span<const std::byte> blob, TcpToken* token, const std::string& name) {
  uint16_t version = 0, port = 0;
  if (blob.size() >= sizeof version) std::memcpy(&version, blob.data(), sizeof version);
  if (version != kTcpVersion && version > 0 && version < 256) {
    throw NicError(name + ": the peer speaks version " + std::to_string(version) + " of Railwire's tcp, we speak " +
                   std::to_string(kTcpVersion) + "; both sides need the same release of railwire");
  }
  const bool fits = version == kTcpVersion && blob.size() == kPlainBytes + (token ? sizeof *token : 0);
  const auto family = fits ? std::to_integer<int>(blob[2]) : 0;
  if (fits) std::memcpy(&port, blob.data() + 4, sizeof port);
  if ((family != 4 && family != 6) || blob[3] != std::byte{0} || port == 0) {
    throw NicError(name + ": malformed address of a peer's tcp NIC");
  }
  TcpEnd end;
  if (family == 6) {
    auto& address = reinterpret_cast<sockaddr_in6&>(end.storage);
    address.sin6_family = AF_INET6;
    std::memcpy(&address.sin6_addr, blob.data() + 6, sizeof address.sin6_addr);
    end.length = sizeof address;
  } else {
    auto& address = reinterpret_cast<sockaddr_in&>(end.storage);
    address.sin_family = AF_INET;
    std::memcpy(&address.sin_addr, blob.data() + 6, sizeof address.sin_addr);
    end.length = sizeof address;
  }
  end.set_port(port);
  if (end.is_wildcard()) throw NicError(name + ": malformed address of a peer's tcp NIC: it names no host");
  if (token) std::memcpy(token->data(), blob.data() + kPlainBytes, sizeof *token);
  return end;
}

}  // namespace railwire
