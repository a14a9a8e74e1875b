// Control frames in and out, and the channel that makes records reliable, ordered and unique over lossy messages.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"

namespace railwire {
namespace {

constexpr size_t kRecordWindow = 256;  // records sent and not acknowledged; none beyond is held back for an earlier one
// What an honest peer does not reach, and a liar not exceed.
constexpr size_t kMostAnswers = 1 << 16;      // records that a peer made us send, and has not acknowledged
constexpr size_t kMostRevokes = 1 << 16;      // of its, that wait for transfers of ours
constexpr size_t kMostHandshakes = 4096;      // frames that Python has not looked at
constexpr int64_t kFirstRetry = 100'000'000;  // ns; doubles up to
constexpr int64_t kLongestRetry = 1'000'000'000;

bool is_answer(RecordType type) {
  return type == RecordType::kRevoked || type == RecordType::kLinkClosed || type == RecordType::kLinkAnswer ||
         type == RecordType::kLinkReady;
}

}  // namespace

// Prefers pairs that were heard lately; every retry takes another one.
PeerLink* Engine::control_path(Peer& peer, uint32_t attempt) {
  std::vector<PeerLink*> up;
  for (auto& link : peer.links) {
    if (link->reachable) up.push_back(link.get());
  }
  if (up.empty()) return nullptr;
  if (attempt == 0) {
    return *std::max_element(up.begin(), up.end(), [](auto* a, auto* b) {
      return std::pair(-int64_t{a->send_errors}, b->index) < std::pair(-int64_t{b->send_errors}, a->index);
    });
  }
  return up[attempt % up.size()];
}

bool Engine::send_frame(Peer& peer, PeerLink& path, std::span<const std::byte> frame) {
  const uintptr_t tag = peer.id << 8 | std::min<uint32_t>(path.index, 255);
  return path.nic->send(path.control, frame, reinterpret_cast<void*>(tag));
}

bool Engine::send_simple(Peer& peer, PeerLink& path, FrameType type, uint64_t value) {
  const auto frame = FrameWriter({.type = type,
                                  .to_initiator = !peer.initiator,
                                  .link = static_cast<uint16_t>(path.index),
                                  .connection = peer.connection,
                                  .ack = peer.taken})
                         .put(value)
                         .take();
  if (!send_frame(peer, path, frame)) return false;
  peer.ack_due = false;
  return true;
}

// "I do not know you any more, and my halves are closed": not before they are.
void Engine::say_gone(Peer& peer, PeerLink& path) {
  const bool closed = std::all_of(peer.links.begin(), peer.links.end(),
                                  [](const auto& link) { return !link->link || link->link->closed(); });
  if (closed) send_simple(peer, path, FrameType::kGone, 0);
}

void Engine::send_failed(uint64_t id, uint32_t index, int32_t, uint32_t nic) {
  ++nic_stats_[nic].errors;
  const auto known = by_id_.find(id);
  if (known == by_id_.end() || index >= known->second->links.size()) return;
  PeerLink& link = *known->second->links[index];
  ++link.send_errors;
  if (!link.first_send_error) link.first_send_error = now_ns();
  // Ask again soon: a refused message usually means that the process is gone.
  link.last_ping = std::min(link.last_ping, now_ns() - options_.liveness_ns / 5 + 100'000'000);
  look_at(*link.peer, now_ns() + 100'000'000);
}

void Engine::send_record(Peer& peer, RecordType type, std::span<const std::byte> body,
                         std::shared_ptr<SendOperation> operation) {
  if (peer.ended()) return;
  auto frame = FrameWriter({.type = FrameType::kRecord,
                            .to_initiator = !peer.initiator,
                            .link = 0,
                            .connection = peer.connection,
                            .ack = peer.taken})
                   .put<uint64_t>(peer.next_sequence)
                   .put<uint8_t>(static_cast<uint8_t>(type))
                   .put_bytes(body)
                   .take();
  const bool answer = is_answer(type);
  peer.answers_unacked += answer;
  peer.unacked.push_back({peer.next_sequence++, std::move(frame), 0, 0, std::move(operation), answer});
  if (type == RecordType::kMessage) ++peer.stats.messages_sent;
  send_due_records(peer, now_ns());
  look_at(peer, now_ns() + 10'000'000);
}

// `now` 0: only what is new, and the acknowledgement.
void Engine::send_due_records(Peer& peer, int64_t now) {
  if (peer.ended() || peer.state.load() == PeerState::kConnecting) return;
  size_t in_window = 0;
  for (auto& record : peer.unacked) {
    if (++in_window > kRecordWindow) break;
    if (record.sent_ns) {
      const int64_t retry = std::min(kFirstRetry << std::min(record.tries - 1, 10u), kLongestRetry);
      if (!now || now - record.sent_ns < retry) continue;
    }
    PeerLink* path = control_path(peer, record.tries);
    if (!path) return;
    set_frame_ack(record.frame, peer.taken);
    if (!send_frame(peer, *path, record.frame)) break;
    peer.ack_due = false;
    peer.stats.retransmissions += record.tries > 0;
    record.sent_ns = now ? now : now_ns();
    if (record.tries == 0) record.first_ns = record.sent_ns;
    ++record.tries;
  }
  if (peer.ack_due) {
    if (PeerLink* path = control_path(peer, 0)) send_simple(peer, *path, FrameType::kAck, 0);
  }
}

void Engine::acknowledged(Peer& peer, uint64_t upto) {
  if (upto >= peer.next_sequence) return;  // cannot be true: ignore
  bool any = false;
  while (!peer.unacked.empty() && peer.unacked.front().sequence <= upto) {
    auto record = std::move(peer.unacked.front());
    peer.unacked.pop_front();
    peer.answers_unacked -= record.answer;
    if (record.operation) record.operation->finish_done();
    any = true;
  }
  if (any && !peer.unacked.empty()) send_due_records(peer, now_ns());
  peer.acknowledged = std::max(peer.acknowledged, upto);
  if (!peer.doubts.empty()) settle_doubts(peer, now_ns());
}

void Engine::message_arrived(uint32_t nic, std::span<const std::byte> data) {
  const auto frame = parse_frame(data);
  if (!frame) {
    ++totals_.bad_frames;
    return;
  }
  if (frame->header.type == FrameType::kHandshake) {
    // Beyond that many they are lost, as any message may be: whoever shakes hands asks again.
    if (options_.handshakes) {
      options_.handshakes->push_if_room({Event::kHandshake, options_.event_tag, nic,
                                         std::vector<std::byte>(frame->payload.begin(), frame->payload.end())},
                                        kMostHandshakes);
    }
    return;
  }
  const auto entry = by_connection_.find(frame->header.connection);
  Peer* found = entry == by_connection_.end() ? nullptr : entry->second[frame->header.to_initiator];
  if (!found || frame->header.link >= found->links.size()) {
    ++totals_.bad_frames;
    return;  // not ours (any more); Python answers connection requests, silence answers the rest
  }
  const auto peer = found->shared_from_this();
  if (peer->ended()) {
    // It has not noticed the end yet: tell it, so that it need not wait for its liveness time. Or it has, and says so:
    // then nothing of it is under way any more, and it is told the same of us, once.
    PeerLink& path = *peer->links[frame->header.link];
    const bool gone = frame->header.type == FrameType::kGone;
    if (gone && peer->confirmed) return;
    say_gone(*peer, path);
    if (gone) {
      peer->confirmed = true;
      all_quiet(*peer);
    }
    return;
  }
  // Whatever NIC it came by proves that this pair works in that direction.
  for (auto& link : peer->links) {
    if (link->ends.local_nic == nic &&
        (frame->header.type == FrameType::kRecord || link->index == frame->header.link)) {
      link->last_heard = now_ns();
      link->first_send_error = 0;
      link->send_errors = 0;
      // Who is heard need not be asked. One side does the asking: the other's turn comes half a period later.
      const int64_t answered = peer->initiator ? 0 : options_.liveness_ns / kPingsPerLiveness / 2;
      link->last_ping = std::max(link->last_ping, link->last_heard + answered);
      heard_again(*link);
    }
  }
  acknowledged(*peer, frame->header.ack);
  if (peer->closed_sent_ns) close_step(*peer);
  if (peer->ended()) return;
  switch (frame->header.type) {
    case FrameType::kPing:
      send_simple(*peer, *peer->links[frame->header.link], FrameType::kPong, 0);
      break;
    case FrameType::kRecord:
      record_arrived(*peer, frame->payload);
      break;
    case FrameType::kGone:
      if (peer->state.load() == PeerState::kConnecting) break;
      peer->confirmed = true;
      peer_ended(
          *peer, peer->close_sent ? PeerState::kClosed : PeerState::kLost,
          {Reason::kPeerLost, peer->id, "",
           "peer " + peer->name + " is lost: it does not know this connection any more (closed, or it gave us up)"});
      say_gone(*peer, *peer->links[frame->header.link]);
      break;
    default:
      break;
  }
}

void Engine::record_arrived(Peer& peer, std::span<const std::byte> payload) {
  const auto record = parse_record(payload);
  if (!record) {
    ++totals_.bad_frames;
    return;
  }
  peer.ack_due = true;
  note_due(peer);
  if (record->sequence <= peer.taken) return;  // a repetition
  // The other side may be up a moment before us: nobody is told of what it says before he is told of it.
  if (record->sequence != peer.taken + 1 || peer.state.load() == PeerState::kConnecting) {
    if (record->sequence - peer.taken <= kRecordWindow) {
      peer.early.try_emplace(record->sequence, payload.begin(), payload.end());
    }
    return;
  }
  take_record(peer, payload);
  take_early_records(peer);
}

void Engine::take_early_records(Peer& peer) {
  while (!peer.ended() && !peer.early.empty() && peer.early.begin()->first <= peer.taken + 1) {
    const auto next = peer.early.extract(peer.early.begin());
    if (next.key() == peer.taken + 1) take_record(peer, next.mapped());
  }
}

// What a peer keeps sending although it cannot be honest ends the connection: its memory here has an end.
void Engine::cut_off(Peer& peer, const std::string& what) {
  peer_ended(peer, PeerState::kLost,
             {Reason::kPeerLost, peer.id, "",
              "peer " + peer.name + " is cut off: it " + what + ", which none does that keeps to the protocol"});
}

// False: the peer has been cut off.
bool Engine::take_message(Peer& peer, std::span<const std::byte> body, bool last) {
  auto& partial = peer.partial_message;
  peer.message_bytes_arrived += body.size() + (last ? Peer::kMessageOverhead : 0);
  if (peer.message_bytes_arrived - peer.message_bytes_taken_here > Peer::kMessageWindow) {
    cut_off(peer, "sent more messages than it had room for");
    return false;
  }
  if (partial.size() + body.size() > kMaxMessageBytes || (!last && body.empty())) {
    cut_off(peer, "sent a message of more than " + std::to_string(kMaxMessageBytes) + " bytes");
    return false;
  }
  partial.insert(partial.end(), body.begin(), body.end());
  if (!last) return true;
  ++peer.stats.messages_received;
  events().push({Event::kMessage, options_.event_tag, peer.id, std::exchange(partial, {})});
  return true;
}

void Engine::take_record(Peer& peer, std::span<const std::byte> payload) {
  const auto record = parse_record(payload);
  ++peer.taken;
  FrameReader reader(record->body);
  switch (record->type) {
    case RecordType::kMessage:
    case RecordType::kMessagePart:
      take_message(peer, record->body, record->type == RecordType::kMessage);
      break;
    case RecordType::kPoison: {
      const auto id = reader.get<uint32_t>();
      if (!reader.ok() || id >= kImmediateIds) break;
      const std::string why = "a write by peer " + peer.name + " failed: " + reader.text(400);
      if (counters_.poison(id, peer.id, why)) break;
      counters_.forget_poisons([this](uint64_t other) {
        return std::none_of(peers_.begin(), peers_.end(), [=](const auto& p) { return p->id == other && !p->ended(); });
      });
      if (!counters_.poison(id, peer.id, why)) cut_off(peer, "told of more failed writes than there is room for");
      break;
    }
    case RecordType::kLinkDown:
    case RecordType::kLinkClosed:
    case RecordType::kLinkOffer:
    case RecordType::kLinkAnswer:
    case RecordType::kLinkReady:
      link_record_arrived(peer, record->type, record->body);
      break;
    case RecordType::kRevoke: {
      const auto region = reader.get<uint64_t>(), request = reader.get<uint64_t>();
      if (!reader.ok()) break;
      if (peer.incoming_revokes.size() >= kMostRevokes) {
        cut_off(peer, "revoked more regions than it waits for");
        break;
      }
      peer.revoked_regions.insert(region);
      peer.incoming_revokes.push_back({region, request});
      std::vector<std::shared_ptr<Operation>> alive;
      const auto lanes = peer.lanes;
      for (Lane* lane : lanes) alive.push_back(lane->transfer->shared_from_this());
      for (Lane* lane : lanes) {
        if (lane->source && lane->source->touches(region)) {
          stop_lane(*lane, {Reason::kRevoked, peer.id, "", "peer " + peer.name + " has revoked the region"});
        }
      }
      check_incoming_revokes(peer);
      break;
    }
    case RecordType::kRevoked: {
      const auto request = reader.get<uint64_t>();
      if (reader.ok()) revoke_confirmed(peer, request);
      break;
    }
    case RecordType::kClose:
      peer.close_requested = true;
      look_at(peer, 0);
      close_step(peer);
      break;
    case RecordType::kClosed:
      if (peer.close_sent) {
        peer.confirmed = true;
        // The last word to this peer: without it, it would wonder for a while.
        if (PeerLink* path = control_path(peer, 0)) send_simple(peer, *path, FrameType::kAck, 0);
        peer_ended(peer, PeerState::kClosed, {Reason::kClosed, peer.id, "", "peer " + peer.name + " was closed by us"});
      }
      break;
    case RecordType::kCredit: {
      const auto total = reader.get<uint64_t>();
      if (!reader.ok() || total > peer.message_bytes_sent) break;
      peer.message_bytes_taken_there = std::max(peer.message_bytes_taken_there, total);
      send_held_messages(peer);
      break;
    }
  }
  if (peer.answers_unacked > kMostAnswers) cut_off(peer, "asks, and acknowledges no answer");
}

void SendOperation::start(Engine& engine, std::shared_ptr<Operation>) { engine.start_send(*this); }
void SendOperation::stop(Engine& engine) { engine.stop_send(*this); }

void Engine::start_send(SendOperation& send) {
  Peer& peer = *send.peer;
  if (!peer.connected()) {
    send.finish(State::kFailed, peer.ended()
                                    ? peer.end_reason
                                    : Failure{Reason::kClosed, peer.id, "", "peer " + peer.name + " is closing"});
    return;
  }
  peer.held.push_back(std::static_pointer_cast<SendOperation>(send.shared_from_this()));
  send_held_messages(peer);
}

void Engine::send_held_messages(Peer& peer) {
  while (!peer.held.empty()) {
    const auto send = peer.held.front();
    const uint64_t ahead = peer.message_bytes_sent - peer.message_bytes_taken_there;
    const uint64_t cost = send->message.size() + Peer::kMessageOverhead;
    if (ahead + cost > Peer::kMessageWindow) return;
    peer.held.pop_front();
    peer.message_bytes_sent += cost;
    send_message(peer, std::exchange(send->message, {}), send);
  }
}

// In as many records as the NICs want, any of which may have to carry any of them.
void Engine::send_message(Peer& peer, std::span<const std::byte> message, std::shared_ptr<SendOperation> operation) {
  size_t room = kMaxMessageBytes;
  for (const auto& link : peer.links) {
    const size_t longest = link->nic->info().max_message_bytes;
    room = std::min(room, longest - std::min(longest - 1, kFrameHeaderBytes + kRecordHeaderBytes));
  }
  while (message.size() > room) {
    send_record(peer, RecordType::kMessagePart, message.first(room));
    message = message.subspan(room);
  }
  send_record(peer, RecordType::kMessage, message, std::move(operation));
}

void Engine::stop_send(SendOperation& send) {
  const auto keep = send.shared_from_this();
  if (std::erase(send.peer->held, keep)) {
    send.finish(State::kCancelled,
                {Reason::kCancelled, send.peer->id, "", "the message was cancelled before it was sent"});
  }
}

void Engine::send_credit(Peer& peer) {
  std::byte body[8];
  std::memcpy(body, &peer.message_bytes_taken_here, sizeof body);
  send_record(peer, RecordType::kCredit, body);
}

void Engine::message_taken(Peer& peer, uint64_t bytes) {
  const auto lock = lock_driver();
  if (closed() || peer.ended()) return;
  peer.message_bytes_taken_here += bytes;
  send_credit(peer);
}

}  // namespace railwire
