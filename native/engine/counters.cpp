// Immediate counters and the expectations on them.
#include "engine/counters.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "engine/arrival_words.h"
#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {

Expectation::Expectation(std::weak_ptr<Engine> engine, uint32_t id, uint64_t units, std::vector<uint64_t> peers,
                         int64_t timeout_ns)
    : Operation(std::move(engine)),
      id(id),
      units(units),
      peers(std::move(peers)),
      timeout_ns(timeout_ns),
      deadline_ns(now_ns() + timeout_ns) {}

void Expectation::start(Engine& engine, std::shared_ptr<Operation> self) {
  engine.start_expectation(std::static_pointer_cast<Expectation>(std::move(self)));
}
void Expectation::stop(Engine& engine) { engine.counters().cancel(*this); }

bool Expectation::depends_on(uint64_t peer) const {
  return peers.empty() || std::find(peers.begin(), peers.end(), peer) != peers.end();
}

Counters::Page* Counters::add_page(uint32_t id) {
  auto& page = pages_[id / kPageSize];
  if (!page) page = std::make_unique<Page>();
  return page.get();
}

Counters::Slot& Counters::slot(uint32_t id) { return (*add_page(id))[id % kPageSize]; }

Counters::Detail& Counters::detail(Slot& s) {
  if (!s.detail) s.detail = spare_detail_ ? std::move(spare_detail_) : std::make_unique<Detail>();
  return *s.detail;
}

void Counters::expect(std::shared_ptr<Expectation> expectation) {
  Slot& s = slot(expectation->id);
  for (const auto& poison : detail(s).poisons) {
    if (expectation->depends_on(poison.peer)) {
      expectation->finish(State::kFailed, {Reason::kWriterFailed, poison.peer, "", poison.why});
      return;
    }
  }
  pending_.insert(expectation.get());
  earliest_ = std::min(earliest_, expectation->deadline_ns);
  const uint32_t id = expectation->id;
  s.detail->waiting.push_back(std::move(expectation));
  settle(id, s);
}

void Counters::settle(uint32_t id, Slot& s) {
  auto& detail = *s.detail;
  while (!detail.waiting.empty() && s.units >= detail.waiting.front()->units) {
    const auto expectation = std::move(detail.waiting.front());
    detail.waiting.pop_front();
    s.units -= expectation->units;
    pending_.erase(*expectation);
    expectation->finish_done();
  }
  if (detail.words) {
    detail.words->publish(id, s.units, !detail.poisons.empty());
    return;
  }
  if (detail.waiting.empty() && detail.poisons.empty()) spare_detail_ = std::move(s.detail);
}

void Counters::end(Expectation& expectation, State state, Failure failure) {
  pending_.erase(expectation);
  expectation.finish(state, std::move(failure));
}

std::vector<std::shared_ptr<Expectation>> Counters::take_if(auto&& predicate) {
  std::vector<std::shared_ptr<Expectation>> taken;
  std::set<uint32_t> touched;
  for (const Expectation* pending : pending_) {
    if (predicate(*pending)) touched.insert(pending->id);
  }
  for (uint32_t id : touched) take_of(id, predicate, taken);
  return taken;
}

void Counters::take_of(uint32_t id, auto&& predicate, std::vector<std::shared_ptr<Expectation>>& taken) {
  Slot& s = slot(id);
  if (!s.detail) return;
  std::erase_if(s.detail->waiting, [&](std::shared_ptr<Expectation>& waiting) {
    if (!predicate(*waiting)) return false;
    taken.push_back(std::move(waiting));
    return true;
  });
  settle(id, s);
}

void Counters::cancel(Expectation& expectation) {
  std::vector<std::shared_ptr<Expectation>> one;
  take_of(expectation.id, [&](const Expectation& e) { return &e == &expectation; }, one);
  for (const auto& taken : one) {
    end(*taken, State::kCancelled, {Reason::kCancelled, 0, "", "the expectation was cancelled"});
  }
}

bool Counters::poison(uint32_t id, uint64_t peer, const std::string& why) {
  if (poisons_ >= kMostPoisons) return false;
  Slot& s = slot(id);
  auto& poisons = detail(s).poisons;
  const bool known = std::any_of(poisons.begin(), poisons.end(), [=](const auto& p) { return p.peer == peer; });
  if (!known) {
    poisons.push_back({peer, why});
    ++poisons_;
  }
  std::vector<std::shared_ptr<Expectation>> hit;
  take_of(id, [=](const Expectation& e) { return e.depends_on(peer); }, hit);
  for (const auto& taken : hit) end(*taken, State::kFailed, {Reason::kWriterFailed, peer, "", why});
  return true;
}

