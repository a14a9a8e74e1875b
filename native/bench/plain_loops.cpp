// The yardstick of `railwire bench --against plain`: what sockets, or a memcpy, can do without anybody's library.
//
// Over tcp: one connection; a frame is a header (how many pages, and where each goes) and up to 500 pages behind it,
// gathered by one sendmsg; the receiver's readv puts them where they belong, and takes the next header with them. On
// one host: both buffers lie in memory that the sender has mapped; pages are copied by memcpy, and one counter in that
// memory says how many have come.
//
// Nothing is checked, nothing is confirmed but where one operation is waited for, no failure is survived. Loaded by
// railwire/bench/plain_runner.py with ctypes; the loops never return to Python.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr uint64_t kMostPages = 500;  // of a frame

struct Header {
  uint64_t count = 0, bytes = 0;  // pages, and of each page
  uint64_t offsets[kMostPages] = {};
  size_t size() const { return 16 + count * sizeof(uint64_t); }
};

thread_local std::string last_error;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

[[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string(what) + ": " + std::strerror(errno)); }

// A blocking socket takes all or fails.
void send_all(int fd, iovec* parts, size_t count) {
  while (count > 0) {
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) fail("sendmsg");
    auto left = static_cast<size_t>(sent);
    while (count > 0 && left >= parts->iov_len) {
      left -= parts->iov_len;
      ++parts;
      --count;
    }
    if (count > 0) {
      parts->iov_base = static_cast<char*>(parts->iov_base) + left;
      parts->iov_len -= left;
    }
  }
}

// `spin`: does not sleep, which is the fastest way to an answer.
void receive_all(int fd, void* to, size_t bytes, bool spin, int64_t deadline) {
  auto* at = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = recv(fd, at, bytes, spin ? MSG_DONTWAIT : 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
      if (now_ns() > deadline) fail("waiting for the peer");
      continue;
    }
    if (got == 0) errno = ECONNRESET;
    if (got <= 0) fail("recv");
    at += got;
    bytes -= static_cast<size_t>(got);
  }
}

struct Work {
  const uint64_t *local, *remote;  // byte offsets of pages, `offsets` of each: used round robin
  uint64_t offsets, pages, rounds, bytes;
};

void socket_send(int fd, std::byte* base, const Work& work, bool one_by_one, int64_t* laps_ns, int64_t deadline) {
  Header header;
  iovec parts[kMostPages + 1];
  uint64_t at = 0;
  for (uint64_t round = 0; round < work.rounds; ++round) {
    const int64_t began = now_ns();
    for (uint64_t done = 0; done < work.pages;) {
      header.count = std::min(kMostPages, work.pages - done);
      header.bytes = work.bytes;
      for (uint64_t i = 0; i < header.count; ++i) {
        header.offsets[i] = work.remote[at];
        parts[i + 1] = {base + work.local[at], work.bytes};
        if (++at == work.offsets) at = 0;
      }
      parts[0] = {&header, header.size()};
      send_all(fd, parts, header.count + 1);
      done += header.count;
    }
    if (one_by_one) {
      char answer;
      receive_all(fd, &answer, 1, true, deadline);
    }
    laps_ns[round] = now_ns() - began;
  }
}

// How long each frame is both sides know, as they know the work: what is read behind its pages is the next header.
void socket_receive(int fd, std::byte* base, uint64_t pages, uint64_t rounds, bool one_by_one, int64_t deadline) {
  Header header;
  size_t have = 0;  // bytes of it
  iovec parts[kMostPages + 1];
  uint64_t left_in_round = pages;
  for (uint64_t left = pages * rounds; left > 0;) {
    header.count = std::min(kMostPages, left_in_round);
    const size_t size = header.size();
    receive_all(fd, reinterpret_cast<char*>(&header) + have, size - have, one_by_one, deadline);
    const uint64_t count = header.count, bytes = header.bytes;
    left -= count;
    left_in_round = left_in_round == count ? pages : left_in_round - count;
    for (uint64_t i = 0; i < count; ++i) parts[i] = {base + header.offsets[i], bytes};
    parts[count] = {&header, left > 0 ? 16 + std::min(kMostPages, left_in_round) * sizeof(uint64_t) : 0};
    have = 0;
    size_t first = 0;
    for (size_t missing = count * bytes; missing > 0;) {
      const ssize_t got = one_by_one ? recv(fd, parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT)
                                     : readv(fd, parts + first, static_cast<int>(count + 1 - first));
      if (got < 0 && (errno == EINTR || (errno == EAGAIN && now_ns() < deadline))) continue;
      if (got == 0) errno = ECONNRESET;
      if (got <= 0) fail("readv");
      auto taken = static_cast<size_t>(got);
      if (taken > missing) have = taken - missing;
      taken = std::min(taken, missing);
      missing -= taken;
      while (taken > 0) {
        const size_t part = std::min(taken, parts[first].iov_len);
        parts[first].iov_base = static_cast<char*>(parts[first].iov_base) + part;
        parts[first].iov_len -= part;
        taken -= part;
        if (parts[first].iov_len == 0) ++first;
      }
    }
    if (one_by_one && send(fd, "", 1, MSG_NOSIGNAL) != 1) fail("send");
  }
}

