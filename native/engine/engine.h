// The engine: owns the NICs and everything that moves over them.
//
// All state below `drive_` belongs to the *driver*: whichever thread holds that lock. Normally that is the engine's
// worker thread. A thread that waits for an operation drives the engine itself instead of sleeping (no thread needs to
// be woken between the NIC and the caller), and a submission posts its first WRs in the caller if nobody drives just
// then. The driver never takes the GIL, never allocates per WR and never waits for anybody.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine/address_space.h"
#include "engine/clock.h"
#include "engine/control_addresses.h"
#include "engine/counters.h"
#include "engine/doorbell.h"
#include "engine/events.h"
#include "engine/memory.h"
#include "engine/mpsc.h"
#include "engine/peer.h"
#include "engine/share_end.h"
#include "engine/transfer.h"
#include "engine/watcher.h"
#include "nic/nic.h"
#include "nic/quick_lock.h"
#include "nic/setup_thread.h"

namespace railwire {

struct EngineOptions {
  bool spin = false;  // the worker never sleeps
  int cpu = -1;       // pin the worker there; -1: not pinned
  int64_t liveness_ns = 5'000'000'000;
  uint64_t event_tag = 0;            // Event::engine of everything this engine tells
  EventQueue* events = nullptr;      // for the dispatcher
  EventQueue* handshakes = nullptr;  // Event::kHandshake only
};

uint64_t random_u64();  // from the kernel: keys that nobody guesses

// A peer's descriptor that does not lead to memory: malformed, stale, or of another engine.
class BadKeys : public NicError {
 public:
  using NicError::NicError;
};

// region.revoke(): ends when no peer can write to the region under its old key any more.
class RevokeOperation final : public Operation {
 public:
  RevokeOperation(std::weak_ptr<Engine> engine, std::shared_ptr<Region> region, bool reregister, int64_t timeout_ns)
      : Operation(std::move(engine)), region(std::move(region)), reregister(reregister), timeout_ns(timeout_ns) {}
  void start(Engine& engine, std::shared_ptr<Operation> self) override;
  void stop(Engine&) override {}

  std::shared_ptr<Region> region;
  const bool reregister;
  const int64_t timeout_ns;
  int64_t deadline_ns = 0;
  uint64_t request = 0;
  std::unordered_set<uint64_t> waiting_for;                                   // peer ids
  enum class Step : uint8_t { kAsking, kNics, kReady } step = Step::kAsking;  // kNics: the set-up thread works for it
  std::vector<Registration> fresh;
  uint64_t fresh_id = 0;
  std::string problem;
  std::vector<std::shared_ptr<Peer>> unfenced;  // that are gone without a fence
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  Engine(EngineOptions options, std::vector<std::unique_ptr<Nic>> nics);
  ~Engine();
  void run();  // starts the worker; call once, after make_shared

  // ---- any thread, never blocking for long -------------------------------------------------------------------------
  void submit(std::shared_ptr<Operation> operation);
  void request_stop(std::shared_ptr<Operation> operation);
  bool wait_for(Operation& operation, int64_t timeout_ns);

  const std::vector<std::unique_ptr<Nic>>& nics() const { return nics_; }
  const EngineOptions& options() const { return options_; }
  bool closed() const { return closed_.load(std::memory_order_acquire); }

  // ---- any thread; these may block as the NICs' set-up calls do, and throw NicError
  // ----------------------------------
  std::shared_ptr<Region> register_memory(MemorySpec memory, uint64_t owner);
  // Many of host memory, with their ids; all or none.
  std::vector<std::shared_ptr<Region>> register_many(std::span<const AddressRange> ranges,
                                                     std::span<const uint64_t> ids, bool writable, uint64_t owner);
  // A peer's region over this connection: imported at first use. Throws BadKeys.
  std::shared_ptr<const RemoteAccess> reach(const std::shared_ptr<Peer>& peer, RemoteKeys& keys);
  // The best set of rails on which both are registered; null: it does not matter. Throws BadKeys if there is none.
  uint32_t choose_rails(const Peer& peer, const Region* region, const RemoteAccess* remote) const;
  std::shared_ptr<Peer> create_peer(uint64_t connection, bool initiator, std::string name,
                                    const std::vector<LinkPlan>& plan);
  struct LinkHalf {
    std::vector<std::byte> address;
    std::vector<std::byte> pad;  // blob of the landing pad
  };
  // `pid` > 0: the peer is a process of this host whose end can be watched.
  void activate_peer(Peer& peer, const std::vector<LinkHalf>& remote, int64_t pid, uint64_t pid_start_ticks);
  void watch_process(Peer& peer, int64_t pid, uint64_t pid_start_ticks);  // before, while it is being connected
  // False: the NIC had no room (or is still connecting); try again.
  bool send_handshake(uint32_t nic, const std::vector<std::byte>& address, std::span<const std::byte> payload);

