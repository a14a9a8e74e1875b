// The classes behind host_nic.h. For the files of the shm NIC and their tests only.
//
//   HostNic ---- HostPeer (a NIC that we talk to: we have dialled it; our messages to it; its mapped regions)
//     |  \           \---- HostLink (one half of a link to a NIC of that peer)
//     |   \- Caller (a NIC that has dialled us: its messages; its packets for our links)
//     \- RegionTable, listening socket, one epoll descriptor that is readable when anything of it needs a look
//
// Everything is guarded by one lock, which set-up calls hold for a moment only. System calls that may take time are
// made outside of it.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "nic/host_copy.h"
#include "nic/host_frames.h"
#include "nic/host_gpu.h"
#include "nic/host_memory.h"
#include "nic/host_ring.h"
#include "nic/host_socket.h"
#include "nic/host_table.h"
#include "nic/nic.h"
#include "nic/quick_lock.h"

namespace railwire {

class HostLink;
class HostNic;

// A region of a peer's that is mapped here, or asked for.
struct HostMapping {
  SharedMemory memory;  // empty: asked for, or not to be had
  uint64_t base = 0, length = 0;
  std::byte* bytes = nullptr;  // where `base` is mapped
};

// What cannot be sent now: the receiver has not taken what came before.
struct HostPacket {
  HostFrame frame;
  std::vector<UniqueFd> descriptors;
};

struct HostPeer {
  HostToken name{};
  pid_t pid = 0;
  UniqueFd pidfd;  // tells the process' end; empty: it is our own
  HostSocket socket;
  SharedMemory message_memory;
  RingProducer messages;
  bool wants_room = false;  // send() found the ring full
  bool dead = false;
  uint32_t references = 0;  // of resolve() and of links
  uint64_t event = 0;       // in the epoll set
  std::deque<HostPacket> unsent;
  std::vector<HostLink*> links;
  std::unordered_map<uint64_t, HostMapping> mappings;  // by rkey

  void mappings_changed(HostNic& nic, uint64_t rkey);  // this one is no more
};

struct Caller {
  HostSocket socket;
  HostToken name{};
  bool introduced = false;  // its kHello has come
  int64_t since_ns = 0;
  SharedMemory message_memory;
  RingConsumer messages;
  bool ended = false;  // nothing follows after what is in the ring
  uint64_t event = 0;
  bool hot = false;
  uint32_t idle_polls = 0;
};

// Memory of our own that peers may map.
struct SharedRegion {
  int fd = -1;  // the registration's
  uint64_t offset = 0, length = 0;
  std::vector<HostLink*> holders;  // links whose peers were given it
};

class HostNic final : public Nic {
 public:
  explicit HostNic(const std::map<std::string, std::string>& options);
  ~HostNic() override;

  const NicInfo& info() const override { return info_; }
  std::vector<std::byte> address() const override { return pack(own_address()); }
  uint64_t resolve(std::span<const std::byte> address) override;
  void forget(uint64_t peer) override;
  bool send(uint64_t peer, std::span<const std::byte> message, void* context) override;
  std::string refuses(const MemorySpec& memory) const override;
  Registration register_memory(const MemorySpec& memory) override;
  void deregister(Registration& registration) override;
  RemoteMemory import_memory(std::span<const std::byte> blob) override;
  void release_memory(RemoteMemory& memory) override;
  std::unique_ptr<Link> create_link() override;
  size_t poll(std::span<Completion> out) override;
  bool working() const override { return copying_; }
  int wait_fd() const override { return epoll_.get(); }
  bool arm() override;
  void disarm() override;
  std::string describe(int32_t provider_error) const override;

 private:
  friend class HostLink;
  friend struct HostPeer;

  // host_nic.cpp
  HostAddress own_address() const;
  uint64_t watch(int fd);  // in the epoll set; returns the event's number
  void unwatch(int fd);

