// A NIC that does what a test says: WRs come back when polled, writes of the peer's land at each poll or never, a flush
// breaks the link if the test wants it, and the test can stand in the way of a poll, or be told when a link closes or
// goes.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "nic/nic.h"

namespace railwire::testing {

class StandInNic final : public Nic {
 public:
  static constexpr size_t kDepth = 64;

  StandInNic(const std::string& name, bool proves) {
    info_.name = name;
    info_.kind = "stand-in";
    info_.completion_proves_landing = proves;
    info_.max_write_bytes = 1 << 30;
    info_.link_depth = kDepth;
    info_.max_message_bytes = 65536;
  }
  const NicInfo& info() const override { return info_; }
  std::vector<std::byte> address() const override { return std::vector<std::byte>(4); }
  uint64_t resolve(std::span<const std::byte>) override { return 1; }
  void forget(uint64_t) override {}
  bool send(uint64_t, std::span<const std::byte>, void*) override {
    ++sent;
    return true;
  }
  Registration register_memory(const MemorySpec& m) override { return {.handle = m.address, .blob = plain_blob(0, 1)}; }
  void deregister(Registration& registration) override { registration = {}; }
  std::unique_ptr<railwire::Link> create_link() override {
    auto link = std::make_unique<Link>(*this);
    std::lock_guard lock(links_mutex_);
    links_.push_back(link.get());
    return link;
  }
  size_t poll(std::span<Completion> out) override {
    ++at_the_gate;
    std::lock_guard gate(polling);
    --at_the_gate;
    if (polls_until_flushes_break > 0 && --polls_until_flushes_break == 0) flushes_break_ = true;
    size_t n = 0;
    if (arrivals) out[n++] = {.kind = Completion::kImmediate, .immediate = *arrivals};
    std::lock_guard lock(links_mutex_);
    for (Link* link : links_) {
      for (; n < out.size() && !link->back.empty(); ++n, link->back.pop_front()) out[n] = link->back.front();
    }
    return n;
  }
  int wait_fd() const override { return -1; }
  bool arm() override { return true; }
  void disarm() override {}
  std::string describe(int32_t) const override { return ""; }

  std::mutex polling;                 // whoever holds it holds up the driver
  std::atomic<int> at_the_gate{0};    // the driver stands before it, or passes
  int polls_until_flushes_break = 0;  // under `polling`; 0: they find no room
  std::optional<uint32_t> arrivals;   // this immediate comes with each poll
  size_t sent = 0;                    // messages
  std::atomic<size_t> room{kDepth};   // WRs that a link takes, whatever depth it says it has
  std::function<void()> on_link_closed, on_link_gone;

 private:
  struct Link final : railwire::Link {
    explicit Link(StandInNic& nic) : nic(nic) {}
    ~Link() override {
      {
        std::lock_guard lock(nic.links_mutex_);
        std::erase(nic.links_, this);
      }
      if (nic.on_link_gone) nic.on_link_gone();
    }
    std::vector<std::byte> address() const override { return std::vector<std::byte>(4); }
    void connect(std::span<const std::byte>) override {}
    size_t post(std::span<const WorkRequest> batch) override {
      if (broke) return 0;
      if (batch[0].flags & WorkRequest::kFlush) {
        broke = nic.flushes_break_;
        return 0;
      }
      size_t n = 0;
      for (; n < batch.size() && back.size() < nic.room; ++n) {
        back.push_back({.kind = Completion::kWorkRequest, .context = batch[n].context, .link = this});
      }
      return n;
    }
    size_t outstanding() const override { return back.size(); }
    bool closed() const override { return is_closed && back.empty(); }
    bool broken() const override { return broke; }
    void close() override {
      broke = true;
      if (!std::exchange(is_closed, true) && nic.on_link_closed) nic.on_link_closed();
    }

    StandInNic& nic;
    bool broke = false, is_closed = false;
    std::deque<Completion> back;
  };

  NicInfo info_;
  bool flushes_break_ = false;
  std::mutex links_mutex_;
  std::vector<Link*> links_;
};

}  // namespace railwire::testing