  // ---- any thread; these take the driver's lock --------------------------------------------------------------------
  std::vector<std::vector<std::byte>> region_keys(const Region& region, uint64_t* id);  // blobs for peers, by NIC
  // The same of many, by columns. Throws NicError if one is closed.
  struct RegionColumns {
    std::vector<uint64_t> ids, lengths;
    struct Keys {
      std::vector<uint64_t> lengths;
      std::string data;  // one after the other
    };
    std::vector<Keys> keys;  // by NIC
  };
  RegionColumns region_columns(std::span<const std::shared_ptr<Region>> regions);
  std::vector<LinkHalf> link_halves(Peer& peer);
  void abandon_peer(Peer& peer, const std::string& why);  // a handshake that failed
  // With a plan: the driver posts it whenever the word moves, and tells of the ends (of all, or of failures only).
  std::shared_ptr<Watcher> watch(std::shared_ptr<PreparedScatter> plan = nullptr, bool tell_all = false);
  void unwatch(Watcher& watcher);
  uint64_t counter_units(uint32_t id);
  void reset_counter(uint32_t id);
  bool follow(std::shared_ptr<ArrivalWords> words);
  void unfollow(const ArrivalWords& words);
  std::optional<uint32_t> find_unused_ids(uint32_t first, uint32_t count);
  Failure peer_failure(Peer& peer);
  // (kind, usable, links, links that are up)
  void peer_rails(Peer& peer, std::vector<std::tuple<std::string, bool, uint32_t, uint32_t>>& out);
  void message_taken(Peer& peer, uint64_t bytes);

  struct NicStats {
    uint64_t bytes_written = 0, bytes_read = 0, work_requests = 0, completions = 0, errors = 0, immediates = 0,
             messages = 0;
  };
  struct Stats {
    std::vector<NicStats> nics;
    std::vector<std::pair<std::shared_ptr<Peer>, Peer::Stats>> peers;
    uint64_t submitted = 0, done = 0, failed = 0, cancelled = 0, active = 0, units = 0, pending_expectations = 0;
    uint64_t bad_frames = 0, loops = 0, sleeps = 0, inline_drives = 0, regions = 0, control_addresses = 0;
    uint64_t peer_looks = 0;  // at single peers, because of a timer or because something of theirs was due
    std::vector<uint32_t> post_latency_ns;  // submission to first WR posted, the last 1024 that were timed
  };
  Stats stats();

  // Around fork(), see fork.h. hold_still() takes the driver's lock, if it can before `deadline`.
  bool hold_still(int64_t deadline);
  void go_on() { drive_.unlock(); }
  void note_inherited(bool held);

  // Ends everything, within about `timeout_ns`; afterwards no thread of the engine exists. Idempotent. Owners call it
  // before they let go of the engine: regions that transfers still hold must find it when these end.
  void close(int64_t timeout_ns);

  // ---- the driver's own; called by operations ----------------------------------------------------------------------
  Counters& counters() { return counters_; }
  void start_transfer(std::shared_ptr<Transfer> transfer);
  void stop_transfer(Transfer& transfer);
  void start_expectation(std::shared_ptr<Expectation> expectation);
  void start_send(SendOperation& send);
  void stop_send(SendOperation& send);
  void start_close(CloseOperation& close);
  void start_revoke(RevokeOperation& revoke);
  EventQueue& events() { return *options_.events; }
  // ---- any thread: destructors
  // ---------------------------------------------------------------------------------------
  void retire_region(Region& region);
  void release_owner(uint64_t owner);  // nothing native uses its memory any more
  void retire_import(ImportedMemory& imported);
  // ---- the driver's own again
  // ---------------------------------------------------------------------------------------- An operation has ended:
  // whoever sleeps as a driver for it must look.
  void note_finished() { finished_any_ = true; }
  // ---- any thread: what the worker must know of those who look at operations ----------------------------------------
  void note_wait();  // for something that had ended already
  // For Transfer::submitted_ns: the time, or 0 for seven of eight, as two looks at the clock are much for a short
  // write.
  int64_t submission_time() { return made_.fetch_add(1, std::memory_order_relaxed) % 8 == 0 ? now_ns() : 0; }
  void note_listeners(int more) { listeners_.fetch_add(more, std::memory_order_relaxed); }

