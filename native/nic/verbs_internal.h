// The classes behind verbs_nic.h. For the files of the verbs NIC and their tests only.
//
// One device has one completion queue, so that a poll is one call. What can be in it is bounded by what has been posted
// and not yet polled: the links' WRs (link_depth each), the receive WRs of the shared receive queue, and the control
// endpoint's. The queue is made to hold all of that, and grows with the links: it cannot overrun.
//
// Two receive queues keep RECVs and writes with immediate apart: the control endpoint is a UD queue pair with one of
// its own (anyone who knows its address can send to it, which no RC queue pair offers), the links' RC queue pairs share
// an SRQ. Neither can take the other's receive WRs.
//
// What a completion belongs to is told by its wr_id alone: verbs leaves every other field undefined on errors.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nic/message_pieces.h"
#include "nic/nic.h"
#include "nic/setup_thread.h"
#include "nic/verbs_api.h"
#include "nic/verbs_device.h"

namespace railwire {

class VerbsLink;
class VerbsNic;

// wr_id = kind (8 bits) | owner (24) | number (32)
enum class WrKind : uint8_t { kLink = 1, kSharedReceive, kMessageSend, kMessageReceive };
inline uint64_t make_wr_id(WrKind kind, uint32_t owner, uint32_t number) {
  return uint64_t{static_cast<uint8_t>(kind)} << 56 | uint64_t{owner & 0xffffff} << 32 | number;
}

Status status_of_wc(int wc_status);

// Behind Registration::local and ::handle.
struct VerbsMemory {
  MrOwner mr;
  uint32_t lkey = 0;
  bool host = true;  // the CPU may read it: what inline WRs need
};

// What a peer must know of one of our queue pairs; the same bytes for links and for the control endpoint.
struct VerbsAddress {
  uint8_t ethernet = 0;
  uint8_t mtu = 0;         // ibv_mtu
  uint8_t read_depth = 0;  // RDMA reads that this end can answer at a time (links)
  uint32_t qp_number = 0;
  uint32_t secret = 0;  // first packet number (links), Q_Key (control)
  uint16_t lid = 0;
  ibv_gid gid{};
};
std::vector<std::byte> pack_verbs_address(const VerbsAddress& address);
// Throws NicError, beginning with `prefix`, if the bytes are no such address.
VerbsAddress unpack_verbs_address(std::span<const std::byte> blob, const std::string& prefix);

class VerbsLink final : public Link {
 public:
  explicit VerbsLink(VerbsNic& nic);
  ~VerbsLink() override;

  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> remote_address) override;
  size_t post(std::span<const WorkRequest> batch) override;
  size_t outstanding() const override { return posted_ - handed_; }
  bool broken() const override { return broken_; }
  void close() override;
  bool closed() const override { return shut() && handed_ == posted_; }
  bool shut() const override { return shut_.load(std::memory_order_acquire); }
  uint64_t immediates_landed() const override { return landed_; }
  uint64_t immediates_completed() const override { return completed_; }

 private:
  friend class VerbsNic;

  struct Slot {
    WorkRequest request;
    int32_t wc_status = 0;
  };

  void fill(ibv_send_wr& wr, ibv_sge& sge, const WorkRequest& request, uint32_t number);
  size_t post_chain(std::span<const WorkRequest> chain);
  void ended(uint32_t number, int wc_status);
  size_t hand_out(std::span<Completion> out);
  void begin_end();
  void begin_end_locked(bool in_error);
  void advance_end();
  void destroy();
  void finish_end();

  VerbsNic& nic_;
  QpOwner qp_;
  uint32_t qp_number_ = 0;
  uint32_t id_ = 0;
  uint32_t first_packet_ = 0;
  uint32_t max_inline_ = 0;
  uint32_t signal_every_ = 1;
  std::vector<Slot> slots_;  // a ring: slot of WR number n is n % size
  // WRs by number: handed_ <= done_ <= posted_. RC ends them in order, so whatever ends one has ended all before it.
  uint64_t posted_ = 0, done_ = 0, handed_ = 0;
  uint64_t landed_ = 0, completed_ = 0;
  bool in_ready_ = false;  // listed in the NIC as having WRs to hand out
  bool connected_ = false, closed_ = false;
  std::atomic<bool> broken_ = false;
  // After close(), step by step. Changed under the NIC's mutex.
  enum class End : uint8_t { kNone, kFlushing, kDestroying, kDestroyed, kOver } end_ = End::kNone;
  int64_t end_since_ = 0;
  std::atomic<bool> shut_ = false;
  bool abandoned_ = false;     // the NIC is gone, and everything of it that this one was in
  bool last_receive_ = false;  // the device said that this queue pair takes no more receive WRs
};

class VerbsNic final : public Nic {
 public:
  VerbsNic(VerbsSpec spec, const std::map<std::string, std::string>& options);
  ~VerbsNic() override;

