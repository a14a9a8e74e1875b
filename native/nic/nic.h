// What the engine needs of a network card, and nothing more.
//
// A Nic is one network device (or a provider standing in for one). It knows nothing of striping, counters, transfers
// or Python. Its calls are of two kinds:
//
// * *Set-up calls* may block and are thread-safe: any thread makes them, several at a time, and also while another
//   thread is in a driver call. The constructor, resolve, forget, register_memory, deregister, import_memory,
//   release_memory, create_link, Link::address, Link::connect, ~Link.
// * *Driver calls* never block. One thread at a time makes them (the engine's driver): send, post, poll, arm, disarm,
//   outstanding, broken, closed, shut, Link::close, and the counts of immediates.
//
// info(), refuses(), address(), wait_fd() and describe() read what never changes: anybody may call them at any time.
//
// A NIC has one *control endpoint*: small two-sided messages from and to anyone who knows its address. One-sided
// traffic never uses it; it runs over *links*. A link is one half of a connection between one local and one remote NIC
// (an RC queue pair, or a pair of libfabric endpoints). Links exist because closing a connection is the only way, on
// most transports, to take work requests back and to keep a peer from writing any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace railwire {

// Thrown by set-up calls (construction, registration, links). Posting and polling never throw: they return a status.
class NicError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct NicInfo {
  std::string name;      // as the user may name it again: "tcp://127.0.0.1:40123", "shm", "efa:rdmap0s6", "sim://f/a0"
  std::string kind;      // NICs of one kind can talk: "tcp", "shm", "efa", "verbs", "sim"
  std::string provider;  // "libfabric 2.5 tcp", "simulated"; for people
  std::string library;   // path of the library behind it; empty if none
  bool same_host_only = false;
  // A write's completion proves that its bytes are visible at the destination. Where false, a WR with
  // WorkRequest::kFlush proves it for everything posted before it on the same link.
  bool completion_proves_landing = true;
  // Once Link::shut(), no byte of the remote half can land in local memory any more. False where the writer itself
  // copies into our memory: there the writer has to confirm, or be dead.
  bool closing_fences = true;
  // Once Link::closed(), nobody, the peer's process included, reads our sources or writes our read targets for WRs of
  // this link. False where the peer's process copies from our memory (libfabric's shm): there the peer has to confirm
  // that it has closed its half, or be dead, before a source may be used again.
  bool closing_quiets = true;
  // Links land what is posted in the order of posting (to be exact: an immediate that has come shows all that was
  // posted before it, which relaxed ordering leaves true), both halves count the immediates, and a link that has broken
  // can be made anew while messages still pass. So the receiver's count of what landed through a broken link tells the
  // sender exactly what to send again over another one (engine/failover.cpp). RC queue pairs are like that; EFA's SRD
  // keeps no order, and libfabric's tcp tells nobody what had landed.
  bool resumable = false;
  // Control messages are datagrams: one that fails tells of our own port, and nothing of the peer. Where false, it says
  // that the peer's process does not take it.
  bool datagrams = false;
  uint64_t max_write_bytes = 0;    // the longest single WR
  uint32_t link_depth = 0;         // WRs a link may have outstanding
  uint32_t max_message_bytes = 0;  // the longest control message
  double link_gbps = 0;            // 0: unknown
  // Takes any memory of this machine. Where false, refuses() is asked, and peers are reached over another kind, too.
  bool takes_all_memory = true;
  uint32_t links_per_pair = 1;  // links that are made between two NICs; each has its own order and its own counts
  // Where there is no wait_fd(): how long a nap may last before what peers bring about may not fit into the completion
  // queue. 0: any time.
  int64_t longest_nap_ns = 0;
  std::string warning;  // what its user should know, such as that writes are emulated; empty if all is well
};

// What must be known to register memory. `dmabuf_fd` >= 0: device memory, described by a dma-buf. `shared_fd` >= 0:
// memory of a file (a memfd) that other processes may map. The descriptors stay open for as long as the registration.
struct MemorySpec {
  void* address = nullptr;
  uint64_t length = 0;
  int dmabuf_fd = -1;
  uint64_t dmabuf_offset = 0;
  int device = -1;        // CUDA ordinal; -1: host memory
  uint64_t key_hint = 0;  // random; used as the rkey where the provider lets us choose
  bool writable = true;   // false: a source only, perhaps mapped read-only; a peer's write is refused
  int shared_fd = -1;
  uint64_t shared_offset = 0;
};