  // host_peer.cpp
  std::shared_ptr<HostPeer> find_or_dial(const HostAddress& address);
  std::shared_ptr<HostPeer> dial(const HostAddress& address) const;
  void let_go(HostPeer& peer);
  void peer_died(HostPeer& peer);
  void ring(const HostPeer& peer) const;
  void send_packet(HostPeer& peer, const HostFrame& frame, std::span<const int> descriptors = {});
  void flush_unsent(HostPeer& peer);

  // host_events.cpp: what the sockets say
  void look_at_events();
  void accept_callers();
  void hear(uint64_t event, Caller& caller);
  bool take_packet(Caller& caller, const HostFrame& frame, std::vector<UniqueFd>& descriptors);
  bool introduce(Caller& caller, const HostFrame& frame, std::vector<UniqueFd>& descriptors);
  void give_memory(HostLink& link, uint64_t rkey);
  void give_gpu_memory(Caller& caller, uint64_t rkey, uint64_t first);
  void fetch_chunks(const HostToken& owner, uint64_t key, std::vector<cuda::OwnedFd>* descriptors,
                    std::vector<uint64_t>* sizes);
  void map_memory(HostPeer& peer, const HostFrame& frame, int fd);
  void hear_peer(HostPeer& peer);
  void look_at_clock();
  void drop_caller(uint64_t event);

  // host_poll.cpp
  size_t take_messages(std::span<Completion> out);
  bool nothing_to_do();
  // Rings that poll() looks at are hot. A cold one has its sleep word set, so that the peer rings when it has put
  // something there; with hundreds of peers, most of them silent, to look at all would be what poll() does.
  void heat(HostLink& link);
  void heat(Caller& caller);
  void heat_links(const HostToken& peer);
  void cool_down();

  NicInfo info_;
  HostToken name_;
  DriverLock mutex_;
  RegionTable table_;
  HostGpu gpu_;
  std::unordered_map<uint64_t, SharedRegion> shared_;  // by key
  HostSocket listener_;
  UniqueFd epoll_;
  uint64_t next_event_ = 1;
  uint64_t listener_event_ = 0;
  bool listener_paused_ = false;
  std::map<HostToken, std::shared_ptr<HostPeer>> peers_;
  std::unordered_map<uint64_t, std::shared_ptr<HostPeer>> peer_events_;  // also those that are dead
  std::unordered_map<uint64_t, std::unique_ptr<Caller>> callers_;        // by event
  std::vector<Caller*> hot_callers_;
  std::map<HostToken, HostLink*> links_by_token_;
  std::vector<HostLink*> links_;  // that are connected
  std::vector<HostLink*> draining_links_;
  std::vector<HostLink*> hot_links_;
  size_t next_link_ = 0, next_caller_ = 0;
  uint32_t polls_ = 0;
  bool look_now_ = false;
  bool copying_ = false;  // the last poll() has copied, and there is more
  int64_t next_clock_ns_ = 0;
  size_t mapped_ = 0;  // HostMapping objects of all peers
  std::vector<Completion> held_;
  size_t next_held_ = 0;
  std::vector<std::byte> arena_;         // messages that poll() handed out last
  CmaList list_;                         // 32 KiB of scratch
  std::vector<cuda::Piece> pieces_;      // scratch
  std::vector<uint32_t> piece_entries_;  // scratch: how many of a list's stretches each of them is
};

class HostLink final : public Link {
 public:
  explicit HostLink(HostNic& nic);
  ~HostLink() override;

  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> remote_address) override;
  size_t post(std::span<const WorkRequest> batch) override;
  size_t outstanding() const override { return outstanding_; }
  bool broken() const override { return broken_; }
  void close() override;
  bool closed() const override { return closed_ && outstanding_ == 0; }
  bool fenced() const override;

 private:
  friend class HostNic;
  friend struct HostPeer;