void socket_pingpong(int fd, bool first, std::byte* source, std::byte* destination, uint64_t rounds, uint64_t bytes,
                     int64_t* laps_ns, int64_t deadline) {
  for (uint64_t round = 0; round < rounds; ++round) {
    const int64_t began = now_ns();
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == first) {
        if (send(fd, source, bytes, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes)) fail("send");
      } else {
        receive_all(fd, destination, bytes, true, deadline);
      }
    }
    laps_ns[round] = now_ns() - began;
  }
}

// Counters of the shared memory, each on a cache line of its own.
struct Counters {
  alignas(128) std::atomic<uint64_t> of_target;
  alignas(128) std::atomic<uint64_t> of_initiator;
};

void wait_for(const std::atomic<uint64_t>& counter, uint64_t value, int64_t deadline) {
  for (uint64_t turn = 0; counter.load(std::memory_order_acquire) < value; ++turn) {
    if (turn % 4096 == 4095 && now_ns() > deadline) {
      errno = ETIMEDOUT;
      fail("waiting for the peer");
    }
  }
}

void copy_send(std::byte* from, std::byte* to, Counters& counters, const Work& work, int64_t* laps_ns) {
  uint64_t at = 0;
  for (uint64_t round = 0; round < work.rounds; ++round) {
    const int64_t began = now_ns();
    for (uint64_t i = 0; i < work.pages; ++i) {
      std::memcpy(to + work.remote[at], from + work.local[at], work.bytes);
      if (++at == work.offsets) at = 0;
    }
    counters.of_target.fetch_add(work.pages, std::memory_order_release);
    laps_ns[round] = now_ns() - began;
  }
}

template <class F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* plain_error() { return last_error.c_str(); }

int plain_socket_send(int fd, void* base, const uint64_t* local, const uint64_t* remote, uint64_t offsets,
                      uint64_t pages, uint64_t rounds, uint64_t bytes, int one_by_one, int64_t* laps_ns,
                      int64_t timeout_ns) {
  return guarded([&] {
    socket_send(fd, static_cast<std::byte*>(base), {local, remote, offsets, pages, rounds, bytes}, one_by_one != 0,
                laps_ns, now_ns() + timeout_ns);
  });
}

int plain_socket_receive(int fd, void* base, uint64_t pages, uint64_t rounds, int one_by_one, int64_t timeout_ns) {
  return guarded([&] {
    socket_receive(fd, static_cast<std::byte*>(base), pages, rounds, one_by_one != 0, now_ns() + timeout_ns);
  });
}

int plain_socket_pingpong(int fd, int first, void* source, void* destination, uint64_t rounds, uint64_t bytes,
                          int64_t* laps_ns, int64_t timeout_ns) {
  return guarded([&] {
    socket_pingpong(fd, first != 0, static_cast<std::byte*>(source), static_cast<std::byte*>(destination), rounds,
                    bytes, laps_ns, now_ns() + timeout_ns);
  });
}

int plain_copy_send(void* from, void* to, void* counters, const uint64_t* local, const uint64_t* remote,
                    uint64_t offsets, uint64_t pages, uint64_t rounds, uint64_t bytes, int64_t* laps_ns) {
  return guarded([&] {
    copy_send(static_cast<std::byte*>(from), static_cast<std::byte*>(to), *static_cast<Counters*>(counters),
              {local, remote, offsets, pages, rounds, bytes}, laps_ns);
  });
}

int plain_copy_wait(void* counters, uint64_t total, int64_t timeout_ns) {
  return guarded([&] { wait_for(static_cast<Counters*>(counters)->of_target, total, now_ns() + timeout_ns); });
}

// `done`: how many writes of each side earlier runs have counted.
int plain_copy_pingpong(void* counters, int first, void* source, void* destination, uint64_t done, uint64_t rounds,
                        uint64_t bytes, int64_t* laps_ns, int64_t timeout_ns) {
  return guarded([&] {
    auto& shared = *static_cast<Counters*>(counters);
    std::atomic<uint64_t>& mine = first ? shared.of_target : shared.of_initiator;  // that I raise
    const std::atomic<uint64_t>& theirs = first ? shared.of_initiator : shared.of_target;
    const int64_t deadline = now_ns() + timeout_ns;
    for (uint64_t round = 1; round <= rounds; ++round) {
      const int64_t began = now_ns();
      if (!first) wait_for(theirs, done + round, deadline);
      std::memcpy(destination, source, bytes);
      mine.fetch_add(1, std::memory_order_release);
      if (first) wait_for(theirs, done + round, deadline);
      laps_ns[round - 1] = now_ns() - began;
    }
  });
}

}  // extern "C"
