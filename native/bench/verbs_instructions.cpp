// Posts work requests through the verbs NIC to a provider that does next to nothing, so that callgrind counts what
// they cost here: scripts/count-instructions.sh runs it with two counts and divides the difference.
//
//   verbs_instructions pages COUNT   one write_pages of COUNT scattered pages of 4 KiB, through the whole engine
//   verbs_instructions writes COUNT  COUNT writes of 64 B, each submitted and waited for, through the whole engine
//   verbs_instructions turns COUNT   COUNT writes of 8 B in turns with the peer's: each answers an expected arrival
//   verbs_instructions crowd COUNT   the same turns, beside 63 peers that are silent
//   verbs_instructions answers COUNT the same from an arrival in the queue to the doorbell of the answer, and no more
//   verbs_instructions scatter COUNT an MoE layer's dispatch to COUNT peers, 1,000 times: from the store to a watched
//   word
//                                    to the last doorbell; prints how long that takes, too
//   verbs_instructions batch COUNT   COUNT WRs in chains of 64, through Link::post and Nic::poll alone
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "../tests/stub_verbs.h"
#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/prepared.h"
#include "engine/watcher.h"
#include "nic/verbs_internal.h"
#include "nic/verbs_nic.h"

// What lies between two points can be counted only where valgrind's header tells it of them.
#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_TOGGLE_COLLECT
#endif

using namespace railwire;
using namespace railwire::testing;

