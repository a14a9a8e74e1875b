// A wire in memory, with seeded misbehaviour: what the guarantees are tested on, and what users test their code on.
//
// A fabric joins any number of simulated NICs of one process. Whatever happens on it is an event with a due time:
// bytes landing, an immediate or a completion or a message arriving. Events are carried out by whichever NIC polls, in
// order of their due times, under the fabric's mutex; there is no thread. With `reorder` every event gets a random
// delay of its own, so anything overtakes anything. Nothing is ever delivered twice, and nothing lands through a link
// half that is closed or in memory that is no longer registered: audit() counts the attempts.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nic/nic.h"

namespace railwire {

struct SimulatedSettings {
  uint64_t seed = 0;
  bool reorder = false;                   // events overtake each other; needs max_delay_us
  double max_delay_us = 0;                // each event is due after a random time up to this
  double write_failure_rate = 0;          // of WRs: an error completion, a random part of the bytes, no immediate
  double link_break_rate = 0;             // of WRs: the connection breaks
  double message_loss_rate = 0;           // of control messages: an error completion instead of delivery
  bool completion_proves_landing = true;  // false: a WR completes when handed over, and lands later
  bool closing_fences = true;
  bool closing_quiets = true;  // false: what is under way is copied out of the source when it lands, closed or not
  bool resumable = false;      // as RC queue pairs: what lands of a link that breaks is a beginning of what was posted,
                               // any error breaks it, and both halves count; not with `reorder`
  bool datagrams = false;      // NicInfo::datagrams
  std::string kind = "sim";    // of its NICs
  uint64_t refuse_above = 0;   // bytes: longer memory is refused; 0: none is
  uint32_t links_per_pair = 1;
  bool discard = false;  // WRs complete at once and go nowhere: a NIC of unlimited speed
  uint64_t max_write_bytes = uint64_t{1} << 40;
  uint32_t link_depth = 256;
  uint32_t max_message_bytes = 64 * 1024;
};

struct SimulatedAudit {
  uint64_t posted = 0, landed = 0, failed = 0, messages = 0, messages_lost = 0;
  uint64_t refused_after_close = 0;  // a landing through a closed half was refused
  uint64_t refused_access = 0;       // wrong key or range
  uint64_t dropped_in_flight = 0;    // the sender closed before it landed
};

struct SimulatedEndpoint;
class SimulatedNic;

// One half of a link. The engine's Link holds it; the fabric holds it weakly, by id.
struct SimulatedHalf {
  struct Outstanding {
    void* context = nullptr;
    void* local = nullptr;  // of reads
    WorkRequest request;    // if resumable
  };
  uint64_t id = 0;
  uint64_t remote_id = 0;
  SimulatedEndpoint* endpoint = nullptr;
  Link* link = nullptr;
  bool open = true;
  bool broken = false;
  std::unordered_map<uint64_t, Outstanding> outstanding;  // by WR number
  uint64_t unlanded = 0;                                  // handed over, not landed
  uint64_t immediates_landed = 0;                         // of the other half's
  int64_t last_due = 0;
};

// What the fabric knows of a NIC.
struct SimulatedEndpoint {
  struct Memory {
    std::byte* address;
    uint64_t length;
    bool writable;
  };
  struct Arrival {
    Completion completion;
    std::vector<std::byte> data = {};
    std::shared_ptr<const WorkRequest> request = {};  // behind completion.request
  };
  std::string name;
  bool dead = false;
  bool frozen = false;
  int event_fd = -1;
  int64_t last_due = 0;
  std::unordered_map<uint64_t, Memory> memory;  // by rkey
  std::deque<Arrival> inbox;
  std::atomic<bool> has_arrivals{false};
  uint32_t fail_next = 0;
  Status fail_status = Status::kOther;
};

class SimulatedFabric {
  using Lock = std::lock_guard<std::recursive_mutex>;

 public:
  // Throws NicError if the name is taken, or not known.
  static std::shared_ptr<SimulatedFabric> create(const std::string& name, const SimulatedSettings& settings);
  static std::shared_ptr<SimulatedFabric> find(const std::string& name);
  static void remove(const std::string& name);

  explicit SimulatedFabric(const SimulatedSettings& settings) { configure(settings); }