void Counters::reset(uint32_t id) {
  Slot& s = slot(id);
  s.units = 0;
  if (!s.detail) return;
  poisons_ -= s.detail->poisons.size();
  s.detail->poisons.clear();
  if (s.detail->words) s.detail->words->clear(id);
  settle(id, s);
}

bool Counters::follow(std::shared_ptr<ArrivalWords> words) {
  const auto end = words->first + static_cast<uint32_t>(words->size());
  for (uint32_t id = words->first; id < end; ++id) {
    const Slot& s = slot(id);
    if (s.detail && s.detail->words) return false;
  }
  for (uint32_t id = words->first; id < end; ++id) {
    detail(slot(id)).words = words.get();
    settle(id, slot(id));
  }
  followers_.push_back(std::move(words));
  return true;
}

void Counters::unfollow(const ArrivalWords& words) {
  const auto is = [&](const auto& other) { return other.get() == &words; };
  const auto found = std::find_if(followers_.begin(), followers_.end(), is);
  if (found == followers_.end()) return;
  const auto keep = *found;
  followers_.erase(found);
  for (uint32_t id = keep->first; id < keep->first + static_cast<uint32_t>(keep->size()); ++id) {
    Slot& s = slot(id);
    s.detail->words = nullptr;
    settle(id, s);
  }
}

uint64_t Counters::units(uint32_t id) const {
  const auto& page = pages_[id / kPageSize];
  return page ? (*page)[id % kPageSize].units : 0;
}

std::optional<uint32_t> Counters::find_unused(uint32_t first, uint32_t count) const {
  const auto used = [this](uint32_t id) {
    const auto& page = pages_[id / kPageSize];
    return page && ((*page)[id % kPageSize].units > 0 || (*page)[id % kPageSize].detail);
  };
  // Once around, and on to where the first one looked at would be the last of a row.
  uint32_t begin = first, length = 0;
  for (uint32_t looked = 0; looked < kImmediateIds + count; ++looked) {
    const uint32_t id = begin + length;
    if (id >= kImmediateIds) {
      begin = 1;  // 0 is for users who choose by themselves
      length = 0;
    } else if (used(id)) {
      begin = id + 1;
      length = 0;
    } else if (++length == count) {
      return begin;
    }
  }
  return std::nullopt;
}

void Counters::peer_lost(uint64_t peer, const std::string& why, bool named) {
  for (const auto& words : followers_) {
    for (size_t i = 0; i < words->size(); ++i) {
      if (words->writers[i] == peer) words->fail(i);
    }
  }
  const auto hit = [=](const Expectation& e) { return e.depends_on(peer) && !(named && e.peers.empty()); };
  for (const auto& taken : take_if(hit)) {
    end(*taken, State::kFailed, {Reason::kPeerLost, peer, "", why});
  }
}

int64_t Counters::expire(int64_t now) {
  if (earliest_ <= now) {
    for (const auto& taken : take_if([=](const Expectation& e) { return e.deadline_ns <= now; })) {
      const double have = static_cast<double>(units(taken->id)) / kUnitsPerArrival;
      const double want = static_cast<double>(taken->units) / kUnitsPerArrival;
      end(*taken, State::kFailed,
          {Reason::kTimeout, 0, "",
           "counter " + std::to_string(taken->id) + " has " + std::to_string(have) + " of " + std::to_string(want) +
               " arrivals after " + std::to_string(static_cast<double>(taken->timeout_ns) * 1e-9) + " s"});
    }
    earliest_ = std::numeric_limits<int64_t>::max();
    for (const Expectation* pending : pending_) earliest_ = std::min(earliest_, pending->deadline_ns);
  }
  return earliest_;
}

void Counters::fail_all(const Failure& failure) {
  for (const auto& words : followers_) {
    for (size_t i = 0; i < words->size(); ++i) words->fail(i);
  }
  for (const auto& taken : take_if([](const Expectation&) { return true; })) end(*taken, State::kFailed, failure);
}

}  // namespace railwire