namespace {

// A ring of completions: about ten instructions for a WR, twenty for a signalled one.
constexpr size_t kRing = 4096;
ibv_wc ring[kRing];
size_t head = 0, tail = 0;
bool answered = false;  // each write brings one of the peer's
bool paced = false;     // completions come one at a time, as they do over a wire
bool counting = false;
size_t to_send = 0;  // until the last doorbell of a scatter
int64_t last_sent = 0;

int lean_send(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr**) {
  if (qp->qp_type == IBV_QPT_UD) return 0;
  if (std::exchange(counting, false)) {
    CALLGRIND_TOGGLE_COLLECT;
  }
  if (to_send > 0 && --to_send == 0) {
    CALLGRIND_TOGGLE_COLLECT;
    last_sent = now_ns();
  }
  for (; wr; wr = wr->next) {
    if (!(wr->send_flags & IBV_SEND_SIGNALED)) continue;
    ibv_wc& wc = ring[head++ % kRing];
    wc.wr_id = wr->wr_id;
    wc.status = IBV_WC_SUCCESS;
    wc.qp_num = qp->qp_num;
    wc.wc_flags = 0;
    if (!answered) continue;
    ibv_wc& arrival = ring[head++ % kRing];
    arrival = wc;
    arrival.wr_id = make_wr_id(WrKind::kSharedReceive, 0, 0);
    arrival.imm_data = wr->imm_data;
    arrival.wc_flags = IBV_WC_WITH_IMM;
  }
  return 0;
}

int lean_poll(ibv_cq*, int most, ibv_wc* out) {
  int n = 0;
  if (paced) {
    static size_t looks = 0;
    if (tail == head || ++looks % 3 != 0) return 0;
    out[0] = ring[tail++ % kRing];
    if (out[0].wc_flags == 0) return 1;
    counting = true;
    CALLGRIND_TOGGLE_COLLECT;
    return 1;
  }
  for (; n < most && tail < head; ++n) out[n] = ring[tail++ % kRing];
  return n;
}

void batch(size_t count) {
  const auto near = make_verbs_nic("verbs:stub0", {}), far = make_verbs_nic("verbs:stub0", {});
  std::vector<std::byte> memory(1 << 20);
  auto region = near->register_memory({.address = memory.data(), .length = memory.size()});
  const auto link = near->create_link(), other = far->create_link();
  link->connect(other->address());
  std::vector<WorkRequest> chain(64);
  for (size_t i = 0; i < chain.size(); ++i) {
    chain[i] = {.local = memory.data() + i * 4096,
                .local_key = region.local,
                .remote = 0x1000 + i * 4096,
                .rkey = 7,
                .length = 4096,
                .flags = WorkRequest::kImmediate,
                .immediate = static_cast<uint32_t>(i)};
  }
  Completion out[64];
  for (size_t done = 0; done < count;) {
    link->post(chain);
    for (size_t n = 0; n < chain.size();) n += near->poll(out);
    done += chain.size();
  }
  near->deregister(region);
}

// An engine with one connected peer, and perhaps others that are silent. Without run(): no worker, so that whoever
// waits does all the work.
struct Bed {
  static constexpr uint64_t kPage = 4096, kPages = 4096;
  explicit Bed(size_t silent = 0)
      : far(make_verbs_nic("verbs:stub0", {})), other(far->create_link()), memory(kPage * kPages) {
    std::vector<std::unique_ptr<Nic>> nics;
    nics.push_back(make_verbs_nic("verbs:stub0", {}));
    engine = std::make_shared<Engine>(
        EngineOptions{.liveness_ns = 3'600'000'000'000, .events = &events, .handshakes = &handshakes}, std::move(nics));
    peer = connect(1, *other);
    peers.push_back(peer);
    for (size_t i = 0; i < silent; ++i) {
      others.push_back(far->create_link());
      peers.push_back(connect(2 + i, *others.back()));
    }
    region = engine->register_memory({.address = memory.data(), .length = memory.size()}, 0);
    RemoteKeys told(1, memory.size(), {plain_blob(0x10000, 7)});
    keys = engine->reach(peer, told);
  }
  ~Bed() { engine->close(0); }
  std::shared_ptr<Peer> connect(uint64_t connection, const Link& half) {
    auto connected = engine->create_peer(connection, true, "far", {{0, 0, far->address()}});
    engine->link_halves(*connected);
    engine->activate_peer(*connected, {{half.address(), plain_blob(0x1000, 7)}}, 0, 0);
    return connected;
  }
  template <class Source, class... Args>
  std::shared_ptr<Transfer> submit(Args&&... args) {
    auto transfer = std::make_shared<Transfer>(engine, Transfer::Kind::kWrite, 5);
    transfer->submitted_ns = engine->submission_time();
    transfer->add_lane<Source>(peer, std::forward<Args>(args)...);
    engine->submit(transfer);
    return transfer;
  }
  std::shared_ptr<Transfer> write(uint64_t bytes) {
    return submit<PieceSource>(region, Piece{0, keys, 0, bytes}, false, 5, peer->limits());
  }
  void carry_out(Transfer& transfer) {
    transfer.wait(60'000'000'000);
    if (transfer.state() != State::kDone) std::exit(1);
  }

  std::unique_ptr<Nic> far;
  std::unique_ptr<Link> other;
  std::vector<std::unique_ptr<Link>> others;
  std::vector<std::byte> memory;
  EventQueue events, handshakes;
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Peer> peer;
  std::vector<std::shared_ptr<Peer>> peers;  // it, and those that are silent
  std::shared_ptr<Region> region;
  std::shared_ptr<const RemoteAccess> keys;
};

void writes(size_t count) {
  Bed bed;
  for (size_t i = 0; i < count; ++i) bed.carry_out(*bed.write(64));
}

void turns(size_t count, size_t silent) {
  Bed bed(silent);
  answered = true;
  for (size_t i = 0; i < count; ++i) {
    const auto transfer = bed.write(8);
    const auto expectation =
        std::make_shared<Expectation>(bed.engine, 5, kUnitsPerArrival, std::vector<uint64_t>{}, 60'000'000'000);
    bed.engine->submit(expectation);
    if (!expectation->wait(60'000'000'000) || !transfer->wait(0)) std::exit(1);
  }
}

void answers(size_t count) {
  Bed bed;
  answered = paced = true;
  auto transfer = bed.write(8);
  for (size_t i = 0; i < count; ++i) {
    const auto expectation =
        std::make_shared<Expectation>(bed.engine, 5, kUnitsPerArrival, std::vector<uint64_t>{}, 60'000'000'000);
    bed.engine->submit(expectation);
    if (!expectation->wait(60'000'000'000)) std::exit(1);
    transfer = bed.write(8);
  }
}

void scatter(size_t count) {
  constexpr size_t kOperations = 1000;
  constexpr uint64_t kRow = 7424, kRows = 16;  // H = 7168 in fp8, with scales: as many rows as uniform routing gives
  Bed bed(count - 1);
  answered = true;
  std::vector<PreparedScatter::Target> targets;
  RemoteKeys told(1, bed.memory.size(), {plain_blob(0x10000, 7)});
  for (const auto& peer : bed.peers) targets.push_back({peer, bed.engine->reach(peer, told), 0, kRow * kRows});
  const auto plan = std::make_shared<PreparedScatter>(bed.engine, bed.region, 0, bed.memory.size(), targets, 1);
  for (size_t i = 0; i < count; ++i) plan->slot(0)[i] = {i % 64 * kRow * kRows, 0, kRow * kRows, 5};
  const auto watcher = bed.engine->watch(plan);
  std::vector<int64_t> took;
  for (size_t i = 1; i <= kOperations; ++i) {
    const auto expectation =
        std::make_shared<Expectation>(bed.engine, 5, kUnitsPerArrival * count, std::vector<uint64_t>{}, 60'000'000'000);
    bed.engine->submit(expectation);
    to_send = count;
    const int64_t begin = now_ns();
    CALLGRIND_TOGGLE_COLLECT;
    std::atomic_ref<uint64_t>(*watcher->word()).store(i, std::memory_order_release);
    if (!expectation->wait(60'000'000'000) || expectation->state() != State::kDone) std::exit(1);
    took.push_back(last_sent - begin);
  }
  std::sort(took.begin(), took.end());
  std::printf("%zu ranks: p50 %.2f us, p99 %.2f us\n", count, static_cast<double>(took[kOperations / 2]) * 1e-3,
              static_cast<double>(took[kOperations * 99 / 100]) * 1e-3);
}

void pages(size_t count) {
  constexpr size_t kMost = 64000;
  Bed bed;
  // Scattered, so that no two pages merge.
  std::mt19937 random(1);
  PageSide from, to;
  from.stride = to.stride = Bed::kPage;
  for (size_t i = 0; i < std::max(count, kMost); ++i) {  // always as many: making them is not to be counted
    from.indices.push_back(static_cast<uint32_t>(random() % Bed::kPages));
    to.indices.push_back(static_cast<uint32_t>((from.indices.back() * 7 + 3) % Bed::kPages));
  }
  from.indices.resize(count);
  to.indices.resize(count);
  bed.carry_out(
      *bed.submit<PageSource>(bed.region, std::move(from), bed.keys, std::move(to), Bed::kPage, 5, bed.peer->limits()));
  std::printf("%llu WRs\n", static_cast<unsigned long long>(bed.engine->stats().nics[0].work_requests));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  StubVerbs stub;
  stub.context.ops.post_send = lean_send;
  stub.context.ops.poll_cq = lean_poll;
  const std::string what = argv[1];
  const size_t count = std::strtoull(argv[2], nullptr, 10);
  if (what == "pages") {
    pages(count);
  } else if (what == "writes") {
    writes(count);
  } else if (what == "turns") {
    turns(count, 0);
  } else if (what == "crowd") {
    turns(count, 63);
  } else if (what == "answers") {
    answers(count);
  } else if (what == "scatter") {
    scatter(count);
  } else if (what == "batch") {
    batch(count);
  } else {
    return 2;
  }
}