 private:
  friend class Operation;
  static constexpr int64_t kPingsPerLiveness = 5, kPingShares = 16;

  // worker.cpp, callers.cpp: who drives, and when to sleep
  void worker_main();
  // `now`: of a moment ago. Stops short where only what is waited for has come.
  bool drive(int64_t now, const Operation* waited_for = nullptr);
  void sleep_as_waiter(Operation& operation, int64_t timeout_ns);
  void hand_over();
  // True if something woke it, false if it was only time.
  bool sleep_as_driver(std::unique_lock<DriverLock>& lock, bool worker, int64_t idle_since, int64_t deadline);
  void park(int64_t hold, bool deep);
  bool take_commands();
  bool arm_touched();
  void start(std::shared_ptr<Operation> operation);
  struct Polled {
    bool any = false, only_arrivals = true;
  };
  Polled poll_nics();
  bool has_work(int64_t now) const;
  int64_t next_deadline(int64_t now) const;
  std::unique_lock<DriverLock> lock_driver();
  void lock_again(std::unique_lock<DriverLock>& lock);
  void let_others(std::unique_lock<DriverLock>& lock);
  void tell_sleeper();

  // regions.cpp
  std::shared_lock<std::shared_mutex> enter_setup();  // the NICs stay while it is held; throws if they are gone
  void register_all(const MemorySpec& memory, std::vector<Registration>& registrations);
  void deregister_all(std::vector<Registration>& registrations);
  RemoteAccess::Key import_blob(uint32_t nic, const std::vector<std::byte>& blob,
                                std::vector<std::shared_ptr<const ImportedMemory>>& keep);

  void end_stuck_transfers(const Failure& reason);

  // watchers.cpp
  bool act_on_words(int64_t now);
  void tell_of_action(Watcher& watcher);
  void drop_watcher(const Watcher& watcher);
  void end_watchers();
  void wake();

  // gates.cpp: transfers that wait for a CUDA stream
  bool hold(std::shared_ptr<Transfer>& transfer);
  bool let_in();

  // progress.cpp: posting and completions
  bool pump(Peer& peer, uint64_t byte_budget);
  bool pump_link(RailSet& rails, PeerLink& link, uint64_t& byte_budget);
  static bool touches_revoked(const Lane& lane);
  bool post_at_once(Lane& lane);
  void after_posting(Lane& lane);
  size_t post_some(PeerLink& link, Lane& lane, size_t most, uint64_t& byte_budget);
  void count_posted(PeerLink& link, std::span<const WorkRequest> taken, uint64_t& byte_budget);
  void all_posted(Lane& lane);
  void look_for_break(PeerLink& link);
  void work_request_done(const Completion& completion, uint32_t nic);
  void stop_lane(Lane& lane, Failure failure);
  void drop_stash(Lane& lane);
  void make_ready(Lane& lane);
  void note_due(Peer& peer) {  // each turn of the driver looks at it until nothing is
    if (!std::exchange(peer.due, true)) due_.push_back(&peer);
  }
  std::string link_name(const PeerLink& link) const;

  // landing.cpp: the proof of landing
  void advance(Lane& lane);
  void maybe_flush(PeerLink& link);
  void flush_done(PeerLink& link, Status status);
  void one_more_proven(LaneLink& share);
  static ShareFacts facts_of(const LaneLink& share);
  void all_quiet(Peer& peer);
  void landing_proven(Lane& lane);

  // endings.cpp: the end of lanes and transfers, and what a refused write means
  void lane_failed(Lane& lane, Failure failure);
  void ask_questions();
  bool in_doubt(const Lane& lane) const;
  void settle_doubts(Peer& peer, int64_t now);
  void finish_lane(Lane& lane);
  void end_lane(Lane& lane);
  void let_go(Transfer& transfer);

