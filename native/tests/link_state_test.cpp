// Every event in every state of a link, in every order; then two sides that talk to each other, with every
// interleaving of what they say, what breaks and what comes late.
#include "engine/link_state.h"

#include <doctest/doctest.h>

#include <deque>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using namespace railwire;

namespace {

// What is true of our half, whatever the state says.
struct Half {
  bool closed = false, shut = false, freed = false;
  bool making = false, joining = false;  // the set-up thread is at it
  auto key() const { return std::tuple(closed, shut, freed, making, joining); }
};

struct Side {
  LinkState state;
  Half half;
  auto key() const {
    return std::tuple(state.phase, state.ever_up, state.remote_closed, state.shut, state.in_setup, state.word,
                      half.key());
  }
};

bool can_happen(const Side& side, LinkEvent event) {
  const Half& half = side.half;
  switch (event) {
    case LinkEvent::kMade:
    case LinkEvent::kNotMade:
      return half.making;
    case LinkEvent::kJoined:
    case LinkEvent::kNotJoined:
      return half.joining;
    case LinkEvent::kShut:
      return half.closed && !half.shut;
    case LinkEvent::kDrained:
    case LinkEvent::kReleased:
      return half.shut && !half.joining;
    case LinkEvent::kConnected:
      return side.state.phase == LinkPhase::kConnecting;
    case LinkEvent::kLate:
      return deadline(side.state.phase) > 0;
    default:
      return true;
  }
}

// The step, with the half checked before and after. Returns the actions.
uint32_t take(Side& side, LinkEvent event) {
  const LinkState before = side.state;
  Half& half = side.half;
  if (event == LinkEvent::kMade || event == LinkEvent::kNotMade) half.making = false;
  if (event == LinkEvent::kJoined || event == LinkEvent::kNotJoined) half.joining = false;
  if (event == LinkEvent::kShut) half.shut = true;
  const auto [after, actions] = step(before, event);
  side.state = after;
  CAPTURE(static_cast<int>(before.phase));
  CAPTURE(static_cast<int>(event));
  const auto does = [&, all = actions](uint32_t action) { return (all & action) != 0; };
  // One owner at a time, and nothing is used after its end.
  if (does(kCloseHalf)) {
    CHECK(!half.joining);
    CHECK(!half.freed);
    half.closed = true;
  }
  if (does(kMakeHalf)) {
    CHECK(!half.making);
    CHECK(half.shut);
    CHECK(before.over());
    half.making = true;
  }
  // What the thread has made is used or freed; nothing else is, and only in the place of what is shut.
  CHECK((does(kUseHalf) || does(kDropHalf)) == (event == LinkEvent::kMade));
  CHECK(!(does(kUseHalf) && does(kDropHalf)));
  if (does(kUseHalf)) {
    CHECK(half.shut);
    CHECK(!half.freed);
    half.closed = half.shut = false;
  }
  if (does(kJoin)) {
    CHECK(!half.joining);
    CHECK(!half.closed);
    half.joining = true;
  }
  if (does(kFreeHalf)) {
    CHECK(half.closed);
    CHECK(!half.joining);
    CHECK(!half.freed);
    half.freed = true;
  }
  // A count is not told before it is final.
  if (does(kSayDown) || does(kSayClosed)) CHECK(half.shut);
  // What is up has an open half, and has been told to serve, but for the first.
  if (after.up()) {
    CHECK(!half.closed);
    CHECK(after.ever_up);
    CHECK(!after.remote_closed);
  }
  CHECK(does(kServe) == (after.up() && !before.up() && before.phase != LinkPhase::kConnecting));
  CHECK(does(kTakeBack) ==
        (before.up() && !after.up() && event != LinkEvent::kLeave && event != LinkEvent::kPeerEnded));
  // The peer's word is taken once, and believed from then on until there is a new generation.
  if (does(kConfirmed)) CHECK((!before.remote_closed && after.remote_closed));
  if (before.remote_closed && !does(kUseHalf)) CHECK(after.remote_closed);
  if (after.phase == LinkPhase::kSettled) CHECK((after.over() && half.shut));
  CHECK(after.shut == (half.shut && after.shut));
  if (before.phase >= LinkPhase::kEnded) CHECK((after.phase >= LinkPhase::kEnded && !does(kLosePeer)));
  CHECK(after.in_setup == half.joining);
  return actions;
}

std::vector<Side> beginnings() {
  std::vector<Side> out;
  for (const bool resumable : {false, true}) {
    for (const bool initiator : {false, true}) {
      Side& side = out.emplace_back();
      side.state.resumable = resumable;
      side.state.initiator = initiator;
    }
  }
  return out;
}

std::vector<Side> reachable_from(const Side& first) {
  std::vector<Side> all{first};
  std::set<decltype(first.key())> seen{first.key()};
  for (size_t i = 0; i < all.size(); ++i) {
    for (int e = 0; e < kLinkEvents; ++e) {
      const auto event = static_cast<LinkEvent>(e);
      Side next = all[i];
      if (!can_happen(next, event)) continue;
      take(next, event);
      if (seen.insert(next.key()).second) all.push_back(next);
    }
  }
  return all;
}

}  // namespace

