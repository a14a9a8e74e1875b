// The engine's side of the simulated wire.
#include "nic/simulated_nic.h"

#include <algorithm>
#include <cstring>

namespace railwire {
namespace {

std::vector<std::byte> to_bytes(const std::string& text) {
  const auto* p = reinterpret_cast<const std::byte*>(text.data());
  return {p, p + text.size()};
}

}  // namespace

std::unique_ptr<Nic> make_simulated_nic(const std::string& spec) {
  const std::string prefix = "sim://";
  const size_t slash = spec.find('/', prefix.size());
  if (spec.rfind(prefix, 0) != 0 || slash == std::string::npos) {
    throw NicError("\"" + spec + "\": a simulated NIC is named sim://FABRIC/NAME");
  }
  return std::make_unique<SimulatedNic>(spec, SimulatedFabric::find(spec.substr(prefix.size(), slash - prefix.size())),
                                        spec.substr(slash + 1));
}

SimulatedNic::SimulatedNic(std::string spec, std::shared_ptr<SimulatedFabric> fabric, const std::string& name)
    : fabric_(std::move(fabric)), endpoint_(fabric_->attach(name)) {
  const SimulatedSettings settings = fabric_->settings();
  info_.name = std::move(spec);
  info_.kind = settings.kind;
  info_.takes_all_memory = settings.refuse_above == 0;
  info_.links_per_pair = settings.links_per_pair;
  refuse_above_ = settings.refuse_above;
  info_.provider = "simulated";
  info_.same_host_only = true;
  info_.completion_proves_landing = settings.completion_proves_landing;
  info_.closing_fences = settings.closing_fences;
  info_.closing_quiets = settings.closing_quiets;
  info_.resumable = settings.resumable && settings.completion_proves_landing && !settings.reorder;
  info_.datagrams = settings.datagrams;
  info_.max_write_bytes = settings.max_write_bytes;
  info_.link_depth = settings.link_depth;
  info_.max_message_bytes = settings.max_message_bytes;
}

SimulatedNic::~SimulatedNic() { fabric_->detach(*endpoint_); }

std::vector<std::byte> SimulatedNic::address() const { return to_bytes(endpoint_->name); }

uint64_t SimulatedNic::resolve(std::span<const std::byte> address) {
  if (address.empty() || address.size() > 100) throw NicError(info_.name + ": malformed address of a peer");
  std::lock_guard lock(peers_mutex_);
  peers_.try_emplace(next_peer_, reinterpret_cast<const char*>(address.data()), address.size());
  return next_peer_++;
}

void SimulatedNic::forget(uint64_t peer) {
  std::lock_guard lock(peers_mutex_);
  peers_.erase(peer);
}

bool SimulatedNic::send(uint64_t peer, std::span<const std::byte> message, void* context) {
  if (message.size() > info_.max_message_bytes) return false;
  std::string to;
  {
    std::lock_guard lock(peers_mutex_);
    to = peers_.at(peer);
  }
  fabric_->send(*endpoint_, to, message, context);
  return true;
}

std::string SimulatedNic::refuses(const MemorySpec& memory) const {
  if (memory.device >= 0) return info_.name + " cannot reach GPU memory";
  if (refuse_above_ == 0 || memory.length <= refuse_above_) return {};
  return info_.name + " takes memory of at most " + std::to_string(refuse_above_) + " bytes";
}

Registration SimulatedNic::register_memory(const MemorySpec& memory) {
  if (const std::string why = refuses(memory); !why.empty()) throw NicError(why);
  fabric_->add_memory(*endpoint_, memory.key_hint,
                      {static_cast<std::byte*>(memory.address), memory.length, memory.writable});
  return {.handle = new uint64_t(memory.key_hint), .local = nullptr, .blob = plain_blob(0, memory.key_hint)};
}

void SimulatedNic::deregister(Registration& registration) {
  const std::unique_ptr<uint64_t> rkey(static_cast<uint64_t*>(registration.handle));
  if (rkey) fabric_->remove_memory(*endpoint_, *rkey);
  registration = {};
}

std::unique_ptr<Link> SimulatedNic::create_link() { return std::make_unique<SimulatedLink>(*this); }

size_t SimulatedNic::poll(std::span<Completion> out) {
  messages_.clear();
  size_t n = 0;
  while (!discarded_.empty() && n < out.size()) {
    const auto [link, context] = discarded_.back();
    discarded_.pop_back();
    --link->outstanding_;
    out[n++] = {.kind = Completion::kWorkRequest, .status = Status::kOk, .context = context, .link = link};
  }
  if (n > 0) return n;
  messages_.reserve(out.size());  // spans into it stay valid
  n = fabric_->take(*endpoint_, out, messages_);
  for (size_t i = 0; i < n; ++i) {
    if (out[i].kind != Completion::kWorkRequest) continue;
    auto* link = static_cast<SimulatedLink*>(out[i].link);
    --link->outstanding_;
    if (out[i].status == Status::kOk && out[i].request) {
      link->immediates_completed_ += (out[i].request->flags & WorkRequest::kImmediate) != 0;
    }
    if (out[i].status == Status::kUnreachable || (info_.resumable && out[i].status != Status::kOk)) {
      link->broken_ = true;
    }
  }
  return n;
}

std::vector<std::byte> SimulatedLink::address() const {
  std::vector<std::byte> out(sizeof half_->id);
  std::memcpy(out.data(), &half_->id, sizeof half_->id);
  return out;
}

void SimulatedLink::connect(std::span<const std::byte> remote_address) {
  if (remote_address.size() != sizeof half_->remote_id) {
    throw NicError(nic_.info_.name + ": malformed link address of a peer");
  }
  std::memcpy(&half_->remote_id, remote_address.data(), sizeof half_->remote_id);
  connected_ = true;
}

size_t SimulatedLink::post(std::span<const WorkRequest> batch) {
  if (closed_ || broken_ || !connected_) return 0;
  const size_t room = nic_.info_.link_depth - std::min<size_t>(outstanding_, nic_.info_.link_depth);
  const size_t taken = std::min(room, batch.size());
  if (nic_.fabric_->discard.load(std::memory_order_relaxed)) {
    for (size_t i = 0; i < taken; ++i) nic_.discarded_.push_back({this, batch[i].context});
    outstanding_ += taken;
    return taken;
  }
  for (size_t i = 0; i < taken; ++i) {
    ++outstanding_;
    nic_.fabric_->post(*half_, batch[i]);
  }
  return taken;
}

void SimulatedLink::close() {
  if (closed_) return;
  closed_ = true;
  nic_.fabric_->close_half(*half_);
}

}  // namespace railwire