  void configure(const SimulatedSettings& settings);
  SimulatedSettings settings();

  // Faults, by NIC name.
  void kill(const std::string& nic);
  void freeze(const std::string& nic, bool frozen);
  void partition(const std::string& a, const std::string& b, bool apart);
  void fail_next(const std::string& nic, uint32_t count, Status status);
  // All connections of the NIC break, as by a fault of its own; new ones can be made.
  void break_links(const std::string& nic);
  void hold(bool held);
  // While held: carries out one event, a random one. False if there is none that could be.
  bool deliver_one();
  SimulatedAudit audit();

  // For SimulatedNic.
  std::shared_ptr<SimulatedEndpoint> attach(const std::string& nic);
  void detach(SimulatedEndpoint& endpoint);
  std::shared_ptr<SimulatedHalf> open_half(SimulatedEndpoint& endpoint, Link* link);
  void close_half(SimulatedHalf& half);
  void post(SimulatedHalf& half, const WorkRequest& wr);
  void send(SimulatedEndpoint& from, const std::string& to, std::span<const std::byte> message, void* context);
  void add_memory(SimulatedEndpoint& endpoint, uint64_t rkey, SimulatedEndpoint::Memory memory);
  void remove_memory(SimulatedEndpoint& endpoint, uint64_t rkey);
  // What the completions refer to is moved to `keep`.
  size_t take(SimulatedEndpoint& endpoint, std::span<Completion> out, std::vector<SimulatedEndpoint::Arrival>& keep);
  uint64_t immediates_landed(SimulatedHalf& half) {
    Lock lock(mutex_);
    return half.immediates_landed;
  }
  bool has_broken(SimulatedHalf& half) {
    Lock lock(mutex_);
    return half.broken;
  }
  bool quiet(SimulatedEndpoint& endpoint);  // nothing that a sleeper would miss
  std::atomic<bool> discard{false};

 private:
  struct Event {
    enum Kind : uint8_t { kLand, kRead, kFlush, kComplete, kArrive } kind;
    std::string from, to;  // NICs
    uint64_t half = 0;     // the initiator's
    uint64_t target_half = 0;
    uint64_t wr = 0;
    uint64_t remote = 0, rkey = 0, length = 0;
    uint32_t flags = 0, immediate = 0;
    bool partial = false;    // of a WR that is to fail
    bool completes = false;  // its completion follows its landing
    Status status = Status::kOk;
    SimulatedEndpoint::Arrival arrival = {};
    std::vector<std::byte> payload = {};
    const std::byte* source = nullptr;  // instead of a payload: the writer's memory, which the peer copies from
  };
  // simulated_events.cpp
  void schedule(Event event, int64_t* after = nullptr);
  void run_due();
  bool blocked(const Event& event) const;
  void carry_out(Event event);
  void land(Event& event);
  void complete(uint64_t half, uint64_t wr, Status status);
  void break_half(SimulatedHalf& half, bool outstanding_may_land);
  void deliver(SimulatedEndpoint& endpoint, SimulatedEndpoint::Arrival arrival);

  // simulated_fabric.cpp
  void end_outstanding(SimulatedHalf& half, Status status);
  void land_a_beginning(SimulatedHalf& half);
  std::shared_ptr<SimulatedHalf> half(uint64_t id);
  SimulatedEndpoint* endpoint(const std::string& name);
  // The same for (a, b) and (b, a).
  static std::pair<std::string, std::string> pair_of(const std::string& a, const std::string& b) {
    return a < b ? std::pair(a, b) : std::pair(b, a);
  }
  bool chance(double rate) { return rate > 0 && std::uniform_real_distribution<>()(random_) < rate; }

  std::recursive_mutex mutex_;
  SimulatedSettings settings_;
  std::mt19937_64 random_;
  std::map<std::string, std::shared_ptr<SimulatedEndpoint>> endpoints_;
  std::unordered_map<uint64_t, std::weak_ptr<SimulatedHalf>> halves_;
  std::multimap<std::pair<int64_t, uint64_t>, Event> events_;  // by (due, random or sequence)
  std::set<std::pair<std::string, std::string>> partitions_;
  bool held_ = false;
  uint64_t next_id_ = 1;
  SimulatedAudit audit_;
};

}  // namespace railwire
