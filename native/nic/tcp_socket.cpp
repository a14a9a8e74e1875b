// Names, listening and dialling.
#include "nic/tcp_socket.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "nic/network.h"
#include "nic/nic.h"

namespace railwire {
namespace {

constexpr int kBacklog = 1024;
constexpr int kKeepIdle = 10, kKeepEvery = 5, kKeepCount = 3;  // s, s: what keeps a middlebox from forgetting us

[[noreturn]] void bad(const std::string& spec, const std::string& why) {
  throw NicError("NIC \"" + spec + "\": " + why);
}

uint32_t number_option(const TcpSpec& spec, const std::map<std::string, std::string>& options, const std::string& name,
                       uint32_t otherwise, uint32_t least, uint32_t most) {
  const auto option = options.find(name);
  if (option == options.end()) return otherwise;
  const std::string& text = option->second;
  uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most) {
    bad(spec.text,
        "option " + name + " is \"" + text + "\"; it must be " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

// HOST and PORT of "tcp://HOST[:PORT]", with an IPv6 address in brackets.
std::pair<std::string, uint16_t> split(const std::string& text) {
  const std::string form = "write tcp://HOST[:PORT], with an IPv6 address in brackets";
  if (!text.starts_with("tcp://")) bad(text, form);
  std::string host, rest = text.substr(6);
  if (rest.starts_with('[')) {
    const size_t end = rest.find(']');
    if (end == std::string::npos) bad(text, form);
    host = rest.substr(1, end - 1);
    rest = rest.substr(end + 1);
  } else {
    const size_t colon = rest.find(':');
    host = rest.substr(0, colon);
    rest = colon == std::string::npos ? "" : rest.substr(colon);
  }
  if (host.empty()) bad(text, "the host is missing; " + form);
  uint32_t port = 0;
  if (!rest.empty()) {
    const auto [end, error] = std::from_chars(rest.data() + 1, rest.data() + rest.size(), port);
    if (rest[0] != ':' || error != std::errc() || end != rest.data() + rest.size() || port > 65535) {
      bad(text, "\"" + rest + "\" is not a port (1 to 65535); " + form);
    }
  }
  return {host, static_cast<uint16_t>(port)};
}

TcpEnd look_up(const std::string& spec, const std::string& host) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (error != 0 || !found) {
    bad(spec, "there is no host \"" + host + "\": " + (error ? gai_strerror(error) : "no address") +
                  "; name an address of this machine (`railwire doctor` lists them)");
  }
  TcpEnd end;
  std::memcpy(&end.storage, found->ai_addr, found->ai_addrlen);
  end.length = found->ai_addrlen;
  freeaddrinfo(found);
  return end;
}

void set(int fd, int level, int option, int value) { setsockopt(fd, level, option, &value, sizeof value); }

}  // namespace

TcpSpec parse_tcp_spec(const std::string& text, const std::map<std::string, std::string>& options) {
  TcpSpec spec;
  spec.text = text;
  const auto [host, port] = text == "tcp" ? std::pair(default_host(), uint16_t{0}) : split(text);
  spec.end = look_up(text, host);
  // Peers are to be told where to connect to, which a wildcard does not say.
  if (spec.end.is_wildcard()) spec.end = look_up(text, default_host(spec.end.family() == AF_INET6));
  spec.end.set_port(port);
  spec.link_depth = number_option(spec, options, "link_depth", spec.link_depth, 1, 16384);
  spec.streams = number_option(spec, options, "streams", spec.streams, 1, 16);
  spec.socket_buffer = number_option(spec, options, "socket_buffer", 0, 4096, 1u << 30);
  spec.timeout_ms = number_option(spec, options, "timeout_ms", spec.timeout_ms, 100, 600'000);
  return spec;
}

void set_up_tcp(int fd, const TcpSpec& spec) {
  set(fd, IPPROTO_TCP, TCP_NODELAY, 1);  // what belongs together is sent together
  set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdle);
  set(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepEvery);
  set(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepCount);
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(spec.timeout_ms));
  if (spec.socket_buffer) {
    set(fd, SOL_SOCKET, SO_SNDBUF, static_cast<int>(spec.socket_buffer));
    set(fd, SOL_SOCKET, SO_RCVBUF, static_cast<int>(spec.socket_buffer));
  }
}

TcpFd listen_tcp(TcpSpec& spec) {
  TcpFd fd(socket(spec.end.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const std::string where = spec.end.port() ? spec.end.text() : spec.end.host();
  if (!fd) bad(spec.text, std::string("cannot open a socket: ") + std::strerror(errno));
  set(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);  // a port is free as soon as its owner has ended
  if (spec.end.family() == AF_INET6) set(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 1);
  set_up_tcp(fd.get(), spec);  // which accepted connections inherit
  if (bind(fd.get(), spec.end.get(), spec.end.length) != 0 || listen(fd.get(), kBacklog) != 0) {
    const int error = errno;
    std::string why = "cannot listen on " + where + ": " + std::strerror(error);
    if (error == EADDRNOTAVAIL) why += "; this machine has no such address (`railwire doctor` lists them)";
    if (error == EADDRINUSE) why += "; the port is taken: choose another, or leave it out";
    if (error == EACCES) why += "; ports below 1024 need a privilege: choose another, or leave it out";
    bad(spec.text, why);
  }
  spec.end.length = sizeof spec.end.storage;
  if (getsockname(fd.get(), spec.end.get(), &spec.end.length) != 0) {
    bad(spec.text, std::string("asking for the port: ") + std::strerror(errno));
  }
  return fd;
}

TcpFd dial_tcp(const TcpSpec& spec, TcpEnd to) {
  TcpFd fd(socket(to.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return fd;
  set_up_tcp(fd.get(), spec);
  if (to.family() == spec.end.family()) {
    // From our own address: so the bytes go over the interface that was named.
    TcpEnd from = spec.end;
    from.set_port(0);
    set(fd.get(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    if (bind(fd.get(), from.get(), from.length) != 0) return {};
    if (to.is_link_local()) {  // the scope is the host's own number of an interface
      reinterpret_cast<sockaddr_in6&>(to.storage).sin6_scope_id =
          reinterpret_cast<const sockaddr_in6&>(spec.end.storage).sin6_scope_id;
    }
  }
  if (::connect(fd.get(), to.get(), to.length) != 0 && errno != EINPROGRESS) return {};
  return fd;
}

int socket_error(int fd) {
  int error = 0;
  socklen_t length = sizeof error;
  return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}

}  // namespace railwire
