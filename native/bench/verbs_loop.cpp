// The engine over the verbs NIC between two processes, without Python: to be held against ib_write_bw and ib_write_lat
// (scripts/against-perftest.sh), which are C programs, where an interpreter is emulated and a NIC is not.
//
//   verbs_loop lat DEVICE BYTES COUNT           microseconds: half a ping-pong of writes seen by the other's counter
//   verbs_loop nic DEVICE BYTES COUNT           the same between two of our NICs alone, without an engine
//   verbs_loop bw  DEVICE BYTES COUNT DEPTH     MiB/s: DEPTH writes in flight, until the receiver has counted all
//   verbs_loop pages DEVICE BYTES COUNT DEPTH   the same in page lists, two of DEPTH / 2 scattered pages in flight
//   verbs_loop plain DEVICE BYTES COUNT DEPTH   as bw, without immediates: until the sender's last completion
#include <sched.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "engine/clock.h"
#include "engine/engine.h"
#include "nic/verbs_nic.h"

using namespace railwire;

namespace {

constexpr int64_t kLimit = 120'000'000'000;
constexpr uint32_t kImmediate = 5;

// Each process on a core of its own, its worker with it: where the scheduler moves them about, figures differ by a
// fifth from run to run.
void keep_to_core(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);  // refused on a machine with one core, which needs no placement
}

// Page-aligned, as perftest's and as engine.allocate() gives it: to a software NIC a page across a boundary is two.
struct Memory {
  explicit Memory(uint64_t bytes)
      : size((bytes + 4095) / 4096 * 4096), begin(static_cast<std::byte*>(std::aligned_alloc(4096, size))) {
    std::memset(begin, 0, size);
  }
  ~Memory() { std::free(begin); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint64_t size;
  std::byte* begin;
};

// To the other process, while there is no connection yet.
struct Wire {
  explicit Wire(int fd) : fd(fd) {}
  void put(const std::vector<std::byte>& bytes) {
    put_value(bytes.size());
    if (::write(fd, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) std::exit(1);
  }
  void put_value(uint64_t value) {
    if (::write(fd, &value, sizeof value) != sizeof value) std::exit(1);
  }
  std::vector<std::byte> get() {
    std::vector<std::byte> bytes(get_value());
    if (recv(fd, bytes.data(), bytes.size(), MSG_WAITALL) != static_cast<ssize_t>(bytes.size())) std::exit(1);
    return bytes;
  }
  uint64_t get_value() {
    uint64_t value = 0;
    if (recv(fd, &value, sizeof value, MSG_WAITALL) != sizeof value) std::exit(1);
    return value;
  }

  int fd;
};

// The NIC and one link, with nothing of the engine: what is left of a time when this is taken away is the engine's.
struct Bare : Wire {
  Bare(const std::string& device, int fd, bool first, uint64_t bytes)
      : Wire(fd), first(first), memory(bytes), nic(make_verbs_nic("verbs:" + device, {})), link(nic->create_link()) {
    own = nic->register_memory({.address = memory.begin, .length = memory.size});
    put(link->address());
    put(own.blob);
    link->connect(get());
    const RemoteMemory theirs = nic->import_memory(get());
    remote = theirs.base, rkey = theirs.rkey;
    put_value(1);
    get_value();
  }
  ~Bare() {
    link->close();
    link.reset();
    nic->deregister(own);
  }
  size_t write(uint64_t bytes) {
    const WorkRequest wr{.local = memory.begin,
                         .local_key = own.local,
                         .remote = remote,
                         .rkey = rkey,
                         .length = bytes,
                         .flags = WorkRequest::kImmediate,
                         .immediate = kImmediate};
    const size_t posted = link->post({&wr, 1});
    if (posted != 1) std::exit(1);
    return posted;
  }
  bool expect(uint64_t arrivals) {
    while (arrivals > 0) {
      for (size_t i = 0, n = nic->poll(completions); i < n; ++i) {
        if (completions[i].status != Status::kOk) std::exit(1);
        arrivals -= completions[i].kind == Completion::kImmediate;
      }
    }
    return true;
  }

