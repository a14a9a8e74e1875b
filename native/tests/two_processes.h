// Runs two sides of a test in two fresh processes that can exchange byte strings, for NICs that need real processes.
//
// The test's own process never opens libfabric: each pair of processes may take another one.
#pragma once

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace railwire::testing {

inline int64_t now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

// doctest's own assertions belong to the parent. In a side, a failure ends the process with the reason on stderr.
#define SIDE_CHECK(condition)                                                           \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      std::fprintf(stderr, "%s:%d: side failed: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(nullptr);                                                             \
      _exit(1);                                                                         \
    }                                                                                   \
  } while (false)

// One side's line to the other.
class Wire {
 public:
  explicit Wire(int fd, pid_t other = 0) : fd_(fd), other_(other) {}
  void put(const void* data, size_t size) const {
    SIDE_CHECK(::send(fd_, data, size, MSG_NOSIGNAL) == static_cast<ssize_t>(size));
  }
  void put(std::span<const std::byte> bytes) const { put(bytes.data(), bytes.size()); }
  void signal() const { put("!", 1); }
  std::vector<std::byte> get() const {
    std::vector<std::byte> bytes(65536);
    const ssize_t got = recv(fd_, bytes.data(), bytes.size(), 0);
    SIDE_CHECK(got > 0);
    bytes.resize(static_cast<size_t>(got));
    return bytes;
  }
  bool ready() const {
    char byte;
    return recv(fd_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0;
  }
  // Only the first side knows the second one's process.
  pid_t other() const { return other_; }

 private:
  int fd_;
  pid_t other_;
};

using Side = std::function<void(const Wire&)>;

// The first side is the parent of the second. Passes when the first ends well and the second does too (`both`), or
// whatever becomes of the second.
inline void run_two(const std::string& library, const Side& first, const Side& second, bool both = true) {
  std::fflush(nullptr);
  const pid_t runner = fork();
  REQUIRE(runner >= 0);
  if (runner == 0) {
    alarm(60);  // a side that hangs must not hang the suite
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setenv("RAILWIRE_LIBFABRIC", library.c_str(), 1);
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) != 0) _exit(2);
    const pid_t other = fork();
    if (other < 0) _exit(2);
    if (other == 0) {
      alarm(60);
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::close(ends[0]);
      try {
        second(Wire(ends[1]));
      } catch (const std::exception& error) {
        std::fprintf(stderr, "second side threw: %s\n", error.what());
        _exit(3);
      }
      _exit(0);
    }
    ::close(ends[1]);
    try {
      first(Wire(ends[0], other));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "first side threw: %s\n", error.what());
      _exit(3);
    }
    if (!both) kill(other, SIGKILL);
    int status = 0;
    if (waitpid(other, &status, 0) != other) _exit(4);
    if (both && status != 0) {
      std::fprintf(stderr, "second side ended with wait status %d\n", status);
      _exit(5);
    }
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(runner, &status, 0) == runner);
  CHECK(status == 0);
}

}  // namespace railwire::testing
