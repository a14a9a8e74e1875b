// The classes behind tcp_nic.h. For the files of the tcp NIC and their tests only.
//
//   TcpNic --- TcpStranger  has connected and not said yet what it wants: a few seconds, a few of them
//          |-- TcpInbox     messages from one who has connected
//          |-- TcpOutbox    messages to one NIC; the connection is made when there is one, and again when it breaks
//          \-- TcpLink      one connection with a TcpMachine on it. The half with the smaller token dials.
//
// One epoll set watches all sockets, edge-triggered: each object remembers what it may read and write, and those that
// have something to do are listed. Driver calls and set-up calls are kept apart by one lock, held for no longer than a
// turn of poll().
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nic/nic.h"
#include "nic/tcp_gpu.h"
#include "nic/tcp_machine.h"
#include "nic/tcp_socket.h"

namespace railwire {

class TcpNic;

// An object with a socket in the NIC's epoll set.
class TcpWatched {
 public:
  explicit TcpWatched(TcpNic& nic) : nic_(nic) {}
  TcpWatched(const TcpWatched&) = delete;
  TcpWatched& operator=(const TcpWatched&) = delete;
  virtual ~TcpWatched() { drop(); }
  virtual void event(uint32_t events) = 0;  // may destroy the object

 protected:
  void hold(TcpFd fd);  // watches it
  void drop();          // closes it
  TcpFd release();      // unwatched

  TcpNic& nic_;
  TcpFd fd_;

 private:
  uint64_t watch_ = 0;
};

class TcpStranger final : public TcpWatched {
 public:
  TcpStranger(TcpNic& nic, TcpFd fd, int64_t now);
  void event(uint32_t events) override;
  int64_t since() const { return since_; }

 private:
  TcpHello hello_;
  size_t got_ = 0;
  int64_t since_;
};

class TcpInbox final : public TcpWatched {
 public:
  TcpInbox(TcpNic& nic, TcpFd fd);
  ~TcpInbox() override;
  void event(uint32_t events) override;
  // Messages into `out`, from `*filled` on. False: it has nothing more, or must go (gone()).
  bool take(std::span<Completion> out, size_t* filled);
  void give_back() { lent_ = false; }  // nobody looks at the messages any more
  bool gone() const { return gone_; }
  bool lent() const { return lent_; }
  uint64_t last_turn() const { return last_turn_; }
  int64_t stuck_since(int64_t now);  // in the middle of a message; 0: it is not

 private:
  std::vector<std::byte> bytes_;
  size_t begin_ = 0, end_ = 0;
  bool readable_ = false, ending_ = false, lent_ = false, gone_ = false, listed_ = false;
  uint64_t last_turn_ = 0;
  int64_t stuck_since_ = 0;
  friend class TcpNic;
};

class TcpOutbox final : public TcpWatched {
 public:
  TcpOutbox(TcpNic& nic, const TcpEnd& to) : TcpWatched(nic), to_(to) {}
  void event(uint32_t events) override;
  bool send(std::span<const std::byte> message, void* context);

  uint32_t references = 0;

 private:
  struct Message {
    std::vector<std::byte> bytes;
    void* context = nullptr;
    bool hello = false;
  };
  void dial();
  void flush();
  void broke(int error);

  const TcpEnd to_;
  std::deque<Message> queue_;
  size_t queued_ = 0, first_sent_ = 0;  // bytes; of the first message
  bool up_ = false, writable_ = false;
};

class TcpLink final : public Link, public TcpWatched {
 public:
  explicit TcpLink(TcpNic& nic);
  ~TcpLink() override;

  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> remote_address) override;
  size_t post(std::span<const WorkRequest> batch) override;
  size_t outstanding() const override { return machine_.outstanding(); }
  bool broken() const override { return broken_.load(std::memory_order_relaxed); }
  void close() override;
  bool closed() const override { return closed_ && machine_.outstanding() == 0 && machine_.quiet(); }
  bool shut() const override { return machine_.quiet(); }  // a copy to a GPU may be under way
  uint64_t immediates_landed() const override { return machine_.immediates_landed(); }
  uint64_t immediates_completed() const override { return machine_.immediates_completed(); }
  bool worked() const override { return machine_.worked(); }

  void event(uint32_t events) override;

 private:
  friend class TcpNic;

  const TcpToken& token() const { return token_; }
  void adopt(TcpFd fd, const TcpToken& from);  // a connection of the other half's
  void progress();                             // a turn: reads and writes some
  bool has_output() const { return up_ && writable_ && (hello_left_ > 0 || machine_.has_output()); }
  bool has_work() const { return readable_ || has_output(); }
  void read(uint64_t budget);
  void write(uint64_t budget, bool landed_too);
  void source_gone();
  void look_at_machine();
  void came_up();
  void broke(Status status, int error);
  void note_broken();
  void look_at_clock(int64_t now);

