// A NIC on a simulated fabric (simulated_fabric.h).
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "nic/nic.h"
#include "nic/simulated_fabric.h"

namespace railwire {

// "sim://FABRIC/NAME". Throws NicError if there is no such fabric, or the name is taken.
std::unique_ptr<Nic> make_simulated_nic(const std::string& spec);

class SimulatedLink;

class SimulatedNic final : public Nic {
 public:
  SimulatedNic(std::string spec, std::shared_ptr<SimulatedFabric> fabric, const std::string& name);
  ~SimulatedNic() override;

  const NicInfo& info() const override { return info_; }
  std::vector<std::byte> address() const override;
  uint64_t resolve(std::span<const std::byte> address) override;
  void forget(uint64_t peer) override;
  bool send(uint64_t peer, std::span<const std::byte> message, void* context) override;
  std::string refuses(const MemorySpec& memory) const override;
  Registration register_memory(const MemorySpec& memory) override;
  void deregister(Registration& registration) override;
  std::unique_ptr<Link> create_link() override;
  size_t poll(std::span<Completion> out) override;
  int wait_fd() const override { return endpoint_->event_fd; }
  bool arm() override { return discarded_.empty() && fabric_->quiet(*endpoint_); }
  void disarm() override {}
  std::string describe(int32_t) const override { return "simulated"; }

 private:
  friend class SimulatedLink;

  const std::shared_ptr<SimulatedFabric> fabric_;
  std::shared_ptr<SimulatedEndpoint> endpoint_;
  NicInfo info_;
  uint64_t refuse_above_ = 0;
  std::mutex peers_mutex_;
  std::unordered_map<uint64_t, std::string> peers_;
  uint64_t next_peer_ = 1;
  std::vector<SimulatedEndpoint::Arrival> messages_;  // handed out by the last poll
  struct Discarded {
    SimulatedLink* link;
    void* context;
  };
  std::vector<Discarded> discarded_;  // of discard mode: completed, not yet polled
};

class SimulatedLink final : public Link {
 public:
  explicit SimulatedLink(SimulatedNic& nic) : nic_(nic), half_(nic.fabric_->open_half(*nic.endpoint_, this)) {}
  ~SimulatedLink() override { close(); }

  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> remote_address) override;
  size_t post(std::span<const WorkRequest> batch) override;
  size_t outstanding() const override { return outstanding_; }
  bool broken() const override { return broken_ || (nic_.info_.resumable && nic_.fabric_->has_broken(*half_)); }
  void close() override;
  bool closed() const override { return closed_ && outstanding_ == 0; }
  uint64_t immediates_landed() const override { return nic_.fabric_->immediates_landed(*half_); }
  uint64_t immediates_completed() const override { return immediates_completed_; }

 private:
  friend class SimulatedNic;

  SimulatedNic& nic_;
  const std::shared_ptr<SimulatedHalf> half_;
  size_t outstanding_ = 0;
  uint64_t immediates_completed_ = 0;
  bool connected_ = false;
  bool closed_ = false;
  bool broken_ = false;
};

}  // namespace railwire
