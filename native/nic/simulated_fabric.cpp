// What is on a simulated wire: NICs, links, memory and faults, and what a NIC hands over and takes.
#include "nic/simulated_fabric.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "nic/nic.h"
#include "nic/process_lock.h"

namespace railwire {
namespace {

ProcessLock registry_mutex;
std::map<std::string, std::shared_ptr<SimulatedFabric>> registry;

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
    partitions_.insert(pair_of(a, b));
  } else {
    partitions_.erase(pair_of(a, b));
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
    if (ours && (event.kind == Event::kFlush || (settings_.closing_quiets && random_() % 2))) {
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
    if (settings_.closing_quiets || event.partial) {
      if (wr.length) event.payload.assign(bytes, bytes + wr.length);
    } else {
      event.source = bytes;  // read when it lands, by the peer
    }
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
