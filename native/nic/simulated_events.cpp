// The events of a simulated wire: their order, and what they do.
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "nic/nic.h"
#include "nic/simulated_fabric.h"

namespace railwire {
namespace {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

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
  return !partitions_.empty() && partitions_.contains(pair_of(event.from, event.to));
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
  if (event.source) event.payload.assign(event.source, event.source + event.length);
  Status status = event.status;
  if (!target || !target->open || target->broken || target->endpoint->dead) {
    ++audit_.refused_after_close;
    status = Status::kUnreachable;
  } else {
    const auto found = target->endpoint->memory.find(event.rkey);
    const bool inside = found != target->endpoint->memory.end() && found->second.writable &&
                        event.remote <= found->second.length && event.length <= found->second.length - event.remote;
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
      // Nothing behind it has landed, or the receiver's count would not tell what has.
      audit_.dropped_in_flight += std::erase_if(events_, [&](const auto& entry) {
        return entry.second.half == event.half && entry.second.kind == Event::kLand;
      });
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

}  // namespace railwire