// One registration on one NIC. `local` goes into WorkRequest::local_key of this NIC; `blob` is what peers get. It is
// opaque to everybody but NICs of this kind, and at most kLongestBlob bytes long.
struct Registration {
  void* handle = nullptr;
  void* local = nullptr;
  bool takes_lists = false;  // WorkRequest::list may name it, on our side
  std::vector<std::byte> blob;
};
inline constexpr size_t kLongestBlob = 256;

// A peer's registration as this NIC reaches it: a WR names `base` + offset, and `rkey`.
struct RemoteMemory {
  uint64_t base = 0;
  uint64_t rkey = 0;
  void* handle = nullptr;    // of the NIC's own; null: there is nothing to release
  bool takes_lists = false;  // WorkRequest::list may name it, on the peer's side
};

// The blob of RDMA NICs: base and rkey, little endian.
std::vector<std::byte> plain_blob(uint64_t base, uint64_t rkey);
// Throws NicError, which begins with `name`, if the bytes are no such blob.
RemoteMemory parse_plain_blob(std::span<const std::byte> blob, const std::string& name);

// Many pages in one WR: each consists of the same stretches, and is told by an index on either side. The bytes of
// stretch s of page i are `length` bytes at local + local_pages[i] * local_stride + s.local of the WR, and the same
// with `remote`. Only where both registrations take lists. Stays as it is until the WR has come back.
struct PageList {
  struct Stretch {
    uint64_t local = 0, remote = 0, length = 0;
  };
  const uint32_t* local_pages = nullptr;
  const uint32_t* remote_pages = nullptr;
  const Stretch* stretches = nullptr;
  uint64_t local_stride = 0, remote_stride = 0;
  uint32_t pages = 0;
  uint32_t stretch_count = 0;
};

struct WorkRequest {
  enum Flags : uint32_t {
    kWrite = 0,
    kRead = 1,
    kImmediate = 2,  // a write that carries `immediate`
    kFlush = 4,      // a write whose completion proves that it, and all before it on the link, landed
  };
  void* local = nullptr;  // may be null if length is 0
  void* local_key = nullptr;
  uint64_t remote = 0;
  uint64_t rkey = 0;
  uint64_t length = 0;  // of all pages, if there is a list
  uint32_t flags = kWrite;
  uint32_t immediate = 0;
  void* context = nullptr;         // comes back in Completion::context
  const PageList* list = nullptr;  // null: contiguous
};

enum class Status : uint8_t {
  kOk = 0,
  kFlushed,       // taken back unfinished: the link was closed or broke before the WR's end
  kRemoteAccess,  // the peer refused: wrong key, out of range
  kUnreachable,   // the connection is gone: refused, reset, timed out
  kLocal,         // our own fault: a local key or length is wrong
  kOther,
};
const char* to_string(Status status);

class Link;

struct Completion {
  enum Kind : uint8_t {
    kWorkRequest,  // a WR of Link::post came back: context, status, link
    kSend,         // a message of Nic::send came back: context, status
    kMessage,      // a control message arrived: data, valid until the next poll(); no status
    kImmediate,    // a peer's write with immediate landed: immediate
  };
  Kind kind = kWorkRequest;
  Status status = Status::kOk;
  uint32_t immediate = 0;
  int32_t provider_error = 0;  // errno-like, 0 if none; Nic::describe(provider_error) puts it into words
  void* context = nullptr;
  Link* link = nullptr;
  std::span<const std::byte> data = {};
  // Of a WR that did not end with kOk, where NicInfo::resumable: what was posted. Valid until the next poll() or
  // post().
  const WorkRequest* request = nullptr;
};

class Link {
 public:
  // Closes first if the owner has not, and may block until the provider has given everything back. The NIC outlives
  // its links.
  virtual ~Link() = default;