  // liveness.cpp: links and peers that end
  static bool only_link(const PeerLink& link);
  // `silent`: not even messages pass between the two NICs.
  void link_down(PeerLink& link, Failure failure, LinkEvent why = LinkEvent::kBroke, bool silent = false);
  bool messages_are_refused(const PeerLink& link, int64_t now);
  void pair_silent(PeerLink& link, Failure failure);
  bool break_will_be_told(PeerLink& link);
  void peer_ended(Peer& peer, PeerState state, Failure failure);
  void look_at_rails(Peer& peer, int64_t now);
  void rails_down(Peer& peer, uint32_t set);
  void release_links(Peer& peer);
  void tick(int64_t now);
  void tick_peer(Peer& peer, int64_t now);
  void look_at(Peer& peer, int64_t when);
  int64_t next_look_at(const Peer& peer, int64_t now) const;
  void look_at_processes(int64_t now);
  bool process_has_died(Peer& peer, int64_t now);
  void tick_ended(Peer& peer, int64_t now);
  void stands_still(Peer& peer, int64_t now);

  // failover.cpp: what a broken link had not landed
  static bool another_is_up(const PeerLink& link);  // of its set
  static bool can_resume(const PeerLink& link);
  static bool resendable(Status status);
  void keep_orphan(PeerLink& link, LaneLink& share, const WorkRequest& request);
  void drop_orphans(Lane& lane);
  void resolve_orphans(PeerLink& link);
  void resolve_all_orphans();
  void send_again(PeerLink& from, const WorkRequest& request, LaneLink& share);
  void move_stash(PeerLink& from);

  // links.cpp: the states of links, and new links for broken ones
  static uint32_t move_on(PeerLink& link, LinkEvent event);  // returns what is to be carried out
  void link_event(PeerLink& link, LinkEvent event) { carry_out(link, move_on(link, event)); }
  void carry_out(PeerLink& link, uint32_t actions);
  void look_if_shut(PeerLink& link);
  void look_at_link(PeerLink& link, int64_t now);
  void link_is_late(PeerLink& link);
  void confirmed(PeerLink& link);
  void send_link_record(Peer& peer, const PeerLink& link, RecordType type, std::span<const std::byte> address = {});
  void link_record_arrived(Peer& peer, RecordType type, std::span<const std::byte> body);
  void heard_again(PeerLink& link);
  void make_half(PeerLink& link);
  void half_made(PeerLink& link, std::unique_ptr<Link>& made, std::vector<std::byte> address, std::string problem);
  void join_half(PeerLink& link);
  void rebuild_later(PeerLink& link);
  void link_up(PeerLink& link);

  // records.cpp: control frames in and out
  void message_arrived(uint32_t nic, std::span<const std::byte> data);
  void record_arrived(Peer& peer, std::span<const std::byte> payload);
  void take_record(Peer& peer, std::span<const std::byte> payload);
  void acknowledged(Peer& peer, uint64_t upto);
  void send_record(Peer& peer, RecordType type, std::span<const std::byte> body,
                   std::shared_ptr<SendOperation> operation = nullptr);
  void send_due_records(Peer& peer, int64_t now);
  void send_message(Peer& peer, std::span<const std::byte> message, std::shared_ptr<SendOperation> operation);
  bool take_message(Peer& peer, std::span<const std::byte> body, bool last);
  void cut_off(Peer& peer, const std::string& what);
  void send_held_messages(Peer& peer);
  void send_credit(Peer& peer);
  bool send_frame(Peer& peer, PeerLink& path, std::span<const std::byte> frame);
  void take_early_records(Peer& peer);
  void say_gone(Peer& peer, PeerLink& path);
  bool send_simple(Peer& peer, PeerLink& path, FrameType type, uint64_t value);
  PeerLink* control_path(Peer& peer, uint32_t attempt);
  void send_failed(uint64_t peer, uint32_t link, int32_t error, uint32_t nic);

  // fences.cpp: revoke and close, both sides
  void check_incoming_revokes(Peer& peer);
  void revoke_confirmed(Peer& peer, uint64_t request);
  void revoke_peer_gone(Peer& peer, bool fenced);
  static bool process_over(Peer& peer);
  static bool fenced_by_now(Peer& peer);
  static void drop_fenced(std::vector<std::shared_ptr<Peer>>& peers);
  void finish_revoke(RevokeOperation& revoke);
  void register_anew(RevokeOperation& revoke);
  void replace_registrations(RevokeOperation& revoke);
  void revoke_done(RevokeOperation& revoke);
  void close_step(Peer& peer);
  static bool links_fenced(const Peer& peer);
  static bool fence_is_coming(const Peer& peer);
  void tell_of_fence(Peer& peer);

