// Making a peer: its links, what the other side must know of them, and the moment from which it is up. The NICs' part
// of it may block, and is done without the driver's lock.
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/process.h"

namespace railwire {
std::shared_ptr<Peer> Engine::create_peer(uint64_t connection, bool initiator, std::string name,
                                          const std::vector<LinkPlan>& plan) {
  const auto setup = enter_setup();
  if (plan.empty()) throw NicError("no NIC of ours can reach peer " + name);
  auto peer = std::make_shared<Peer>();
  peer->connection = connection;
  peer->initiator = initiator;
  peer->name = std::move(name);
  try {
    for (const LinkPlan& wanted : plan) {
      if (wanted.local_nic >= nics_.size()) throw NicError("no such NIC: " + std::to_string(wanted.local_nic));
      auto link = std::make_unique<PeerLink>();
      link->wr_kind = WrContext::kFlush;
      link->peer = peer.get();
      link->index = link->ends.index = static_cast<uint32_t>(peer->links.size());
      link->nic = nics_[wanted.local_nic].get();
      link->ends.local_nic = wanted.local_nic;
      link->ends.remote_nic = wanted.remote_nic;
      link->state.initiator = initiator;
      link->state.resumable = link->nic->info().resumable;
      link->link = link->nic->create_link();
      link->own_address = link->link->address();
      link->control = control_addresses_.take(wanted.local_nic, wanted.remote_control);
      link->control_address = wanted.remote_control;
      const NicInfo& nic = link->nic->info();
      // Links of one kind follow each other, the best kind first: so both sides have the same sets.
      if (peer->sets.empty() || peer->sets.back().kind != nic.kind) {
        RailSet& made = peer->sets.emplace_back();
        made.kind = nic.kind;
        made.first = link->index;
        made.limits.links = 0;
        made.limits.max_write_bytes = UINT64_MAX;
      }
      RailSet& rails = peer->sets.back();
      link->set = static_cast<uint32_t>(peer->sets.size() - 1);
      link->place = rails.count++;
      rails.local_nics |= uint64_t{1} << wanted.local_nic;
      ++rails.limits.links;
      rails.limits.max_write_bytes = std::min(rails.limits.max_write_bytes, nic.max_write_bytes);
      peer->links.push_back(std::move(link));
    }
    const auto lock = lock_driver();
    if (closed()) throw NicError("the engine is closed");
    auto& ends = by_connection_[connection];
    if (ends[initiator]) throw NicError("connection is already known");
    peer->id = next_peer_++;
    ends[initiator] = peer.get();
    peers_.push_back(peer);
    by_id_[peer->id] = peer.get();
  } catch (...) {
    for (auto& link : peer->links) {
      link->link.reset();
      control_addresses_.let_go(link->ends.local_nic, link->control_address);
    }
    throw;
  }
  return peer;
}

std::vector<Engine::LinkHalf> Engine::link_halves(Peer& peer) {
  const auto lock = lock_driver();
  if (peer.ended()) throw NicError("peer " + peer.name + " has ended");
  peer.exposed = true;
  std::vector<LinkHalf> halves;
  for (const auto& link : peer.links) {
    halves.push_back({link->own_address, pad_registrations_[link->ends.local_nic].blob});
  }
  return halves;
}

void Engine::activate_peer(Peer& peer, const std::vector<LinkHalf>& remote, int64_t pid, uint64_t pid_start_ticks) {
  const auto setup = enter_setup();
  if (remote.size() != peer.links.size()) throw NicError("peer " + peer.name + " offers another number of links");
  {
    const auto lock = lock_driver();
    if (peer.state.load() != PeerState::kConnecting || peer.in_setup) {
      throw NicError("peer " + peer.name + " is not being connected");
    }
    peer.in_setup = true;  // whoever ends it now leaves its links to us
  }
  std::string problem;
  try {
    for (size_t i = 0; i < remote.size(); ++i) {
      PeerLink& link = *peer.links[i];
      link.link->connect(remote[i].address);
      const auto pad = import_blob(link.ends.local_nic, remote[i].pad, link.imported_pad);
      link.ends.pad_address = pad.base;
      link.ends.pad_rkey = pad.rkey;
    }
  } catch (const NicError& error) {
    problem = error.what();
  }
  watch_process(peer, pid, pid_start_ticks);
  const auto lock = lock_driver();
  peer.in_setup = false;
  if (peer.ended()) {
    for (const auto& link : peer.links) link->link->close();
    look_at(peer, 0);
    throw NicError("peer " + peer.name + " has ended while it was being connected: " + peer.end_reason.message);
  }
  if (!problem.empty()) throw NicError(problem);
  const int64_t now = now_ns();
  for (auto& link : peer.links) {
    link_event(*link, LinkEvent::kConnected);
    link->reachable = true;
    link->last_heard = link->last_progress = link->up_since = now;
    // Many peers are not pinged all in one moment: their answers would come in one, too.
    const auto share = static_cast<int64_t>((peer.id + link->index) % kPingShares);
    link->last_ping = now - options_.liveness_ns / kPingsPerLiveness * share / kPingShares;
  }
  peer.last_up = now;
  for (RailSet& rails : peer.sets) rails.last_up = now;
  peer.state.store(PeerState::kConnected);
  // The first event of this peer. What it has said before we were ready follows now.
  events().push({Event::kPeerUp, options_.event_tag, peer.id, {}});
  const auto keep = peer.shared_from_this();
  take_early_records(peer);
  note_due(peer);
  look_at(peer, 0);
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
}

void Engine::watch_process(Peer& peer, int64_t pid, uint64_t pid_start_ticks) {
  if (pid <= 0 || !pid_start_ticks || process_start_ticks(pid) != pid_start_ticks) return;
  const int fd = pid == getpid() ? -1 : open_process(pid);
  const auto lock = lock_driver();
  if (peer.pid || closed()) {
    if (fd >= 0) ::close(fd);
    return;
  }
  peer.same_process = pid == getpid();
  if (peer.same_process) return;
  peer.pid = pid;
  peer.pid_start_ticks = pid_start_ticks;
  peer.pid_fd = fd;  // -1: it is looked for by its number
  epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
  if (fd >= 0) epoll_ctl(processes_, EPOLL_CTL_ADD, fd, &event);
}

void Engine::abandon_peer(Peer& peer, const std::string& why) {
  const auto lock = lock_driver();
  if (peer.state.load() != PeerState::kConnecting) return;
  peer_ended(peer, PeerState::kClosed, {Reason::kClosed, peer.id, "", why});
  if (worker_rest_.load() != Rest::kNone) worker_bell_.ring();
}

bool Engine::send_handshake(uint32_t nic, const std::vector<std::byte>& address, std::span<const std::byte> payload) {
  if (closed()) return true;
  const auto setup = enter_setup();
  const auto frame = FrameWriter({.type = FrameType::kHandshake}).put_bytes(payload).take();
  const uint64_t to = control_addresses_.take(nic, address);
  bool sent = true;
  {
    const auto lock = lock_driver();
    sent = nics_[nic]->send(to, frame, nullptr);
  }
  control_addresses_.let_go(nic, address);
  return sent;
}

}  // namespace railwire
