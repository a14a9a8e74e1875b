// The classes behind libfabric_nic.h. For the files of the libfabric NIC and their tests only.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nic/host_wakeup.h"
#include "nic/libfabric_api.h"
#include "nic/message_pieces.h"
#include "nic/nic.h"

namespace railwire {

class LibfabricLink;
class LibfabricNic;

// What the user asked for, taken apart.
struct LibfabricSpec {
  std::string text;
  std::string kind;      // NicInfo::kind
  std::string provider;  // libfabric's name; empty fabric and domain: any
  std::string fabric;
  std::string domain;
  std::string host, port;   // tcp only
  uint32_t link_depth = 0;  // 0: default
  bool unsolicited_write_recv = true;
};
LibfabricSpec parse_libfabric_spec(const std::string& spec, const std::map<std::string, std::string>& options);

// The parts of an endpoint's address, as they travel to a peer.
struct EndpointAddress {
  std::string name;    // libfabric's
  std::string wakeup;  // HostWakeup::name(), empty if the peer never needs to be rung
};

// Behind every op_context. `provider` comes first: providers with FI_CONTEXT or FI_CONTEXT2 write into it.
struct OpContext {
  enum Kind : uint8_t { kWorkRequest, kSend, kReceive };
  fi_context2 provider{};
  Kind kind = kWorkRequest;
  bool busy = false;  // handed to the provider, not yet back
};

struct WrSlot : OpContext {
  void* context = nullptr;
  LibfabricLink* link = nullptr;
};

struct ControlPeer {
  std::string name;
  fi_addr_t address = FI_ADDR_UNSPEC;
  std::shared_ptr<HostBell> bell;
  uint32_t references = 0;   // of resolve()
  uint32_t outstanding = 0;  // sends
};

// A message that travels in pieces ends with the last of them, in whatever order they end.
struct SendGroup {
  size_t left = 0;
  int error = 0;
};

struct SendSlot : OpContext {
  void* context = nullptr;
  ControlPeer* peer = nullptr;
  std::byte* buffer = nullptr;
  size_t length = 0;
  std::shared_ptr<SendGroup> group;  // null: the message is one piece
};

struct ReceiveSlot : OpContext {
  std::byte* buffer = nullptr;
};

// Slots of one kind: handed out last in, first out, so that a short queue stays in cache. They never move, and live as
// long as the pool.
template <class Slot>
class SlotPool {
 public:
  explicit SlotPool(size_t most) : most_(most) { free_.reserve(most); }

  Slot* take() {
    if (free_.empty() && !grow()) [[unlikely]]
      return nullptr;
    Slot* slot = free_.back();
    free_.pop_back();
    slot->busy = true;
    return slot;
  }
  void give_back(Slot* slot) {
    slot->busy = false;
    free_.push_back(slot);
  }
  template <class F>
  void for_each_busy(F&& f) {
    for (auto& slab : slabs_) {
      for (Slot& slot : *slab) {
        if (slot.busy) f(slot);
      }
    }
  }
  bool owns(const void* slot) const {
    for (const auto& slab : slabs_) {
      if (slot >= slab->data() && slot < slab->data() + slab->size()) return true;
    }
    return false;
  }

 private:
  using Slab = std::array<Slot, 64>;

  bool grow() {
    if (slabs_.size() * std::tuple_size_v<Slab> >= most_) return false;
    slabs_.push_back(std::make_unique<Slab>());
    for (size_t i = slabs_.back()->size(); i-- > 0;) free_.push_back(&(*slabs_.back())[i]);
    return true;
  }

  size_t most_;
  std::vector<std::unique_ptr<Slab>> slabs_;
  std::vector<Slot*> free_;
};

// An endpoint with the address vector that it resolves its peers in.
struct Endpoint {
  FidOwner<fid_av> av;
  FidOwner<fid_ep> ep;  // goes first: it is bound to the other
};

class LibfabricNic final : public Nic {
 public:
  explicit LibfabricNic(LibfabricSpec spec);
  ~LibfabricNic() override;

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
  int wait_fd() const override { return naps_ ? -1 : wakeup_ ? wakeup_->fd() : cq_fd_; }
  bool arm() override;
  void disarm() override;
  std::string describe(int32_t provider_error) const override;
  std::string failure() const override;

 private:
  friend class LibfabricLink;

  // libfabric_nic.cpp: opening
  InfoOwner query(const std::string& port) const;
  bool efa() const { return spec_.provider == "efa"; }
  bool efa_direct() const { return efa() && spec_.fabric == "efa-direct"; }
  void open_domain();
  Endpoint open_endpoint(fi_info* info);
  void set_endpoint_options(fid_ep* ep);
  void look_at_endpoint(fid_ep* ep);
  void fill_info();
  std::string prefix() const { return "NIC " + spec_.text + ": "; }
  void check(int64_t code, const std::string& what) const { libfabric_check(code, prefix() + what); }

  // libfabric_address.cpp
  std::string endpoint_name(fid_ep* ep) const;
  std::vector<std::byte> pack(const std::string& name) const;
  EndpointAddress unpack(std::span<const std::byte> blob) const;
  fi_addr_t insert(fid_av* av, const EndpointAddress& address) const;
  std::shared_ptr<HostBell> bell_of(const std::string& wakeup);
  void refresh_bells();  // after one was let go

  // libfabric_memory.cpp
  FidOwner<fid_mr> register_range(const MemorySpec& memory) const;
  int try_register(const MemorySpec& memory, bool by_dmabuf, fid_mr** mr) const;

