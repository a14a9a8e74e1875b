// The wire: events, their order, and what they do.
#include "nic/simulated_fabric.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "nic/nic.h"

namespace railwire {
namespace {

std::mutex registry_mutex;
std::map<std::string, std::shared_ptr<SimulatedFabric>> registry;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

std::pair<std::string, std::string> ordered(const std::string& a, const std::string& b) {
  return a < b ? std::pair(a, b) : std::pair(b, a);
}

}  // namespace

std::shared_ptr<SimulatedFabric> SimulatedFabric::create(const std::string& name, const SimulatedSettings& settings) {
  std::lock_guard lock(registry_mutex);
  auto& entry = registry[name];
  if (entry) throw NicError("a simulated fabric \"" + name + "\" exists already");
  entry = std::make_shared<SimulatedFabric>(settings);
  return entry;
}

std::shared_ptr<SimulatedFabric> SimulatedFabric::find(const std::string& name) {
  std::lock_guard lock(registry_mutex);
  const auto found = registry.find(name);
  if (found == registry.end()) {
    throw NicError("there is no simulated fabric \"" + name + "\": create it with railwire.testing.SimulatedFabric");
  }
  return found->second;
}

void SimulatedFabric::remove(const std::string& name) {
  std::lock_guard lock(registry_mutex);
  registry.erase(name);
}

void SimulatedFabric::configure(const SimulatedSettings& settings) {
  Lock lock(mutex_);
  if (settings.seed != settings_.seed || next_id_ == 1) random_.seed(settings.seed);
  settings_ = settings;
  discard.store(settings.discard);
}

SimulatedSettings SimulatedFabric::settings() {
  Lock lock(mutex_);
  return settings_;
}

SimulatedEndpoint* SimulatedFabric::endpoint(const std::string& name) {
  const auto found = endpoints_.find(name);
  return found == endpoints_.end() ? nullptr : found->second.get();
}

std::shared_ptr<SimulatedHalf> SimulatedFabric::half(uint64_t id) {
  const auto found = halves_.find(id);
  return found == halves_.end() ? nullptr : found->second.lock();
}

// ---- faults
// --------------------------------------------------------------------------------------------------------------
void SimulatedFabric::kill(const std::string& nic) {
  Lock lock(mutex_);
  SimulatedEndpoint* dead = endpoint(nic);
  if (!dead) throw NicError("no simulated NIC \"" + nic + "\"");
  dead->dead = true;
  std::vector<std::shared_ptr<SimulatedHalf>> hit;
  for (const auto& [id, weak] : halves_) {
    const auto one = weak.lock();
    if (!one) continue;
    const auto other = half(one->remote_id);
    if (one->endpoint == dead || (other && other->endpoint == dead)) hit.push_back(one);
  }
  for (const auto& one : hit) break_half(*one, true);
}

void SimulatedFabric::freeze(const std::string& nic, bool frozen) {
  Lock lock(mutex_);
  SimulatedEndpoint* found = endpoint(nic);
  if (!found) throw NicError("no simulated NIC \"" + nic + "\"");
  found->frozen = frozen;
  const uint64_t one = 1;
  if (!frozen) [[maybe_unused]]
    ssize_t n = write(found->event_fd, &one, sizeof one);
}

void SimulatedFabric::partition(const std::string& a, const std::string& b, bool apart) {
  Lock lock(mutex_);
  if (apart) {
    partitions_.insert(ordered(a, b));
  } else {
    partitions_.erase(ordered(a, b));
  }
}

void SimulatedFabric::fail_next(const std::string& nic, uint32_t count, Status status) {
  Lock lock(mutex_);
  SimulatedEndpoint* found = endpoint(nic);
  if (!found) throw NicError("no simulated NIC \"" + nic + "\"");
  found->fail_next = count;
  found->fail_status = status;
}

void SimulatedFabric::hold(bool held) {
  Lock lock(mutex_);
  held_ = held;
  const uint64_t one = 1;
  for (const auto& [name, other] : endpoints_) {
    [[maybe_unused]] ssize_t n = write(other->event_fd, &one, sizeof one);
  }
}

bool SimulatedFabric::deliver_one() {
  Lock lock(mutex_);
  std::vector<decltype(events_)::iterator> ready;
  for (auto it = events_.begin(); it != events_.end(); ++it) {
    if (!blocked(it->second)) ready.push_back(it);
  }
  if (ready.empty()) return false;
  const auto chosen = ready[random_() % ready.size()];
  Event event = std::move(chosen->second);
  events_.erase(chosen);
  carry_out(std::move(event));
  return true;
}

SimulatedAudit SimulatedFabric::audit() {
  Lock lock(mutex_);
  return audit_;
}

// ---- NICs, links and memory
// ------------------------------------------------------------------------------------------
std::shared_ptr<SimulatedEndpoint> SimulatedFabric::attach(const std::string& nic) {
  Lock lock(mutex_);
  if (nic.empty() || nic.size() > 100) throw NicError("a simulated NIC needs a name, as in sim://FABRIC/NAME");
  auto& entry = endpoints_[nic];
  if (entry) throw NicError("simulated NIC \"" + nic + "\" is in use already");
  entry = std::make_shared<SimulatedEndpoint>();
  entry->name = nic;
  entry->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  return entry;
}

void SimulatedFabric::detach(SimulatedEndpoint& gone) {
  Lock lock(mutex_);
  for (const auto& [id, weak] : halves_) {
    const auto one = weak.lock();
    if (one && one->endpoint == &gone) close_half(*one);
  }
  ::close(gone.event_fd);
  gone.event_fd = -1;
  gone.memory.clear();
  endpoints_.erase(gone.name);
}

std::shared_ptr<SimulatedHalf> SimulatedFabric::open_half(SimulatedEndpoint& endpoint, Link* link) {
  Lock lock(mutex_);
  auto made = std::make_shared<SimulatedHalf>();
  made->id = random_() | 1;
  made->endpoint = &endpoint;
  made->link = link;
  ++next_id_;
  std::erase_if(halves_, [](const auto& entry) { return entry.second.expired(); });
  halves_[made->id] = made;
  return made;
}

void SimulatedFabric::close_half(SimulatedHalf& closed) {
  Lock lock(mutex_);
  if (!closed.open) return;
  closed.open = false;
  if (settings_.resumable) land_a_beginning(closed);
  // What is on the wire already lands or not, as with any connection that is cut.
  for (auto it = events_.begin(); it != events_.end();) {
    const Event& event = it->second;
    const bool ours = event.half == closed.id && (event.kind == Event::kLand || event.kind == Event::kFlush);
    if (ours && (event.kind == Event::kFlush || random_() % 2)) {
      ++audit_.dropped_in_flight;
      it = events_.erase(it);
    } else {
      ++it;
    }
  }
  end_outstanding(closed, Status::kFlushed);
}

// In the order of posting.
void SimulatedFabric::end_outstanding(SimulatedHalf& half, Status status) {
  std::vector<uint64_t> numbers;
  for (const auto& [wr, waiting] : half.outstanding) numbers.push_back(wr);
  std::sort(numbers.begin(), numbers.end());
  for (const uint64_t wr : numbers) complete(half.id, wr, status);
}

// Of what is under way a beginning of random length lands, and the rest never does.
void SimulatedFabric::land_a_beginning(SimulatedHalf& half) {
  std::vector<Event> under_way;
  for (auto it = events_.begin(); it != events_.end();) {
    if (it->second.half == half.id && it->second.kind == Event::kLand) {
      under_way.push_back(std::move(it->second));
      it = events_.erase(it);
    } else {
      ++it;
    }
  }
  size_t landing = under_way.empty() ? 0 : random_() % (under_way.size() + 1);
  for (Event& event : under_way) {
    if (landing == 0 || event.status != Status::kOk) {
      landing = 0;
      ++audit_.dropped_in_flight;
      continue;
    }
    --landing;
    event.completes = false;  // by the break
    land(event);
  }
}

void SimulatedFabric::break_links(const std::string& nic) {
  Lock lock(mutex_);
  const SimulatedEndpoint* found = endpoint(nic);
  if (!found) throw NicError("no simulated NIC \"" + nic + "\"");
  std::vector<std::shared_ptr<SimulatedHalf>> hit;
  for (const auto& [id, weak] : halves_) {
    const auto one = weak.lock();
    if (one && one->open && one->endpoint == found) hit.push_back(one);
  }
  for (const auto& one : hit) break_half(*one, true);
}

void SimulatedFabric::add_memory(SimulatedEndpoint& endpoint, uint64_t rkey, SimulatedEndpoint::Memory memory) {
  Lock lock(mutex_);
  endpoint.memory[rkey] = memory;
}

void SimulatedFabric::remove_memory(SimulatedEndpoint& endpoint, uint64_t rkey) {
  Lock lock(mutex_);
  endpoint.memory.erase(rkey);
}

// ---- events
// --------------------------------------------------------------------------------------------------------------
// `after`: the due time of the last event of the same stream, which this one follows unless events may overtake.
void SimulatedFabric::schedule(Event event, int64_t* after) {
  const int64_t delay =
      settings_.max_delay_us > 0
          ? static_cast<int64_t>(std::uniform_real_distribution<>(0, settings_.max_delay_us)(random_) * 1e3)
          : 0;
  if (delay == 0 && !held_ && !settings_.reorder && events_.empty() && !blocked(event)) {
    carry_out(std::move(event));
    return;
  }
  int64_t due = now_ns() + delay;
  if (!settings_.reorder && after) due = *after = std::max(due, *after);
  const uint64_t tie = settings_.reorder ? random_() : next_id_++;
  const std::string from = event.from, to = event.to;
  events_.emplace(std::pair(due, tie), std::move(event));
  const uint64_t one = 1;
  for (const auto& name : {from, to}) {  // someone has to poll for it
    if (SimulatedEndpoint* found = endpoint(name); found && found->event_fd >= 0) {
      [[maybe_unused]] ssize_t n = write(found->event_fd, &one, sizeof one);
    }
  }
}

bool SimulatedFabric::blocked(const Event& event) const {
  for (const auto& name : {event.from, event.to}) {
    const auto found = endpoints_.find(name);
    if (found != endpoints_.end() && found->second->frozen) return true;
  }
  return !partitions_.empty() && partitions_.contains(ordered(event.from, event.to));
}

void SimulatedFabric::run_due() {
  if (held_ || events_.empty()) return;
  const int64_t now = now_ns();
  for (auto it = events_.begin(); it != events_.end() && it->first.first <= now;) {
    if (blocked(it->second)) {
      ++it;
      continue;
    }
    Event event = std::move(it->second);
    events_.erase(it);
    carry_out(std::move(event));
    it = events_.begin();
  }
}

void SimulatedFabric::carry_out(Event event) {
  switch (event.kind) {
    case Event::kLand:
      land(event);
      break;
    case Event::kFlush: {
      const auto initiator = half(event.half);
      if (!initiator || !initiator->open) break;
      if (initiator->broken) {
        complete(event.half, event.wr, Status::kUnreachable);
      } else if (initiator->unlanded > 0) {
        events_.emplace(std::pair(now_ns() + 1000, random_()), std::move(event));  // looks again
      } else {
        land(event);
      }
      break;
    }
    case Event::kRead: {
      const auto initiator = half(event.half);
      if (!initiator) break;
      const auto waiting = initiator->outstanding.find(event.wr);
      if (waiting == initiator->outstanding.end()) break;
      const auto target = half(event.target_half);
      Status status = event.status;
      if (status == Status::kOk && (!target || !target->open || target->endpoint->dead)) status = Status::kUnreachable;
      if (status == Status::kOk) {
        const auto found = target->endpoint->memory.find(event.rkey);
        if (found == target->endpoint->memory.end() || event.remote > found->second.length ||
            event.length > found->second.length - event.remote) {
          ++audit_.refused_access;
          status = Status::kRemoteAccess;
        } else if (event.length) {
          std::memcpy(waiting->second.local, found->second.address + event.remote, event.length);
        }
      }
      if (status == Status::kUnreachable) break_half(*initiator, false);
      complete(event.half, event.wr, status);
      break;
    }
    case Event::kComplete:
      complete(event.half, event.wr, event.status);
      break;
    case Event::kArrive: {
      SimulatedEndpoint* to = endpoint(event.to);
      if (to && !to->dead) deliver(*to, std::move(event.arrival));
      break;
    }
  }
}

void SimulatedFabric::land(Event& event) {
  const auto initiator = half(event.half);
  const auto target = half(event.target_half);
  if (initiator && initiator->unlanded > 0 && event.kind == Event::kLand) --initiator->unlanded;
  Status status = event.status;
  if (!target || !target->open || target->broken || target->endpoint->dead) {
    ++audit_.refused_after_close;
    status = Status::kUnreachable;
  } else {
    const auto found = target->endpoint->memory.find(event.rkey);
    const bool inside = found != target->endpoint->memory.end() && event.remote <= found->second.length &&
                        event.length <= found->second.length - event.remote;
    const bool needs_memory = event.length > 0;
    if (needs_memory && !inside) {
      ++audit_.refused_access;
      status = Status::kRemoteAccess;
    } else {
      const uint64_t bytes = event.partial && event.length ? random_() % event.length : event.length;
      if (bytes) std::memcpy(found->second.address + event.remote, event.payload.data(), bytes);
      if (status == Status::kOk) {
        ++audit_.landed;
        if (event.flags & WorkRequest::kImmediate) {
          SimulatedEndpoint::Arrival arrival{{.kind = Completion::kImmediate, .immediate = event.immediate}};
          if (settings_.resumable) {  // counted is what will be handed out, even if the NIC dies now
            ++target->immediates_landed;
            deliver(*target->endpoint, std::move(arrival));
          } else {
            schedule({.kind = Event::kArrive, .from = event.from, .to = event.to, .arrival = std::move(arrival)},
                     &target->endpoint->last_due);
          }
        }
      }
    }
  }
  if (status != Status::kOk && settings_.resumable && initiator && !initiator->broken) {
    if (status != Status::kUnreachable) {  // a refusal also acknowledges all before it
      std::vector<uint64_t> earlier;
      for (const auto& [wr, waiting] : initiator->outstanding) {
        if (wr < event.wr) earlier.push_back(wr);
      }
      std::sort(earlier.begin(), earlier.end());
      for (const uint64_t wr : earlier) complete(event.half, wr, Status::kOk);
      complete(event.half, event.wr, status);
    }
    event.completes = false;
    break_half(*initiator, false);
  }
  if (status == Status::kUnreachable && initiator) break_half(*initiator, false);
  if (event.completes) {
    schedule({.kind = Event::kComplete,
              .from = event.from,
              .to = event.from,
              .half = event.half,
              .wr = event.wr,
              .status = status},
             initiator ? &initiator->last_due : nullptr);
  } else if (status != Status::kOk && initiator) {
    break_half(*initiator, true);  // it has completed already: losing the connection is the only way to tell
  }
}

void SimulatedFabric::complete(uint64_t id, uint64_t wr, Status status) {
  const auto initiator = half(id);
  if (!initiator) return;
  const auto waiting = initiator->outstanding.find(wr);
  if (waiting == initiator->outstanding.end()) return;
  if (status != Status::kOk) ++audit_.failed;
  SimulatedEndpoint::Arrival arrival{.completion = {.kind = Completion::kWorkRequest,
                                                    .status = status,
                                                    .context = waiting->second.context,
                                                    .link = initiator->link}};
  if (settings_.resumable) arrival.request = std::make_shared<const WorkRequest>(waiting->second.request);
  initiator->outstanding.erase(waiting);
  deliver(*initiator->endpoint, std::move(arrival));
}

// The connection is gone: everything outstanding ends; what had not landed lands (with its immediate) or does not.
void SimulatedFabric::break_half(SimulatedHalf& broken, bool outstanding_may_land) {
  if (broken.broken) return;
  broken.broken = true;
  if (settings_.resumable) {
    land_a_beginning(broken);
  } else if (!outstanding_may_land) {
    std::erase_if(events_, [&](const auto& entry) {
      return entry.second.half == broken.id && entry.second.kind == Event::kLand && random_() % 2;
    });
  }
  end_outstanding(broken, Status::kUnreachable);
}

void SimulatedFabric::deliver(SimulatedEndpoint& to, SimulatedEndpoint::Arrival arrival) {
  to.inbox.push_back(std::move(arrival));
  to.has_arrivals.store(true, std::memory_order_release);
  const uint64_t one = 1;
  if (to.event_fd >= 0) [[maybe_unused]]
    ssize_t n = write(to.event_fd, &one, sizeof one);
}

// ---- what NICs do
// --------------------------------------------------------------------------------------------------------
void SimulatedFabric::post(SimulatedHalf& from, const WorkRequest& wr) {
  Lock lock(mutex_);
  const auto target = half(from.remote_id);
  ++audit_.posted;
  const uint64_t number = next_id_++;
  from.outstanding[number] = {wr.context, wr.local, wr};
  if (settings_.resumable && from.broken) {
    complete(from.id, number, Status::kFlushed);
    return;
  }
  Event event{.kind = wr.flags & WorkRequest::kRead    ? Event::kRead
                      : wr.flags & WorkRequest::kFlush ? Event::kFlush
                                                       : Event::kLand,
              .from = from.endpoint->name,
              .to = target ? target->endpoint->name : std::string(),
              .half = from.id,
              .target_half = from.remote_id,
              .wr = number,
              .remote = wr.remote,
              .rkey = wr.rkey,
              .length = wr.length,
              .flags = wr.flags,
              .immediate = wr.immediate};
  if (from.endpoint->fail_next > 0) {
    --from.endpoint->fail_next;
    event.status = from.endpoint->fail_status;
  } else if (chance(settings_.write_failure_rate)) {
    event.status = Status::kOther;
  } else if (chance(settings_.link_break_rate)) {
    break_half(from, true);
    return;
  }
  event.partial = event.status != Status::kOk;
  if (event.kind == Event::kLand || event.kind == Event::kFlush) {
    const auto* bytes = static_cast<const std::byte*>(wr.local);
    if (wr.length) event.payload.assign(bytes, bytes + wr.length);
  }
  event.completes = event.kind == Event::kFlush || settings_.completion_proves_landing || event.partial;
  if (event.kind == Event::kLand) ++from.unlanded;
  const bool early = !event.completes && event.kind == Event::kLand;
  const std::string name = event.from;
  schedule(std::move(event), &from.last_due);
  if (early) {
    schedule({.kind = Event::kComplete, .from = name, .to = name, .half = from.id, .wr = number}, &from.last_due);
  }
}

void SimulatedFabric::send(SimulatedEndpoint& from, const std::string& to, std::span<const std::byte> message,
                           void* context) {
  Lock lock(mutex_);
  ++audit_.messages;
  const SimulatedEndpoint* target = endpoint(to);
  const bool lost = !target || target->dead || from.dead || chance(settings_.message_loss_rate);
  audit_.messages_lost += lost;
  schedule(
      {.kind = Event::kArrive,
       .from = from.name,
       .to = from.name,
       .arrival = {{.kind = Completion::kSend, .status = lost ? Status::kUnreachable : Status::kOk, .context = context},
                   {}}},
      &from.last_due);
  if (lost) return;
  schedule({.kind = Event::kArrive,
            .from = from.name,
            .to = to,
            .arrival = {{.kind = Completion::kMessage}, std::vector<std::byte>(message.begin(), message.end())}},
           &from.last_due);
}

size_t SimulatedFabric::take(SimulatedEndpoint& to, std::span<Completion> out,
                             std::vector<SimulatedEndpoint::Arrival>& keep) {
  Lock lock(mutex_);
  run_due();
  if (to.frozen) return 0;
  size_t n = 0;
  while (n < out.size() && !to.inbox.empty()) {
    auto& arrival = to.inbox.front();
    out[n] = arrival.completion;
    if (out[n].kind == Completion::kMessage) {
      keep.push_back(std::move(arrival));
      out[n].data = keep.back().data;
    } else if (arrival.request) {
      keep.push_back(std::move(arrival));
      out[n].request = keep.back().request.get();
    }
    ++n;
    to.inbox.pop_front();
  }
  if (to.inbox.empty()) to.has_arrivals.store(false, std::memory_order_relaxed);
  return n;
}

bool SimulatedFabric::quiet(SimulatedEndpoint& sleeper) {
  Lock lock(mutex_);
  uint64_t count;
  [[maybe_unused]] ssize_t n = read(sleeper.event_fd, &count, sizeof count);
  if (!sleeper.inbox.empty() && !sleeper.frozen) return false;
  if (held_) return true;
  return std::none_of(events_.begin(), events_.end(), [this](const auto& entry) { return !blocked(entry.second); });
}

}  // namespace railwire
