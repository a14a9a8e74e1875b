#include "nic/host_socket.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/nic.h"

namespace railwire {
namespace {

constexpr int kBacklog = 4096;

socklen_t abstract_address(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  const size_t length = std::min(name.size(), sizeof address->sun_path - 1);
  std::memcpy(address->sun_path + 1, name.data(), length);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
}

UniqueFd open_socket() { return UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

}  // namespace

HostSocket HostSocket::listen(const std::string& name) {
  UniqueFd fd = open_socket();
  sockaddr_un address;
  const socklen_t length = abstract_address(name, &address);
  if (!fd || ::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      ::listen(fd.get(), kBacklog) != 0) {
    throw NicError(std::string("shm: cannot listen on a unix socket: ") + std::strerror(errno) +
                   "; check ulimit -n, and that the sandbox allows AF_UNIX");
  }
  return HostSocket(std::move(fd));
}

int HostSocket::dial(const std::string& name, int patience_ms, HostSocket* out) {
  UniqueFd fd = open_socket();
  if (!fd) return errno;
  sockaddr_un address;
  const socklen_t length = abstract_address(name, &address);
  while (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    if (errno == EINTR) continue;
    if (errno != EAGAIN || patience_ms-- <= 0) return errno;
    usleep(1000);
  }
  *out = HostSocket(std::move(fd));
  return 0;
}

HostSocket::Result HostSocket::accept(HostSocket* out) {
  const int fd = ::accept4(fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) {
    *out = HostSocket(UniqueFd(fd));
    return Result::kDone;
  }
  const bool short_of = errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS;
  return short_of ? Result::kEnded : Result::kLater;
}

PeerCredentials HostSocket::credentials() const {
  ucred found{};
  socklen_t length = sizeof found;
  if (getsockopt(fd_.get(), SOL_SOCKET, SO_PEERCRED, &found, &length) != 0) return {0, static_cast<uid_t>(-1)};
  return {found.pid, found.uid};
}

HostSocket::Result HostSocket::send(std::span<const std::byte> packet, std::span<const int> descriptors) const {
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))] = {};
  iovec piece{const_cast<std::byte*>(packet.data()), packet.size()};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size_bytes());
  }
  while (true) {
    if (::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return Result::kDone;
    if (errno == EINTR) continue;
    // ETOOMANYREFS: too many descriptors are under way already.
    const bool later = errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == ETOOMANYREFS;
    return later ? Result::kLater : Result::kEnded;
  }
}

HostSocket::Result HostSocket::receive(std::span<std::byte> buffer, size_t* length,
                                       std::vector<UniqueFd>* descriptors) const {
  descriptors->clear();
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))];
  iovec piece{buffer.data(), buffer.size()};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got;
  do {
    got = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return errno == EAGAIN ? Result::kLater : Result::kEnded;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
      descriptors->emplace_back(fd);
    }
  }
  if (got == 0) return Result::kEnded;  // nobody sends empty packets
  *length = message.msg_flags & MSG_TRUNC ? 0 : static_cast<size_t>(got);
  return Result::kDone;
}

}  // namespace railwire