  bool first;
  Memory memory;
  std::unique_ptr<Nic> nic;
  std::unique_ptr<Link> link;
  Registration own;
  uint64_t remote = 0, rkey = 0;
  Completion completions[64];
};

struct Side : Wire {
  Side(const std::string& device, int fd, bool first, uint64_t bytes) : Wire(fd), first(first), memory(bytes) {
    std::vector<std::unique_ptr<Nic>> nics;
    nics.push_back(make_verbs_nic("verbs:" + device, {}));
    engine = std::make_shared<Engine>(
        EngineOptions{.liveness_ns = kLimit, .events = &events, .handshakes = &handshakes}, std::move(nics));
    engine->run();
    region = engine->register_memory({.address = memory.begin, .length = memory.size}, 0);
    put(engine->nics()[0]->address());
    peer = engine->create_peer(1, first, "other", {{0, 0, get()}});
    const auto half = engine->link_halves(*peer).front();
    const auto own = engine->region_keys(*region, &region_id).front();
    put(half.address);
    put(half.pad), put(own);
    const auto other = get(), pad = get(), key = get();
    engine->activate_peer(*peer, {{other, pad}}, 0, 0);
    RemoteKeys told(1, bytes, {key});
    remote = engine->reach(peer, told);
    put_value(1);  // neither writes before both can take it
    get_value();
  }
  ~Side() { engine->close(1'000'000'000); }

  std::shared_ptr<Transfer> write_pages(uint64_t bytes, size_t count) {
    auto transfer = std::make_shared<Transfer>(engine, Transfer::Kind::kWrite, kImmediate);
    transfer->submitted_ns = engine->submission_time();
    PageSide from, to;
    from.stride = to.stride = bytes;
    for (size_t i = 0; i < count; ++i) {  // never two neighbours in a row, so that nothing merges
      from.indices.push_back(static_cast<uint32_t>(i));
      to.indices.push_back(static_cast<uint32_t>(count - 1 - i));
    }
    transfer->add_lane<PageSource>(peer, region, std::move(from), remote, std::move(to), bytes, kImmediate,
                                   peer->limits());
    engine->submit(transfer);
    return transfer;
  }
  std::shared_ptr<Transfer> write(uint64_t bytes, bool counted = true) {
    const int64_t immediate = counted ? int64_t{kImmediate} : -1;
    auto transfer = std::make_shared<Transfer>(engine, Transfer::Kind::kWrite, immediate);
    transfer->submitted_ns = engine->submission_time();
    transfer->add_lane<PieceSource>(peer, region, Piece{0, remote, 0, bytes}, false, immediate, peer->limits());
    engine->submit(transfer);
    return transfer;
  }
  std::shared_ptr<Expectation> expect(uint64_t arrivals) {
    auto expectation =
        std::make_shared<Expectation>(engine, kImmediate, arrivals * kUnitsPerArrival, std::vector<uint64_t>{}, kLimit);
    engine->submit(expectation);
    finish(*expectation);
    return expectation;
  }
  void finish(Operation& operation) {
    if (!operation.wait(kLimit) || operation.state() != State::kDone) {
      std::fprintf(stderr, "failed: %s\n", operation.failure().message.c_str());
      std::exit(1);
    }
  }

  bool first;
  Memory memory;
  EventQueue events, handshakes;
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Region> region;
  std::shared_ptr<Peer> peer;
  std::shared_ptr<const RemoteAccess> remote;
  uint64_t region_id = 0;
};

template <class Either>
void latency(Either& side, uint64_t bytes, size_t count) {
  std::vector<double> halves;
  // As in a program, where names are bound anew: what has ended is let go when the next is under way.
  [[maybe_unused]] decltype(side.expect(1)) expected{};
  [[maybe_unused]] decltype(side.write(bytes)) written{};
  for (size_t i = 0; i < count; ++i) {
    const int64_t begin = now_ns();
    if (!side.first) expected = side.expect(1);
    written = side.write(bytes);
    if (side.first) expected = side.expect(1);
    halves.push_back(static_cast<double>(now_ns() - begin) / 2e3);
  }
  if (!side.first) return;
  std::nth_element(halves.begin(), halves.begin() + static_cast<ptrdiff_t>(count / 2), halves.end());
  std::printf("%.2f\n", halves[count / 2]);
}

void bandwidth(Side& side, const std::string& what, uint64_t bytes, size_t count, size_t depth) {
  const size_t at_once = what == "pages" ? std::max<size_t>(depth / 2, 1) : 1;
  if (what == "pages") {
    count /= at_once;
    depth = 2;
  }
  if (side.first) {
    const int64_t begin = now_ns();
    std::vector<std::shared_ptr<Transfer>> in_flight(depth);
    for (size_t i = 0; i < count; ++i) {
      auto& slot = in_flight[i % depth];
      if (slot) side.finish(*slot);
      slot = what == "pages" ? side.write_pages(bytes, at_once) : side.write(bytes, what == "bw");
    }
    for (const auto& transfer : in_flight) {
      if (transfer) side.finish(*transfer);
    }
    const double seconds = static_cast<double>(now_ns() - begin) * 1e-9;
    std::printf("%.2f\n", static_cast<double>(bytes) * static_cast<double>(count * at_once) / seconds / (1 << 20));
  } else if (what != "plain") {
    side.expect(count * at_once);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  const std::string what = argv[1];
  const uint64_t bytes = std::strtoull(argv[3], nullptr, 10);
  const size_t count = std::strtoull(argv[4], nullptr, 10);
  const size_t depth = argc > 5 ? std::max<size_t>(1, std::strtoull(argv[5], nullptr, 10)) : 1;
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) return 1;
  const pid_t child = fork();
  if (child == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
  const bool first = child != 0;
  keep_to_core(first ? 0 : 1);
  int code = 0;
  const uint64_t room = std::max<uint64_t>(bytes * depth, 4096);
  const auto work = [&](auto& side) {
    if constexpr (std::is_same_v<decltype(side), Side&>) {
      what == "lat" ? latency(side, bytes, count) : bandwidth(side, what, bytes, count, depth);
    } else {
      latency(side, bytes, count);
    }
    side.put_value(2);  // closes when the other has finished, too
    side.get_value();
  };
  const int fd = fds[first ? 0 : 1];
  if (what == "nic") {
    Bare side(argv[2], fd, first, room);
    work(side);
  } else {
    Side side(argv[2], fd, first, room);
    work(side);
  }
  if (first) waitpid(child, &code, 0);
  return code == 0 ? 0 : 1;
}
