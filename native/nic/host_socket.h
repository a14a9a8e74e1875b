// Unix sockets between the shm NICs of one host. They carry what set-up needs (descriptors of shared memory), wake a
// NIC that sleeps, and end when the process at the other end does. Names are abstract: nothing is left behind in any
// file system, and only processes of one network namespace find each other.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "nic/host_memory.h"

namespace railwire {

inline constexpr size_t kMostDescriptors = 2;  // that one packet carries
inline constexpr size_t kLongestPacket = 256;

struct PeerCredentials {
  pid_t pid = 0;  // in our PID namespace; 0: not visible there
  uid_t uid = 0;
};

// One SOCK_SEQPACKET socket: packets arrive whole and in order. Nothing blocks.
class HostSocket {
 public:
  enum class Result : uint8_t { kDone, kLater, kEnded };

  HostSocket() = default;
  explicit HostSocket(UniqueFd fd) : fd_(std::move(fd)) {}

  // Throws NicError if the name is taken, or sockets are not to be had.
  static HostSocket listen(const std::string& name);
  // 0, or errno. Waits up to `patience_ms` for a place in the listener's queue.
  static int dial(const std::string& name, int patience_ms, HostSocket* out);
  // kEnded: no more descriptors (errno EMFILE, ENFILE, ENOMEM); kLater: nobody is there.
  Result accept(HostSocket* out);
  // Of the process that listens (for who has dialled) or has dialled.
  PeerCredentials credentials() const;

  Result send(std::span<const std::byte> packet, std::span<const int> descriptors = {}) const;
  // A packet longer than kLongestPacket arrives with length 0. `descriptors` is replaced.
  Result receive(std::span<std::byte> buffer, size_t* length, std::vector<UniqueFd>* descriptors) const;

  int fd() const { return fd_.get(); }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  void close() { fd_.reset(); }

 private:
  UniqueFd fd_;
};

}  // namespace railwire
