// Two real processes with a NIC each: our own shm, or libfabric's, over tcp and shm, with every libfabric that is at
// hand: the system's, the one in RAILWIRE_LIBFABRIC, and those in RAILWIRE_TEST_LIBFABRICS (separated by colons).
#pragma once

#include <doctest/doctest.h>
#include <poll.h>

#include <algorithm>
#include <random>
#include <set>
#include <sstream>

#include "nic/libfabric_library.h"
#include "nic/libfabric_nic.h"
#include "nic/make_nic.h"
#include "tests/two_processes.h"

namespace railwire::testing {

struct Bed {
  std::string library;
  std::string spec;
  int major = 0;  // of the library
};

// The major version of a library, 0 if it is none. Each is opened in a process of its own.
inline int opens(const std::string& library) {
  const pid_t child = fork();
  if (child == 0) {
    setenv("RAILWIRE_LIBFABRIC", library.c_str(), 1);
    const LibfabricProbe probe = libfabric_probe();
    _exit(probe.providers.empty() ? 0 : std::atoi(probe.version.c_str()));
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

inline const std::vector<Bed>& beds() {
  static const std::vector<Bed> found = [] {
    std::vector<std::string> libraries{"libfabric.so.1"};
    if (const char* path = std::getenv("RAILWIRE_LIBFABRIC")) libraries.emplace_back(path);
    if (const char* paths = std::getenv("RAILWIRE_TEST_LIBFABRICS")) {
      std::istringstream in(paths);
      for (std::string path; std::getline(in, path, ':');) libraries.push_back(path);
    }
    std::vector<Bed> beds;
    std::set<std::string> seen;
    for (const std::string& library : libraries) {
      const int major = seen.insert(library).second ? opens(library) : 0;
      if (major == 0) continue;
      for (const char* spec : {"libfabric:tcp://127.0.0.1", "libfabric:shm"}) beds.push_back({library, spec, major});
    }
    return beds;
  }();
  return found;
}

template <class F>
void on_every_bed(F&& test) {
  if (beds().empty()) MESSAGE("skipped: no libfabric here");
  for (const Bed& bed : beds()) {
    CAPTURE(bed.library);
    CAPTURE(bed.spec);
    test(bed);
  }
}

// For what every NIC between two processes must do: on our own shm, too.
template <class F>
void on_shm_and_every_bed(F&& test) {
  const Bed own{"", "shm", 0};
  CAPTURE(own.spec);
  test(own);
  on_every_bed(test);
}

inline constexpr size_t kBytes = 8 << 20;
inline constexpr size_t kPad = kBytes - 64;  // where flushes go

// One NIC with one link and one region.
struct Half {
  explicit Half(const std::string& spec, const std::map<std::string, std::string>& options = {})
      : nic(spec == "shm" ? make_nic(spec, options) : make_libfabric_nic(spec, options)), memory(kBytes) {
    region = nic->register_memory({.address = memory.data(), .length = memory.size(), .key_hint = random_key()});
    link = nic->create_link();
  }
  ~Half() {
    link.reset();
    nic->deregister(region);
  }

  static uint64_t random_key() { return (uint64_t{std::random_device()()} << 32) | std::random_device()(); }

  void meet(const Wire& wire) {
    wire.put(link->address());
    wire.put(nic->address());
    wire.put(region.blob);
    const auto link_address = wire.get();
    const auto nic_address = wire.get();
    const auto theirs = wire.get();
    SIDE_CHECK(link_address.size() <= 128);
    SIDE_CHECK(nic_address.size() <= 256);
    remote = nic->import_memory(theirs);
    link->connect(link_address);
    peer = nic->resolve(nic_address);
  }

  WorkRequest write(size_t from, size_t to, size_t length, uint32_t flags = 0, uint32_t immediate = 0) {
    return {.local = length ? memory.data() + from : nullptr,
            .local_key = region.local,
            .remote = remote.base + to,
            .rkey = remote.rkey,
            .length = length,
            .flags = flags,
            .immediate = immediate,
            .context = this};
  }

  // Posts one, however long the link takes to come up.
  void post(const WorkRequest& wr) {
    const int64_t end = now_ms() + 20'000;
    while (link->post({&wr, 1}) == 0) {
      SIDE_CHECK(!link->broken());
      SIDE_CHECK(now_ms() < end);
      poll();
    }
  }

  // Polls once and sorts what came.
  size_t poll() {
    Completion out[16];
    const size_t n = nic->poll(out);
    for (size_t i = 0; i < n; ++i) {
      switch (out[i].kind) {
        case Completion::kWorkRequest:
          SIDE_CHECK(out[i].link == link.get());
          SIDE_CHECK(out[i].context == this);
          ends.push_back(out[i].status);
          last_error = out[i].provider_error;
          break;
        case Completion::kImmediate:
          immediates.push_back(out[i].immediate);
          break;
        case Completion::kMessage:
          messages.emplace_back(reinterpret_cast<const char*>(out[i].data.data()), out[i].data.size());
          break;
        case Completion::kSend:
          sent.push_back(out[i].status);
          break;
      }
    }
    return n;
  }

  template <class F>
  void poll_until(F&& done, int64_t timeout_ms = 20'000) {
    const int64_t end = now_ms() + timeout_ms;
    while (!done()) {
      poll();
      SIDE_CHECK(now_ms() < end);
    }
  }

  // As an idle engine does it. Returns how often it slept.
  template <class F>
  int sleep_until(F&& done) {
    int sleeps = 0;
    const int64_t end = now_ms() + 20'000;
    while (!done()) {
      SIDE_CHECK(now_ms() < end);
      if (poll() > 0) continue;
      if (!nic->arm()) {
        usleep(100);
        continue;
      }
      ++sleeps;
      pollfd fd{nic->wait_fd(), POLLIN, 0};
      if (fd.fd < 0) {
        usleep(100);  // it has none: one naps
      } else {
        SIDE_CHECK(::poll(&fd, 1, 10'000) == 1);  // a lost wake-up ends here
      }
      nic->disarm();
    }
    return sleeps;
  }

  void send(const std::string& text) {
    const int64_t end = now_ms() + 20'000;
    while (!nic->send(peer, std::as_bytes(std::span(text)), this)) {
      SIDE_CHECK(now_ms() < end);
      poll();
    }
  }

  // Waits for the other side's word without ceasing to serve it: manual progress needs both sides' polling.
  std::vector<std::byte> hear(const Wire& wire) {
    poll_until([&] { return wire.ready(); });
    return wire.get();
  }
  void leave_together(const Wire& wire) {
    wire.signal();
    hear(wire);
  }

  std::unique_ptr<Nic> nic;
  std::vector<unsigned char> memory;
  Registration region;
  std::unique_ptr<Link> link;
  RemoteMemory remote{};
  uint64_t peer = 0;
  std::vector<Status> ends, sent;
  std::vector<uint32_t> immediates;
  std::vector<std::string> messages;
  int32_t last_error = 0;
};

// Runs `first` and `second` with a half each, which have met. With `both` they leave together, too; without it the
// second may be killed.
template <class First, class Second>
void two_halves(const Bed& bed, const First& first, const Second& second, bool both = true) {
  const auto side = [&](const auto& body) {
    return [&bed, &body, both](const Wire& wire) {
      Half half(bed.spec);
      half.meet(wire);
      body(half, wire);
      if (both) half.leave_together(wire);
    };
  };
  run_two(bed.library, side(first), side(second), both);
}

template <class F>
bool throws_nic_error(F&& f) {
  try {
    f();
  } catch (const NicError& error) {
    return std::strlen(error.what()) > 20;
  }
  return false;
}

}  // namespace railwire::testing