  // libfabric_messages.cpp; with the lock
  uint64_t take_peer(std::span<const std::byte> address);
  void let_peer_go(uint64_t handle);
  void open_messages();
  void post_receives();
  void release_peer(ControlPeer* peer);
  void post_unsent();
  bool send_ended(SendSlot* slot, int error, Completion& out);

  // libfabric_poll.cpp
  bool translate(const fi_cq_data_entry& entry, Completion& out, int error = 0);
  static int64_t now_ns();
  void give_up(int error);
  void look_for_overdue();
  bool translate_error(const fi_cq_err_entry& entry, Completion& out);
  bool owns(const void* context) const;
  size_t read_queue(std::span<Completion> out);
  bool has_held() const { return next_held_ < held_.size(); }
  size_t hand_out_held(std::span<Completion> out);
  void hold(Completion completion);
  bool drain(size_t at_most);  // from the queue to `held_`; true if anything came
  void drop_held(const LibfabricLink* link);

  // A post or send found no room although nothing of its own fills it: a connection is being made, and only polling
  // on both sides makes it. Keeps arm() from letting the caller sleep for a while; the peer is to be rung.
  void starved();
  static void ring(HostBell& bell) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    bell.ring_if_asleep();
  }

  // Set-up calls come from any thread, and the domain was promised one at a time (FI_THREAD_DOMAIN). Every call that
  // reaches the provider, or what follows here, holds this; but not while EFA pins memory, which takes long: its domain
  // is thread-safe.
  mutable std::mutex mutex_;
  LibfabricSpec spec_;
  NicInfo info_;
  bool thread_safe_ = false;              // the domain is
  bool own_endpoint_ = true;              // each link has one; otherwise all use the control endpoint
  bool recv_consumed_by_writes_ = false;  // FI_RX_CQ_DATA: a write with immediate uses up a receive buffer
  bool reaches_gpus_ = false;             // by itself, without CUDA calls on our thread
  size_t send_queue_ = 0;                 // of the endpoint that all links use: what they may have there together
  size_t in_send_queue_ = 0;              // WRs of all links
  int gave_up_ = 0;                       // what has ended the NIC, as libfabric numbers errors
  uint32_t polls_ = 0;
  InfoOwner fi_;       // of the control endpoint
  InfoOwner link_fi_;  // of the links' endpoints: the same without the port
  uint64_t mr_mode_ = 0;
  std::unique_ptr<HostWakeup> wakeup_;
  bool naps_ = false;            // 1.x: its queue must not be slept on
  uint64_t endpoints_made_ = 0;  // numbers the names of shm endpoints
  FidOwner<fid_fabric> fabric_;
  FidOwner<fid_domain> domain_;
  FidOwner<fid_cq> cq_;
  size_t cq_size_ = 0;
  int cq_fd_ = -1;
  FidOwner<fid_mr> arena_mr_;
  Endpoint control_;
  std::string control_name_;  // libfabric's

  // Messages
  std::byte* arena_ = nullptr;  // receive buffers, then send buffers
  size_t arena_bytes_ = 0;
  void* arena_desc_ = nullptr;
  std::vector<ReceiveSlot> receives_;
  std::vector<ReceiveSlot*> consumed_;  // their messages were handed out by the last poll()
  std::optional<SlotPool<SendSlot>> sends_;
  std::vector<std::byte*> send_buffers_;  // free ones
  size_t buffer_bytes_ = 0;               // of one message, or piece
  uint32_t piece_payload_ = 0;            // 0: the provider takes whole messages
  uint64_t sender_ = 0;                   // tells our pieces from another's
  uint32_t next_message_ = 0;
  PieceAssembler assembler_;
  std::deque<SendSlot*> unsent_;  // pieces that the provider had no room for
  std::map<std::string, std::unique_ptr<ControlPeer>> peers_;

  std::vector<Completion> held_;  // read from the queue, or made up, but not yet handed out
  size_t next_held_ = 0;
  std::vector<LibfabricLink*> links_;
  int64_t starved_until_ns_ = 0;
  std::map<std::string, std::weak_ptr<HostBell>> bells_by_name_;
  std::vector<HostBell*> bells_;  // the same, for quick looks: of everyone who may wait for our poll()
  std::vector<std::unique_ptr<SlotPool<WrSlot>>> orphans_;  // of links that went while the provider still held WRs
};

class LibfabricLink final : public Link {
 public:
  explicit LibfabricLink(LibfabricNic& nic);
  ~LibfabricLink() override;

  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> remote_address) override;
  size_t post(std::span<const WorkRequest> batch) override;
  size_t outstanding() const override { return outstanding_; }
  bool broken() const override { return broken_; }
  void close() override;
  bool closed() const override { return closed_ && outstanding_ == 0 && in_provider_ == 0; }

 private:
  friend class LibfabricNic;
  void close_locked();
  size_t room() const;
  void take_back(Status status, int error);

  ssize_t post_one(const WorkRequest& wr, WrSlot* slot);

  LibfabricNic& nic_;
  Endpoint own_;
  fid_ep* ep_ = nullptr;  // own, or the NIC's
  fi_addr_t remote_ = FI_ADDR_UNSPEC;
  uint64_t peer_ = 0;  // of Nic::resolve(), where links share the control endpoint and with it the address vector
  std::shared_ptr<HostBell> bell_;
  std::string name_;  // of our endpoint: asked for once, while it is open
  std::unique_ptr<SlotPool<WrSlot>> slots_;
  size_t in_provider_ = 0;  // slots whose completion has not been read
  size_t outstanding_ = 0;  // WRs that poll() has not handed back
  bool broken_ = false;
  bool closed_ = false;
  int64_t closed_at_ = 0;
};

// What a libfabric error number (positive) means for the WR or message that it ended.
Status status_of_libfabric(int error);

}  // namespace railwire
