// The other end: its links, what is queued for it, the reliable record channel, and when it was last heard of.
//
//   connecting --activate--> connected --close()/CLOSE--> closing --confirmed--> ended
//                                 \______ liveness, death, links gone: lost ______/
//
// Ended peers keep their object (people hold it), but no link, no lane and no timer.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/chain.h"
#include "engine/frames.h"
#include "engine/link_state.h"
#include "engine/operation.h"
#include "engine/recent_ids.h"
#include "engine/transfer.h"
#include "nic/nic.h"

namespace railwire {

enum class PeerState : uint8_t { kConnecting = 0, kConnected, kClosing, kClosed, kLost };

// How one pair of NICs is to be linked, from the handshake.
struct LinkPlan {
  uint32_t local_nic = 0;
  uint32_t remote_nic = 0;
  std::vector<std::byte> remote_control;  // control address of the remote NIC
};

// A WR that came back unfinished from a link that broke.
struct Orphan {
  WorkRequest request;
  LaneLink* share = nullptr;  // null: its lane does not want it any more; the place in the order still counts
};

// The links between NICs of one kind. A transfer goes over one set, and waits in its queues.
struct RailSet {
  std::string kind;
  uint32_t first = 0, count = 0;  // its links, in Peer::links
  uint64_t local_nics = 0;        // a bit for each
  SplitLimits limits;
  std::atomic<bool> usable{true};  // false: nothing is up, nor is likely to be soon
  int64_t last_up = 0;             // when a link of it was up

  // Lanes that may be posted now: bulk in order, so that the first is done first; short ones beside it.
  Chain<Lane> ready;
  Chain<Lane> ready_short;
  bool short_turn = false;  // the two take turns
  size_t next_link = 0;     // whose turn it is to be served first
  bool any_ready() const { return !ready.empty() || !ready_short.empty(); }
  Chain<Lane>& next_queue() {
    if (ready.empty() || ready_short.empty()) return ready.empty() ? ready_short : ready;
    short_turn = !short_turn;
    return short_turn ? ready_short : ready;
  }
  Chain<Lane>& queue_of(const Lane& lane) { return lane.is_short ? ready_short : ready; }
};

struct PeerLink : WrContext {
  Peer* peer = nullptr;
  uint32_t index = 0;           // in the peer's links
  uint32_t set = 0, place = 0;  // its set, and which link of it this is
  Nic* nic = nullptr;
  uint64_t control = 0;  // handle of the remote NIC's control endpoint
  std::vector<std::byte> control_address;
  std::unique_ptr<Link> link;
  std::vector<std::byte> own_address;  // of `link`, for the peer
  LinkEnds ends;
  std::vector<std::shared_ptr<const ImportedMemory>> imported_pad;  // of the peer's landing pad, if it must be released
  LinkState state;                                                  // moves only by Engine::move_on()
  int64_t phase_since = 0;                                          // of state.phase
  bool up() const { return state.up(); }                            // takes WRs
  bool reachable = false;  // messages pass between this pair of NICs; a link that is up always is
  int64_t last_heard = 0;
  int64_t last_ping = 0;
  int64_t last_progress = 0;     // a WR came back, or the link had none outstanding
  int64_t first_send_error = 0;  // of control messages since the peer was last heard on this pair; 0: none
  uint32_t send_errors = 0;
  std::vector<WorkRequest> stash;  // filled, but the link was full
  std::vector<LaneLink*> want_flush;
  std::vector<LaneLink*> in_flush;
  std::vector<LaneLink*> want_confirmation;  // link broken: the peer's word, or its end, is awaited
  bool flushing = false;
  int64_t flush_due = 0;     // when want_flush is flushed even if nobody waits for it
  int64_t broken_since = 0;  // seen to have broken, which a WR will soon tell more of; 0: not
  Failure failure;           // why it is down

  // Failing over and being made anew (failover.cpp); only where the NIC is resumable.
  uint32_t generation = 0;        // how often the link has been made anew; both sides count alike
  bool resuming = false;          // down, and what it had not landed goes over other links
  uint64_t remote_landed = 0;     // immediates of ours that landed, by the peer's count; valid with state.remote_closed
  std::vector<Orphan> orphans;    // came back unfinished, in the order of posting
  std::vector<std::byte> offer;   // the peer's new half, until ours is made; empty: none
  uint32_t offered = 0;           // its generation
  std::vector<std::byte> answer;  // the peer's half, to which ours is to be connected
  int64_t up_since = 0;
  int64_t rebuild_after = 0;
  uint32_t rebuild_tries = 0;
};

// A message of the user on its way; done when the peer's engine has it.
class SendOperation final : public Operation {
 public:
  SendOperation(std::weak_ptr<Engine> engine, std::shared_ptr<Peer> peer, std::vector<std::byte> message)
      : Operation(std::move(engine)), peer(std::move(peer)), message(std::move(message)) {}
  void start(Engine& engine, std::shared_ptr<Operation> self) override;
  void stop(Engine& engine) override;  // while it waits for room at the receiver; once sent it cannot be taken back