  const EngineOptions options_;
  std::vector<std::unique_ptr<Nic>> nics_;
  ControlAddresses control_addresses_;
  SetupThread setup_thread_;
  std::shared_mutex setup_gate_;  // shared by who makes set-up calls, alone for who takes the NICs away

  MpscQueue commands_;
  std::atomic<bool> closing_{false};
  std::atomic<bool> closed_{false};
  bool inherited_ = false;  // this process is a child of the one that made it: nothing may be touched; set at fork()
  std::atomic<bool> stop_worker_{false};
  std::mutex close_mutex_;
  std::thread worker_;

  enum class Rest : uint8_t { kNone, kAsleep, kParked, kParkedDeep };
  std::mutex waiting_mutex_;
  std::vector<Operation*> waiting_;  // of threads that sleep while another one drives for them
  std::atomic<Rest> worker_rest_{Rest::kNone};
  std::atomic<bool> inline_asleep_{false};
  std::atomic<uint32_t> inline_waiters_{0};
  std::atomic<uint32_t> lock_waiters_{0};
  std::atomic<int64_t> last_inline_ns_{0};
  std::atomic<uint32_t> inline_submissions_{0};  // written by whoever holds drive_
  std::atomic<uint32_t> made_{0};                // transfers, submitted or about to be
  std::atomic<int> listeners_{0};                // operations whose end the dispatcher is to be told of
  Doorbell worker_bell_;
  Doorbell inline_bell_;

  DriverLock drive_;
  // ---- guarded by drive_ -------------------------------------------------------------------------------------------
  Counters counters_;
  Members<std::shared_ptr<Transfer>> active_;
  std::vector<std::shared_ptr<Transfer>> held_;  // wait for CUDA streams
  std::vector<Peer*> touched_;                   // by what has just been started: they have lanes that can be posted
  std::vector<Peer*> due_;                       // of which each has something to post, to flush or to acknowledge
  std::vector<std::shared_ptr<Peer>> peers_;     // not ended, or with links not yet released
  std::unordered_map<uint64_t, Peer*> by_id_;    // the same
  std::unordered_map<uint64_t, std::array<Peer*, 2>> by_connection_;  // [initiator]
  std::vector<std::shared_ptr<RevokeOperation>> revokes_;
  std::vector<std::shared_ptr<Peer>> unfenced_;  // lost, and may still write: no revoke is a fence until their end
  std::vector<std::shared_ptr<Watcher>> watchers_;
  size_t acting_ = 0;                            // of them the driver looks at
  int64_t watcher_activity_ns_ = 0;              // of these
  int processes_ = -1;                           // an epoll descriptor: readable when the process of a peer has ended
  std::vector<std::array<std::byte, 64>> pads_;  // landing pads: one cache line a NIC, never read
  std::vector<Registration> pad_registrations_;
  std::mutex memory_mutex_;  // guards the next four: destructors on any thread touch them
  std::unordered_set<Region*> live_regions_;
  std::unordered_set<ImportedMemory*> live_imports_;
  std::map<std::pair<uint32_t, std::vector<std::byte>>, std::weak_ptr<const ImportedMemory>> imports_;
  bool nics_gone_ = false;
  uint64_t next_peer_ = 1;
  uint64_t next_request_ = 1;
  int64_t next_tick_ = 0;
  std::vector<std::pair<int64_t, uint64_t>> ticks_, due_ticks_;  // a heap: when to look at which peer
  // When a sleeping driver wakes by itself; max: none sleeps.
  int64_t asleep_until_ = std::numeric_limits<int64_t>::max();
  int64_t next_look_ = 0;  // at the processes of peers
  int64_t last_tick_ = 0;
  bool finished_any_ = false;
  bool questions_due_ = false;  // a peer that refused is to be asked whether it lives
  bool orphans_due_ = false;    // a link that broke may be ready for what it had not landed to be sent again
  // What a step works on. Kept, because to clear it for each look at a queue would take longer than the look.
  static constexpr size_t kBatch = 64;
  std::array<WorkRequest, kBatch> batch_;
  std::array<Completion, kBatch> completions_;
  std::vector<NicStats> nic_stats_;
  Stats totals_;
  uint64_t post_samples_ = 0;
  std::array<uint32_t, 1024> post_latency_{};
};

}  // namespace railwire