  const NicInfo& info() const override { return info_; }
  std::vector<std::byte> address() const override;
  uint64_t resolve(std::span<const std::byte> address) override;
  void forget(uint64_t peer) override;
  bool send(uint64_t peer, std::span<const std::byte> message, void* context) override;
  Registration register_memory(const MemorySpec& memory) override;
  void deregister(Registration& registration) override;
  std::unique_ptr<Link> create_link() override;
  size_t poll(std::span<Completion> out) override;
  int wait_fd() const override { return epoll_fd_; }
  bool arm() override;
  void disarm() override;
  std::string describe(int32_t provider_error) const override;

 private:
  friend class VerbsLink;
  static constexpr size_t kChain = 64;  // WRs per doorbell, at most
  static constexpr uint32_t kSends = 256, kReceives = 512;

  struct ControlPeer {
    AhOwner route;
    uint32_t qp_number = 0, qkey = 0;
    uint32_t payload = 0;  // of one packet
  };
  struct Send {
    void* context = nullptr;
    bool last = false;  // of its message
    bool failed = false;
  };
  // verbs_nic.cpp
  void open_queues();
  void reserve_completions(size_t links);
  ibv_ah_attr path_to(const VerbsAddress& remote) const;
  void check_same_network(const VerbsAddress& remote) const;
  std::string prefix() const { return spec_.prefix(); }

  // verbs_messages.cpp: the control endpoint
  void open_messages();
  void ready_messages();  // from whatever state to ready to send, with receives posted
  bool post_receive(uint32_t slot);
  void recycle_receives();
  std::byte* receive_buffer(uint32_t slot) { return receive_bytes_.data() + size_t{slot} * receive_stride_; }
  bool message_piece(const ibv_wc& wc, uint32_t slot, Completion& out);
  bool send_ended(const ibv_wc& wc, uint32_t slot, Completion& out);

  // verbs_poll.cpp
  bool take(const ibv_wc& wc, Completion& out);
  void immediate_through(uint32_t qp_number);
  VerbsLink* link_of(uint32_t qp_number);
  size_t pull(std::span<Completion> out, size_t* polled);
  size_t hand_out(std::span<Completion> out);
  void drain();  // all that is in the queue, to held_
  void advance_ends();
  void note_ready(VerbsLink& link);
  void refill();
  void look_at_events();
  void drain_notifications();

  const VerbsSpec spec_;
  NicInfo info_;
  VerbsPortChoice port_;
  int epoll_fd_ = -1;
  PdOwner pd_;
  ChannelOwner channel_;
  CqOwner cq_;
  SrqOwner srq_;
  size_t cq_room_ = 0;
  bool imports_dmabufs_ = false;

  // libibverbs is thread-safe by itself; what follows here is not. Set-up calls hold the first while they make a link,
  // and anybody the second while they look at or change what follows.
  std::mutex setup_mutex_, mutex_;

  // Links, by the owner field of their wr_ids.
  std::vector<VerbsLink*> links_;
  size_t links_open_ = 0;
  std::unordered_map<uint32_t, VerbsLink*> by_qp_;
  uint32_t last_qp_ = 0;  // whose immediate came last, and its link
  VerbsLink* last_link_ = nullptr;
  std::vector<VerbsLink*> ready_;
  std::vector<VerbsLink*> closing_;
  SetupThread closer_;  // modifies and destroys the queue pairs of links that are closed

  // Templates: all that never changes in a chain is written once.
  std::array<ibv_send_wr, kChain> wrs_{};
  std::array<ibv_sge, kChain> sges_{};
  std::array<ibv_recv_wr, kChain> receive_wrs_{};
  uint32_t receives_missing_ = 0;  // in the shared receive queue
  uint32_t refill_at_ = kChain;    // as many are posted at a time

  // What drain() took off the queue for a later poll(). Messages are copied: their buffers are posted again meanwhile.
  struct Held {
    Completion completion;
    std::vector<std::byte> message;
  };
  void hold(const Completion& completion);
  std::deque<Held> held_;

  // The control endpoint.
  QpOwner message_qp_;
  uint32_t qkey_ = 0;
  uint64_t sender_ = 0;      // tells our messages from another's
  uint32_t generation_ = 0;  // of message_qp_: counts its recoveries
  bool messages_broken_ = false;
  uint32_t payload_ = 0;  // of one packet of ours
  size_t receive_stride_ = 0;
  std::vector<std::byte> receive_bytes_, send_bytes_;
  MrOwner receive_mr_, send_mr_;
  std::array<Send, kSends> sends_{};
  std::vector<uint32_t> free_sends_;
  std::vector<uint32_t> used_receives_;  // to be posted again
  std::vector<uint32_t> lent_receives_;  // their message was handed out: until the next poll()
  std::deque<std::vector<std::byte>> lent_messages_;
  PieceAssembler assembler_;
  uint32_t next_message_ = 0;
  std::map<uint64_t, ControlPeer> peers_;
  uint64_t next_peer_ = 1;

  bool armed_ = false;
  uint32_t unacknowledged_ = 0;  // notifications
  uint32_t polls_ = 0;
};

}  // namespace railwire