TEST_CASE("link states: every event in every order keeps halves whole, and no word is given or taken too early") {
  for (const Side& first : beginnings()) {
    std::set<LinkPhase> phases;
    for (const Side& side : reachable_from(first)) phases.insert(side.state.phase);
    // All of them are used, by whom they are for.
    const size_t absent = first.state.resumable ? (first.state.initiator ? 1 : 2) : 4;
    CHECK(phases.size() == kLinkPhases - absent);
  }
}

TEST_CASE("link states: no state waits for ever, whatever the peer does not do") {
  for (const Side& first : beginnings()) {
    for (const Side& side : reachable_from(first)) {
      CAPTURE(static_cast<int>(side.state.phase));
      // Whatever the NIC and the set-up thread owe us comes; the peer says nothing.
      const auto ends = [&](std::vector<LinkEvent> events) {
        Side now = side;
        uint32_t actions = 0;
        for (const LinkEvent event : events) {
          if (can_happen(now, event)) actions |= take(now, event);
          if (now.state.phase != side.state.phase || (actions & kLosePeer)) return true;
        }
        return false;
      };
      switch (side.state.phase) {
        case LinkPhase::kUp:          // waits for nobody
        case LinkPhase::kConnecting:  // the handshake's
        case LinkPhase::kLeaving:     // the close's
        case LinkPhase::kGone:
          break;
        case LinkPhase::kSettled:
          CHECK(ends({LinkEvent::kTurn}) == side.state.resumable);
          break;
        case LinkPhase::kEnded:
          CHECK(ends({LinkEvent::kJoined, LinkEvent::kShut, LinkEvent::kReleased}));
          break;
        case LinkPhase::kMaking:
          CHECK(ends({LinkEvent::kMade}));
          CHECK(ends({LinkEvent::kNotMade}));
          break;
        case LinkPhase::kJoining:
          CHECK(ends({LinkEvent::kJoined}));
          CHECK(ends({LinkEvent::kNotJoined}));
          break;
        case LinkPhase::kClosing:
        case LinkPhase::kDown:
        case LinkPhase::kOffered:
        case LinkPhase::kAnswered:
          REQUIRE(deadline(side.state.phase) > 0);
          CHECK(ends({LinkEvent::kLate}));
          break;
      }
      // And the peer's end brings any of them to the last.
      Side last = side;
      for (const LinkEvent event :
           {LinkEvent::kPeerEnded, LinkEvent::kJoined, LinkEvent::kMade, LinkEvent::kShut, LinkEvent::kReleased}) {
        if (can_happen(last, event)) take(last, event);
      }
      CHECK(last.state.phase == LinkPhase::kGone);
      CHECK(last.half.freed);
      CHECK(!last.half.making);
    }
  }
}

