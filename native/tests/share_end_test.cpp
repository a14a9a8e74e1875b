// Every combination of what can be known of a share, and every event after it.
#include "engine/share_end.h"

#include <doctest/doctest.h>

#include <cstddef>
#include <iterator>
#include <vector>

using namespace railwire;

namespace {

constexpr bool ShareFacts::* kAll[] = {
    &ShareFacts::read,       &ShareFacts::stopping,       &ShareFacts::last_proves,
    &ShareFacts::taken_back, &ShareFacts::closing_quiets, &ShareFacts::completion_proves_landing,
    &ShareFacts::up,         &ShareFacts::ever_up,        &ShareFacts::remote_closed,
    &ShareFacts::confirmed,  &ShareFacts::process_dead,   &ShareFacts::peer_ended};

// Those that can be: a link that is up has been up, and its peer has not ended.
std::vector<ShareFacts> every_combination() {
  std::vector<ShareFacts> out;
  for (unsigned bits = 0; bits < 1u << std::size(kAll); ++bits) {
    ShareFacts facts;
    for (size_t i = 0; i < std::size(kAll); ++i) facts.*kAll[i] = bits >> i & 1;
    const bool over = facts.remote_closed || facts.confirmed || facts.process_dead || facts.peer_ended;
    if (facts.up && (!facts.ever_up || over)) continue;
    if (facts.last_proves && facts.taken_back) continue;  // all ended well
    out.push_back(facts);
  }
  return out;
}

}  // namespace

TEST_CASE("a share that has ended leaves no source or read target to anybody") {
  for (const ShareFacts& facts : every_combination()) {
    if (facts.up || end_of_share(facts) != ShareEnd::kProven || !facts.taken_back) continue;
    CHECK(quiet(facts));
  }
}

TEST_CASE("a failed write that ends has the peer's word, or says that it may still land") {
  for (const ShareFacts& facts : every_combination()) {
    const bool failed = facts.stopping || lost_its_proof(facts);
    if (facts.up || facts.read || !failed || end_of_share(facts) != ShareEnd::kProven) continue;
    CHECK(gone_for_good(facts) != may_still_land(facts));
  }
}

TEST_CASE("a write that has not failed ends with a proof of its landing") {
  for (const ShareFacts& facts : every_combination()) {
    if (facts.read || facts.stopping || lost_its_proof(facts) || end_of_share(facts) != ShareEnd::kProven) continue;
    CHECK((facts.completion_proves_landing || facts.last_proves));
  }
}

TEST_CASE("whatever is waited for, the peer's word and the end of its process end it, and nothing makes it worse") {
  for (const ShareFacts& before : every_combination()) {
    if (before.up) {  // a flush ends well, or the link goes down
      ShareFacts down = before;
      down.up = false;
      down.stopping |= lost_its_proof(down);
      down.confirmed = true;
      CHECK(end_of_share(down) == ShareEnd::kProven);
      continue;
    }
    for (bool ShareFacts::* event : {&ShareFacts::remote_closed, &ShareFacts::confirmed, &ShareFacts::process_dead}) {
      ShareFacts after = before;
      after.*event = true;
      CHECK(end_of_share(after) == ShareEnd::kProven);
    }
    // The liveness time alone ends it unless the peer may be at our memory.
    ShareFacts lost = before;
    lost.peer_ended = true;
    CHECK((end_of_share(lost) == ShareEnd::kProven || (lost.taken_back && !lost.closing_quiets)));
    if (end_of_share(before) == ShareEnd::kProven) CHECK(end_of_share(lost) == ShareEnd::kProven);
  }
}