  // How a WR's bytes travel.
  enum class Way : uint8_t { kUnknown, kNone, kInline, kMapped, kCma, kGpu, kBounce };
  struct Work {
    WorkRequest request;
    Way way = Way::kUnknown;
    Status status = Status::kOk;
    int32_t error = 0;
    uint64_t copied = 0;      // bytes
    uint64_t record = 0;      // kInline: where its record begins,
    uint64_t wait_for = 0;    // and where it ends: done when the peer has consumed so far
    std::byte* to = nullptr;  // kMapped
    uint64_t gpu = 0;         // kGpu, kBounce: the peer's memory, where it is a GPU's
    uint32_t pieces = 1;      // kGpu: stretches of pages, if it has a list,
    uint32_t given = 0;       // of which the copier has so many
    uint64_t batch = 0;       // of the copier: done when it has finished so far; 0: not given to it
    int bounce = -1;          // kBounce: the pinned buffer
    bool told = false;        // kGpu: its immediate is in the ring
  };

  // host_link.cpp: set-up
  void peer_says(const HostFrame& frame, std::vector<UniqueFd>& descriptors);  // a kLink packet
  void up_if_ready();
  void break_now(int32_t error);
  void take_back(Status status, int32_t error);
  void await_gpu();

  // host_post.cpp: the WRs' way
  Work& at(uint64_t number) { return works_[number & (works_.size() - 1)]; }
  void grow();
  bool has_to_copy() const { return next_ != end_; }
  uint64_t advance(uint64_t budget);
  void choose_way(Work& work);
  bool start_inline(Work& work);
  bool copy(uint64_t budget, uint64_t* copied);
  uint64_t copy_mapped(Work& work, uint64_t budget);
  bool copy_listed(uint64_t budget, uint64_t* copied);
  std::byte* mapped_at(const WorkRequest& request, const RegionRange& range);
  void forget_mapping() { last_rkey_ = 0; }
  bool peer_lives();
  bool look_at_ring();
  void complete();
  void publish();

  // host_gpu_post.cpp: where a side is a GPU's memory
  void choose_gpu_way(Work& work, bool remote_gpu, const RegionRange& range);
  bool list_allowed(const WorkRequest& request, const RegionRange& range) const;
  void add_pieces(const Work& work);
  bool start_gpu();
  bool bounce(Work& work);
  bool bounce_by_cpu(Work& work, bool to_bounce, uint64_t length);
  bool gpu_done(Work& work, uint64_t copied);
  bool gpu_under_way() { return last_batch_ > nic_.gpu_.finished() && !nic_.gpu_.failed(); }

  // host_poll.cpp
  size_t consume(std::span<Completion> out);

  HostNic& nic_;
  const HostToken token_;
  HostToken remote_token_{};
  std::shared_ptr<HostPeer> peer_;
  SharedMemory out_memory_, in_memory_, table_memory_;
  RingProducer out_;
  RingConsumer in_;
  RegionView remote_regions_;
  int64_t up_by_ns_ = 0;  // when the other half must have come
  bool connected_ = false, attached_ = false, up_ = false, broken_ = false, closed_ = false;
  uint64_t last_rkey_ = 0;  // of the mapping used last
  HostMapping* last_mapping_ = nullptr;
  int64_t seen_alive_ns_ = 0;  // the peer's process
  bool hot_ = false;
  uint32_t idle_polls_ = 0;
  bool blocked_ = false;   // the ring had no room for the next WR
  bool draining_ = false;  // taken back, but for what a GPU still copies
  uint64_t last_batch_ = 0;
  uint64_t last_gpu_rkey_ = 0, last_gpu_ = 0, last_gpu_changes_ = 0;  // what choose_gpu_way() looked up last
  std::vector<Work> works_;
  uint64_t first_ = 0, next_ = 0, end_ = 0;  // [first_, next_): started; [next_, end_): waiting
  uint64_t answered_ = 0;                    // [first_, answered_): what the peer said of their records has been read
  std::atomic<size_t> outstanding_{0};
};

int64_t host_clock_ns();

}  // namespace railwire