  std::shared_ptr<Peer> peer;
  std::vector<std::byte> message;
};

// peer.close(): ends when nothing of the peer's can land here any more, or fails with kNotFenced.
class CloseOperation final : public Operation {
 public:
  CloseOperation(std::weak_ptr<Engine> engine, std::shared_ptr<Peer> peer, int64_t timeout_ns)
      : Operation(std::move(engine)), peer(std::move(peer)), timeout_ns(timeout_ns) {}
  void start(Engine& engine, std::shared_ptr<Operation> self) override;
  void stop(Engine&) override {}

  std::shared_ptr<Peer> peer;
  const int64_t timeout_ns;
  int64_t deadline_ns = 0;
};

class Peer : public std::enable_shared_from_this<Peer> {
 public:
  Peer() = default;
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  ~Peer() { forget_process(); }
  void forget_process() {
    if (pid_fd >= 0) ::close(pid_fd);
    pid_fd = -1;
  }

  uint64_t id = 0;  // of this engine; never reused
  uint64_t connection = 0;
  bool initiator = false;  // we called connect()
  bool same_process = false;
  bool in_setup = false;  // a thread works at its links without the driver's lock
  std::string name;
  std::atomic<PeerState> state{PeerState::kConnecting};
  bool connected() const { return state.load(std::memory_order_relaxed) == PeerState::kConnected; }
  bool ended() const { return state.load(std::memory_order_relaxed) >= PeerState::kClosed; }

  std::vector<std::unique_ptr<PeerLink>> links;  // set by set
  std::deque<RailSet> sets;                      // best first
  RailSet& rails(const Lane& lane) { return sets[lane.set]; }
  const SplitLimits& limits() const { return sets.front().limits; }  // of the best set
  int64_t pid = 0;  // of its process, if that is one of this host that we can see; 0: not
  uint64_t pid_start_ticks = 0;
  int pid_fd = -1;
  int64_t process_looked = 0;  // for it by its number, where there is no descriptor
  int64_t death_seen = 0;      // when the pid_fd told of the process' end; 0: alive as far as we know
  bool process_dead = false;
  bool was_fenced = false;  // by its links, when they were freed
  bool fence_told = false;  // once ended: whoever waits for a fence knows whether there is one
  bool exposed = false;     // it was given our halves: it may write, even if we are not connected yet
  bool confirmed = false;   // it has said that its halves are closed: nothing of it is under way any more
  int64_t last_gone = 0;    // when we told it last that we have given it up
  Failure end_reason;       // valid once ended; read under the driver's lock

  bool any_ready() const {
    return std::any_of(sets.begin(), sets.end(), [](const RailSet& rails) { return rails.any_ready(); });
  }
  int64_t tick_at = std::numeric_limits<int64_t>::max();  // when it is looked at next: Engine::look_at()
  bool due = false;  // may have something to post, to flush or to acknowledge: Engine::note_due()
  bool anything_due() const {
    return any_ready() || ack_due || std::any_of(links.begin(), links.end(), [](const auto& link) {
             return !link->stash.empty() || !link->want_flush.empty();
           });
  }
  Members<Lane*> lanes;       // all that are not finished
  std::vector<Lane*> doubts;  // finished by a refusal, of which it is not known whether the peer means it
  int64_t last_up = 0;        // when a link was up

  // Reliable records.
  struct Unacked {
    uint64_t sequence;
    std::vector<std::byte> frame;
    int64_t sent_ns = 0;  // 0: not yet
    uint32_t tries = 0;
    std::shared_ptr<SendOperation> operation;
    bool answer = false;   // to something that the peer has said
    int64_t first_ns = 0;  // when it was sent first
  };
  std::deque<Unacked> unacked;
  size_t answers_unacked = 0;
  uint64_t next_sequence = 1;
  uint64_t acknowledged = 0;  // up to here
  uint64_t question = 0;      // the record that the newest refusal waits for
  uint64_t taken = 0;         // records received in order up to here
  std::map<uint64_t, std::vector<std::byte>> early;
  bool ack_due = false;

  // Messages in flight are bounded: a sender may be this far ahead of what the receiving user has taken, and loses the
  // connection beyond. Each message counts as some bytes more than it has, because it costs its receiver more.
  static constexpr uint64_t kMessageWindow = 16ull << 20;
  static constexpr uint64_t kMessageOverhead = 256;
  std::deque<std::shared_ptr<SendOperation>> held;  // waiting for room
  uint64_t message_bytes_sent = 0;
  uint64_t message_bytes_taken_there = 0;
  uint64_t message_bytes_arrived = 0;
  uint64_t message_bytes_taken_here = 0;
  std::vector<std::byte> partial_message;  // its last record has not come

  // Fences in progress.
  struct IncomingRevoke {
    uint64_t region;
    uint64_t request;
  };
  std::vector<IncomingRevoke> incoming_revokes;
  // Asked before a write is posted: a withdrawn key would cost the connection on some NICs. Of those that are not
  // remembered any more the peer's NIC refuses the write.
  RecentIds revoked_regions;
  bool close_requested = false;  // the peer asked us to stop
  bool close_sent = false;
  int64_t closed_sent_ns = 0;
  std::vector<std::shared_ptr<CloseOperation>> closers;

  struct Stats {
    uint64_t bytes_written = 0, bytes_read = 0, work_requests = 0, errors = 0;
    uint64_t messages_sent = 0, messages_received = 0, retransmissions = 0;
    uint64_t links_rebuilt = 0, work_requests_resent = 0;
  } stats;
};

}  // namespace railwire
