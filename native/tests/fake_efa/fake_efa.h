// A libfabric with one provider, "efa", all of whose endpoints live in this process, and which refuses what EFA
// refuses.
//
// The rules are those of prov/efa in libfabric 2.0 to 2.5, looked up tag by tag; each stands beside the code that keeps
// it. RAILWIRE_FAKE_EFA says which library and which device this is: "version=2.4 tx=1024 write=0 ...", see Rules.
// Nothing here is fast, and delivery is in random order, as SRD's is.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace fake_efa {

struct Rules {
  uint32_t version = FI_VERSION(2, 5);
  bool rdma_write = true;   // false: the first EFA (p4d)
  bool unsolicited = true;  // the device takes immediates without receives
  bool hmem = false;        // a CUDA driver was found
  bool p2p = true;          // the device reaches GPU memory
  bool dmabuf = true;       // the kernel imports dma-bufs
  size_t tx = 4096;         // depth of the send queue
  size_t rx = 8192;         // depth of the receive queue
  size_t cq = 32768;        // the longest completion queue
  size_t message = 8760;    // the device's MTU
  size_t speed = 100;       // Gb/s
  bool silent = false;      // an overrun is not told
  std::vector<std::string> devices{"fake0-rdm"};
};
const Rules& rules();
inline bool since(uint32_t major, uint32_t minor) { return FI_VERSION_GE(rules().version, FI_VERSION(major, minor)); }

inline constexpr size_t kNameBytes = 32;  // of an EFA endpoint's address
using Name = std::string;

struct Endpoint;

struct Memory {
  fid_mr fid{};
  uint64_t base = 0, length = 0, access = 0;
  bool device = false;
};

struct Queue {
  fid_cq fid{};
  size_t size = 0;
  bool overrun = false;
  int event = -1;  // an eventfd, where it can be waited for
  std::deque<fi_cq_data_entry> entries;
  std::deque<fi_cq_err_entry> errors;
  void push(const fi_cq_data_entry& entry);
  void fail(void* context, uint64_t flags, int error);

 private:
  bool room();
  void wake();
};

struct Vector {
  fid_av fid{};
  std::vector<Name> names;  // empty: removed
};

struct Posted {
  void* buffer;
  size_t length;
  void* context;
};

struct Endpoint {
  fid_ep fid{};
  Name name;
  bool direct = false;  // of the fabric "efa-direct"
  bool unsolicited = true;
  bool enabled = false;
  uint64_t mode = 0;
  size_t tx = 0, rx = 0, outstanding = 0;
  Queue* queue = nullptr;
  Vector* vector = nullptr;
  std::deque<Posted> receives;
  bool stopped = false;  // its process does not run: software does nothing, the device still does
  bool silent = false;   // nothing reaches it, and nobody says so
};

struct Operation {
  enum Kind : uint8_t { kSend, kWrite, kRead };
  Kind kind;
  Endpoint* from;
  Name to;
  void* context;
  void* local;
  uint64_t length, remote, key;
  bool immediate;
  uint64_t data;
  int refused = 0;  // receiver not ready
};

// All of the fabric. Everything below is called with the lock.
struct World {
  std::mutex mutex;
  std::map<Name, Endpoint*> endpoints;
  std::map<uint64_t, Memory*> keys;
  std::vector<Operation> flying;
  std::mt19937_64 random{20};
  uint64_t numbers = 1;

  void progress(const Queue* polled);
  // Of an endpoint that is closed: its queue pair is gone, and what it had posted with it.
  void forget(Endpoint* endpoint);

 private:
  bool deliver(Operation& operation, const Queue* polled);
};
World& world();

// endpoint.cpp
int open_endpoint(fid_domain* domain, fi_info* info, fid_ep** out, void* context);
int open_queue(fid_domain* domain, fi_cq_attr* attr, fid_cq** out, void* context);
int open_vector(fid_domain* domain, fi_av_attr* attr, fid_av** out, void* context);
int trywait(fid_fabric* fabric, fid** fids, int count);
int register_memory(fid* domain, const fi_mr_attr* attr, uint64_t flags, fid_mr** out);

struct Domain {
  fid_domain fid{};
  bool direct = false;
  bool own_shm = false;  // libfabric's detour through shared memory
};

}  // namespace fake_efa