namespace {

// One link of two engines. What they say arrives in order, some time.
struct Said {
  enum What : uint8_t { kDown, kClosed, kOffer, kAnswer, kRefused, kReady } what;
  int generation;
  auto operator<=>(const Said&) const = default;
};
struct End : Side {
  int generation = 0, offered = 0;  // offered: of an offer that waits; 0: none
  int making_for = 0;
  bool peer_lost = false;
  std::deque<Said> said;  // to the other
  auto full_key() const { return std::tuple(key(), generation, offered, making_for, peer_lost, said); }
};
struct World {
  End ends[2];  // [0] is the initiator
  int breaks = 2, lates = 2, failures = 1;
  auto key() const { return std::tuple(ends[0].full_key(), ends[1].full_key(), breaks, lates, failures); }
  bool whole() const { return ends[0].state.up() && ends[1].state.up() && ends[0].generation == ends[1].generation; }
};

// As Engine::carry_out() and half_made() do.
void happens(End& end, LinkEvent event) {
  if (event == LinkEvent::kTurn && !end.state.initiator) end.generation = std::exchange(end.offered, 0);
  const uint32_t actions = take(end, event);
  if ((actions & kUseHalf) && end.state.initiator) ++end.generation;
  const auto say = [&](uint32_t action, Said::What what) {
    if (actions & action) end.said.push_back({what, end.generation});
  };
  say(kSayDown, Said::kDown);
  say(kSayClosed, Said::kClosed);
  say(kSayOffer, Said::kOffer);
  say(kSayAnswer, Said::kAnswer);
  say(kSayRefused, Said::kRefused);
  say(kSayReady, Said::kReady);
  end.peer_lost |= (actions & kLosePeer) != 0;
  if (event == LinkEvent::kMade && end.offered) happens(end, LinkEvent::kOffer);
}

// As Engine::link_record_arrived() does.
void arrives(End& end, const Said& said) {
  const bool current = said.generation == end.generation;
  switch (said.what) {
    case Said::kDown:
      if (current) happens(end, LinkEvent::kPeerDown);
      break;
    case Said::kClosed:
      if (current) happens(end, LinkEvent::kPeerClosed);
      break;
    case Said::kOffer:
      if (said.generation <= end.generation || end.state.up()) break;
      end.offered = said.generation;
      happens(end, LinkEvent::kOffer);
      break;
    case Said::kAnswer:
      if (current) happens(end, LinkEvent::kAnswer);
      break;
    case Said::kRefused:
      if (current) happens(end, LinkEvent::kRefused);
      break;
    case Said::kReady:
      if (current) happens(end, LinkEvent::kReady);
      break;
  }
}

std::vector<World> successors(const World& world) {
  std::vector<World> out;
  for (int i = 0; i < 2; ++i) {
    const auto with = [&](auto&& change) { change(out.emplace_back(world)); };
    const End& end = world.ends[i];
    if (!world.ends[1 - i].said.empty()) {
      with([&](World& w) {
        const Said first = w.ends[1 - i].said.front();
        w.ends[1 - i].said.pop_front();
        arrives(w.ends[i], first);
      });
    }
    const auto may = [&](LinkEvent event, int World::* budget = nullptr) {
      if (!can_happen(end, event) || (budget && world.*budget == 0)) return;
      with([&](World& w) {
        if (budget) --(w.*budget);
        happens(w.ends[i], event);
      });
    };
    may(LinkEvent::kShut);
    may(LinkEvent::kDrained);
    may(LinkEvent::kMade);
    may(LinkEvent::kJoined);
    may(LinkEvent::kNotMade, &World::failures);
    may(LinkEvent::kNotJoined, &World::failures);
    if (end.state.up()) may(LinkEvent::kBroke, &World::breaks);
    if (end.state.phase == LinkPhase::kSettled && (i == 0 || end.offered)) may(LinkEvent::kTurn);
    // Late because of the peer, not because of a NIC that never lets go.
    if (end.state.phase == LinkPhase::kOffered || end.state.phase == LinkPhase::kAnswered) {
      may(LinkEvent::kLate, &World::lates);
    }
  }
  return out;
}

}  // namespace

TEST_CASE("link states: two sides believe only what is true of each other, and always find back to a link") {
  World first;
  for (int i = 0; i < 2; ++i) {
    first.ends[i].state.resumable = true;
    first.ends[i].state.initiator = i == 0;
    take(first.ends[i], LinkEvent::kConnected);
  }
  std::vector<World> all{first};
  std::map<decltype(first.key()), size_t> numbers{{first.key(), 0}};
  std::vector<std::vector<size_t>> before(1);
  for (size_t i = 0; i < all.size(); ++i) {
    for (World& next : successors(all[i])) {
      for (int k = 0; k < 2; ++k) {
        const End &own = next.ends[k], &other = next.ends[1 - k];
        // The word that proves our sources quiet: the other half of this generation can do nothing any more.
        // Of who is settled that has been seen on the way there; he may have taken the next number meanwhile.
        const bool settled = own.state.phase == LinkPhase::kSettled || own.state.phase == LinkPhase::kMaking;
        if (own.state.remote_closed && !settled && own.generation == other.generation) {
          CHECK(other.half.shut);
        }
        // Nobody writes into a half that is not connected to his.
        if (own.state.up() && other.state.up()) CHECK(own.generation == other.generation);
        CHECK(!own.peer_lost);  // both are honest
        CHECK(own.said.size() < 12);
      }
      const auto [known, fresh] = numbers.try_emplace(next.key(), all.size());
      if (fresh) {
        all.push_back(next);
        before.emplace_back();
      }
      before[known->second].push_back(i);
    }
  }
  // Backwards from where both are up: every world must lead there.
  std::vector<bool> leads(all.size());
  std::vector<size_t> queue;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].whole() && !leads[i]) {
      leads[i] = true;
      queue.push_back(i);
    }
  }
  while (!queue.empty()) {
    const size_t i = queue.back();
    queue.pop_back();
    for (const size_t j : before[i]) {
      if (!leads[j]) {
        leads[j] = true;
        queue.push_back(j);
      }
    }
  }
  size_t stuck = 0;
  for (size_t i = 0; i < all.size(); ++i) stuck += !leads[i];
  MESSAGE(all.size() << " worlds");
  CHECK(stuck == 0);
}