  TcpMachine machine_;
  const TcpToken token_;
  TcpToken remote_{};
  TcpFd parked_;  // the other half's connection, before we were told of it
  TcpToken parked_from_{};
  bool connected_ = false;  // told of the other half
  bool dialling_ = false, up_ = false, closed_ = false;
  bool readable_ = false, writable_ = false;
  bool ending_ = false;     // the stream's end has been seen coming
  bool lingering_ = false;  // a refusal is on its way: what still comes is thrown away
  bool listed_ = false, owes_ = false, ended_listed_ = false, gpu_listed_ = false;
  int error_ = 0;  // of a write
  int64_t up_by_ = 0;
  int64_t linger_until_ = 0;
  uint64_t read_turn_ = 0;  // when bytes last came in
  size_t hello_left_ = 0;
  std::atomic<bool> broken_{false};
};

class TcpNic final : public Nic {
 public:
  TcpNic(TcpSpec spec, const GpuOptions& gpu);
  ~TcpNic() override;

  const NicInfo& info() const override { return info_; }
  std::vector<std::byte> address() const override { return pack_tcp_address(spec_.end); }
  uint64_t resolve(std::span<const std::byte> address) override;
  void forget(uint64_t peer) override;
  bool send(uint64_t peer, std::span<const std::byte> message, void* context) override;
  std::string refuses(const MemorySpec& memory) const override;
  Registration register_memory(const MemorySpec& memory) override;
  void deregister(Registration& registration) override;
  std::unique_ptr<Link> create_link() override;
  size_t poll(std::span<Completion> out) override;
  int wait_fd() const override { return epoll_.get(); }
  bool arm() override;
  void disarm() override;
  std::string describe(int32_t provider_error) const override;

 private:
  friend class TcpWatched;
  friend class TcpStranger;
  friend class TcpInbox;
  friend class TcpOutbox;
  friend class TcpLink;

  class Listener final : public TcpWatched {
   public:
    Listener(TcpNic& nic, TcpFd fd) : TcpWatched(nic) { hold(std::move(fd)); }
    void event(uint32_t events) override;
    int64_t paused_until = 0;
    bool more = false;  // connections wait
  };
  class Bell final : public TcpWatched {  // wakes a sleeping driver
   public:
    explicit Bell(TcpNic& nic);
    void event(uint32_t events) override;
    void ring();
  };

  // tcp_nic.cpp: the epoll set
  uint64_t watch(TcpWatched* object, int fd);
  void unwatch(uint64_t watch, int fd);

  // tcp_accept.cpp
  void introduced(TcpStranger& stranger, TcpFd fd, const TcpHello& hello);
  void make_room_for_inbox();
  void look_at_clock();

  // tcp_poll.cpp
  size_t hand_out(std::span<Completion> out);
  size_t hand_out_messages(std::span<Completion> out);
  void progress();
  void look_at_sockets();
  void tell_landed(bool all);
  bool idle() const;
  void note_work(TcpLink& link);
  void note_ended(TcpLink& link);
  void note_owes(TcpLink& link);
  void note_gpu(TcpLink& link);
  void look_at_gpu();
  void await_gpu(uint64_t copy);
  void send_ended(void* context, int error);
  void wake_if_asleep();

  TcpSpec spec_;
  NicInfo info_;
  TcpRegions regions_;
  const bool has_gpu_;
  TcpGpu gpu_;
  std::mutex mutex_;
  TcpFd epoll_;
  struct Watch {
    TcpWatched* object = nullptr;
    uint32_t generation = 0;
  };
  std::vector<Watch> watches_;
  std::vector<uint32_t> free_watches_;
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<Bell> bell_;
  std::deque<std::unique_ptr<TcpStranger>> strangers_;  // the oldest first
  std::vector<std::unique_ptr<TcpInbox>> inboxes_;
  size_t most_inboxes_ = 0;
  std::map<std::string, std::unique_ptr<TcpOutbox>> outboxes_;  // by address
  std::map<TcpToken, TcpLink*> links_;

  std::vector<TcpLink*> working_;  // have something to read or write
  std::vector<TcpLink*> turn_;     // those of this turn
  std::vector<TcpLink*> ended_;    // have completions
  std::vector<TcpLink*> owing_;    // have not told what has landed
  std::vector<TcpLink*> copying_;  // wait for a GPU's copies
  std::deque<TcpInbox*> talking_;  // have messages, perhaps
  std::vector<TcpInbox*> lent_;
  std::vector<uint32_t> immediates_;
  size_t next_immediate_ = 0;
  std::deque<Completion> sends_;
  uint64_t turn_number_ = 0;
  int64_t next_clock_ = 0;
  bool armed_ = false;
};

int64_t tcp_clock_ns();

}  // namespace railwire