  // What the remote half must be given to connect(): opaque, at most 128 bytes.
  virtual std::vector<std::byte> address() const = 0;
  // Makes the link able to post to the remote half. Throws NicError on a malformed address.
  virtual void connect(std::span<const std::byte> remote_address) = 0;

  // Posts a prefix of `batch`; returns how many were taken. Fewer than all: the link is full (poll, then post again),
  // or it has broken (broken() is then true; what was taken comes back by poll()).
  virtual size_t post(std::span<const WorkRequest> batch) = 0;
  // WRs posted and not yet handed back by Nic::poll().
  virtual size_t outstanding() const = 0;
  virtual bool broken() const = 0;

  // Begins the end of the connection, and does not wait for it. Nothing can be posted any more. All outstanding WRs
  // come back by poll(), with Status::kFlushed unless they ended otherwise. Idempotent.
  virtual void close() = 0;
  // After close(): every WR has come back by poll(), and none is in the provider's hands.
  virtual bool closed() const = 0;
  // After close(): the NIC has let go of this half, so that what NicInfo::closing_fences promises holds, and
  // immediates_landed() is final. Comes soon and by itself. Once true it stays true. A driver call.
  virtual bool shut() const { return true; }
  // After close(), where not NicInfo::closing_fences: no byte of the remote half can land here any more all the same,
  // as the writer was seen not to be writing. Once true it stays true. A driver call.
  virtual bool fenced() const { return false; }

  // Where NicInfo::resumable. How many writes with immediate of the remote half have landed; final once shut(), when
  // all of them have been handed out or will be by poll().
  virtual uint64_t immediates_landed() const { return 0; }
  // How many of our own writes with immediate poll() has handed back with kOk.
  virtual uint64_t immediates_completed() const { return 0; }
  // A work request of either side has landed here, is back, or was refused: the connection itself is sound, whatever
  // has broken it.
  virtual bool worked() const { return immediates_landed() + immediates_completed() > 0; }
};

class Nic {
 public:
  virtual ~Nic() = default;

  virtual const NicInfo& info() const = 0;

  // Of the control endpoint: opaque, at most 256 bytes.
  virtual std::vector<std::byte> address() const = 0;
  // Turns a peer's control address into a handle for send(). Throws NicError on a malformed address.
  virtual uint64_t resolve(std::span<const std::byte> address) = 0;
  virtual void forget(uint64_t peer) = 0;
  // Sends a copy of `message` (at most max_message_bytes). False: no room now, poll and try again. The end comes as a
  // kSend completion; a message to a dead peer may end late or never (it holds only the NIC's own memory).
  virtual bool send(uint64_t peer, std::span<const std::byte> message, void* context) = 0;

  // Empty if this NIC takes such memory, else why it does not, in words for the user. Cheap, and changes nothing.
  virtual std::string refuses(const MemorySpec& memory) const;
  virtual Registration register_memory(const MemorySpec& memory) = 0;
  virtual void deregister(Registration& registration) = 0;
  // Makes a peer's registration, on a NIC of this kind, usable for our WRs. May take time: maps memory, opens handles.
  // Throws NicError on a malformed or stale blob. By default the blob is a plain one, and nothing is to be released.
  virtual RemoteMemory import_memory(std::span<const std::byte> blob);
  virtual void release_memory(RemoteMemory& memory);

  virtual std::unique_ptr<Link> create_link() = 0;

  // Makes progress and fills `out`; returns how many. Message data stays valid until the next call.
  virtual size_t poll(std::span<Completion> out) = 0;
  // The last poll() has moved bytes of a WR that has not ended: come back at once, whatever it has handed out.
  virtual bool working() const { return false; }

  // A descriptor that becomes readable when poll() has something to do after arm(); -1: there is none, and the caller
  // has to nap. arm() returns false if it is not safe to sleep (poll again first). disarm() after waking.
  virtual int wait_fd() const = 0;
  virtual bool arm() = 0;
  virtual void disarm() = 0;

  virtual std::string describe(int32_t provider_error) const = 0;
  // Empty while it works; else what has ended it for good. All its links are broken then. A driver call.
  virtual std::string failure() const { return {}; }
};

}  // namespace railwire
