// Sockets of the tcp NIC: how they are named, opened and set.
#pragma once

#include <unistd.h>

#include <map>
#include <string>
#include <utility>

#include "nic/tcp_wire.h"

namespace railwire {

class TcpFd {
 public:
  TcpFd() = default;
  explicit TcpFd(int fd) : fd_(fd) {}
  TcpFd(TcpFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  TcpFd& operator=(TcpFd&& other) noexcept {
    reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~TcpFd() { reset(); }
  void reset(int fd = -1) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// What the user asks for.
struct TcpSpec {
  std::string text;  // as the user named the NIC
  TcpEnd end;        // where it listens; port 0: the kernel chooses
  uint32_t link_depth = 4096;
  uint32_t streams = 1;        // links per pair of NICs
  uint32_t socket_buffer = 0;  // bytes, each way; 0: the kernel sizes them by bandwidth and delay
  uint32_t timeout_ms = 4000;  // that sent bytes may stay unacknowledged, and a connection may take to be made
};
// May ask the resolver. Throws NicError.
TcpSpec parse_tcp_spec(const std::string& text, const std::map<std::string, std::string>& options);

// Listens, and puts the port into `spec.end`. Throws NicError.
TcpFd listen_tcp(TcpSpec& spec);
// Begins a connection from our address; errno tells what is wrong if there is none.
TcpFd dial_tcp(const TcpSpec& spec, TcpEnd to);
void set_up_tcp(int fd, const TcpSpec& spec);
int socket_error(int fd);

}  // namespace railwire
