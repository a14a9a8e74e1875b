// How a lane ends, and its transfer with it; and what a refused write means.
//
// A refusal has two explanations. The peer lives and means it: a revoked region, a wrong key. Or its process has been
// killed: the kernel takes the memory of a dead process from the NIC before it takes the queue pairs, so the last
// answers of that NIC are refusals. Only the peer itself can tell the two apart. So a lane that was refused is *in
// doubt*: nothing of it is under way any more, and whatever waited for that goes on, but its transfer does not end yet.
// It ends when the peer has acknowledged a record that did not exist before the refusal (the peer lives:
// kRemoteAccess), when the peer is lost (kPeerLost), or by cancel().
//
// A record, and not just any sign of life: a message may have been sent before the death and read after the refusal,
// and a ping that is lost is not repeated. The record leaves at once, so the doubt costs about a round trip.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {

// Why a lane stops, for whoever is told in the end.
void Engine::lane_failed(Lane& lane, Failure failure) {
  lane.stopping = true;
  lane.failure = std::make_unique<Failure>(std::move(failure));
  if (lane.failure->reason != Reason::kRemoteAccess) return;
  // The next record that is made, whatever it says. Not made here: one question does for all that fail together, and
  // often there is something to say anyway (a link is down, a counter will not be reached).
  lane.question = lane.peer->question = lane.peer->next_sequence;
  questions_due_ = true;
  next_tick_ = 0;
}

void Engine::ask_questions() {
  questions_due_ = false;
  for (const auto& peer : peers_) {
    if (peer->question == peer->next_sequence) send_credit(*peer);  // says nothing new, but is acknowledged
  }
}

bool Engine::in_doubt(const Lane& lane) const {
  return lane.failure && lane.failure->reason == Reason::kRemoteAccess && lane.question > lane.peer->acknowledged;
}

// Whatever can end now does.
void Engine::settle_doubts(Peer& peer, int64_t now) {
  std::vector<Lane*> ending;
  std::erase_if(peer.doubts, [&](Lane* lane) {
    const bool stays = in_doubt(*lane) && !peer.ended() && !lane->transfer->cancelled && now < lane->doubt_until;
    if (!stays) ending.push_back(lane);
    return !stays;
  });
  for (Lane* lane : ending) end_lane(*lane);
}

// Nothing of the lane is under way any more, and nothing will be.
void Engine::finish_lane(Lane& lane) {
  lane.phase = Lane::Phase::kFinished;
  lane.source.reset();
  Peer& peer = *lane.peer;
  peer.lanes.erase(lane);
  if (lane.stopping && lane.immediate_id >= 0 && peer.connected()) {
    // The receiver counts on arrivals that will not come: tell it, so that its expectation ends now.
    const auto id = static_cast<uint32_t>(lane.immediate_id);
    std::vector<std::byte> bytes(sizeof id);
    std::memcpy(bytes.data(), &id, sizeof id);
    const std::string text = lane.failure->message.substr(0, 400);
    const auto* p = reinterpret_cast<const std::byte*>(text.data());
    bytes.insert(bytes.end(), p, p + text.size());
    send_record(peer, RecordType::kPoison, bytes);
  }
  if (!peer.incoming_revokes.empty()) check_incoming_revokes(peer);
  if (!in_doubt(lane)) {
    end_lane(lane);
    return;
  }
  // Longer than the liveness time, in which a peer that is silent is lost: this is for one that is heard and does not
  // acknowledge.
  const int64_t now = now_ns();
  lane.doubt_until = now + options_.liveness_ns + options_.liveness_ns / 4;
  peer.doubts.push_back(&lane);
  settle_doubts(peer, now);
}

void Engine::end_lane(Lane& lane) {
  const Peer& peer = *lane.peer;
  Transfer& transfer = *lane.transfer;
  if (in_doubt(lane)) {
    Failure& why = *lane.failure;
    if (peer.state.load() == PeerState::kLost) {
      why = {Reason::kPeerLost, peer.id, why.nic, peer.end_reason.message + "; the last that came: " + why.message};
    } else {
      why.message += "; peer " + peer.name + " has not answered since";
    }
  }
  if (lane.stopping) {
    if (!transfer.first_failure) transfer.first_failure = std::move(lane.failure);
    transfer.any_may_still_land |= lane.may_still_land;
  }
  let_go(transfer);
}

// One lane less to wait for; with the last the transfer ends, and may be gone when this returns.
void Engine::let_go(Transfer& transfer) {
  if (--transfer.lanes_left > 0) return;
  const std::shared_ptr<Transfer> self = active_.take(transfer);
  if (!transfer.first_failure) {
    ++totals_.done;
    transfer.finish_done();
  } else if (transfer.cancelled && transfer.first_failure->reason == Reason::kCancelled) {
    ++totals_.cancelled;
    transfer.finish(State::kCancelled, std::move(*transfer.first_failure), transfer.any_may_still_land);
  } else {
    ++totals_.failed;
    transfer.finish(State::kFailed, std::move(*transfer.first_failure), transfer.any_may_still_land);
  }
}

}  // namespace railwire
