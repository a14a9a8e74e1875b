// The yardstick of `railwire bench --against raw`: the shortest loop over libfabric that does the same work.
//
// One endpoint, one completion queue, no engine: writes with CQ data, a window of them, and a count of what arrived.
// Built as a plain shared library with a C interface, loaded by bench/rivals/raw_runner.py with ctypes, so that it
// runs in the same kind of process, on the same buffers, as every other contender. The loops below never return to
// Python. libfabric itself is opened with dlopen, from the path that the runner names.
#include <dlfcn.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

// A set-up call or a work request that failed; `code` is libfabric's, negative.
class FabricError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The few functions of libfabric that are not inline in its headers.
struct Library {
  explicit Library(const char* path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw FabricError(dlerror());
    getinfo = symbol<decltype(&fi_getinfo)>(handle, "fi_getinfo");
    freeinfo = symbol<decltype(&fi_freeinfo)>(handle, "fi_freeinfo");
    dupinfo = symbol<decltype(&fi_dupinfo)>(handle, "fi_dupinfo");
    fabric = symbol<decltype(&fi_fabric)>(handle, "fi_fabric");
    strerror = symbol<decltype(&fi_strerror)>(handle, "fi_strerror");
    version = symbol<decltype(&fi_version)>(handle, "fi_version");
  }
  template <class F>
  static F symbol(void* handle, const char* name) {
    void* found = dlsym(handle, name);
    if (!found) throw FabricError(std::string("not in this libfabric: ") + name);
    return reinterpret_cast<F>(found);
  }
  void check(int64_t code, const char* what) const {
    if (code) throw FabricError(std::string(what) + ": " + strerror(static_cast<int>(-code)));
  }

  decltype(&fi_getinfo) getinfo;
  decltype(&fi_freeinfo) freeinfo;
  decltype(&fi_dupinfo) dupinfo;
  decltype(&fi_fabric) fabric;
  decltype(&fi_strerror) strerror;
  decltype(&fi_version) version;
};

struct CloseFid {
  void operator()(auto* fid) const { fi_close(&fid->fid); }
};
template <class T>
using Handle = std::unique_ptr<T, CloseFid>;

struct FreeInfo {
  decltype(&fi_freeinfo) free;
  void operator()(fi_info* info) const { free(info); }
};

class RawNic {
 public:
  RawNic(const char* library, const char* provider, const char* domain, const char* node)
      : lib_(library), info_(nullptr, FreeInfo{lib_.freeinfo}) {
    std::unique_ptr<fi_info, FreeInfo> hints(lib_.dupinfo(nullptr), FreeInfo{lib_.freeinfo});
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->fabric_attr->prov_name = strdup(provider);
    if (*domain) hints->domain_attr->name = strdup(domain);
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    fi_info* found = nullptr;
    lib_.check(
        lib_.getinfo(FI_VERSION(1, 17), *node ? node : nullptr, nullptr, *node ? FI_SOURCE : 0, hints.get(), &found),
        "fi_getinfo");
    info_.reset(found);
    depth_ = info_->tx_attr->size;
    description_ = "libfabric " + std::to_string(FI_MAJOR(lib_.version())) + "." +
                   std::to_string(FI_MINOR(lib_.version())) + " " + info_->fabric_attr->prov_name;

    fid_fabric* fabric;
    lib_.check(lib_.fabric(info_->fabric_attr, &fabric, nullptr), "fi_fabric");
    fabric_.reset(fabric);
    fid_domain* fabric_domain;
    lib_.check(fi_domain(fabric, info_.get(), &fabric_domain, nullptr), "fi_domain");
    domain_.reset(fabric_domain);
    fi_cq_attr cq_attr{};
    cq_attr.size = 16384;
    cq_attr.format = FI_CQ_FORMAT_DATA;
    cq_attr.wait_obj = FI_WAIT_NONE;
    fid_cq* cq;
    lib_.check(fi_cq_open(fabric_domain, &cq_attr, &cq, nullptr), "fi_cq_open");
    cq_.reset(cq);
    fi_av_attr av_attr{};
    av_attr.type = FI_AV_TABLE;
    fid_av* av;
    lib_.check(fi_av_open(fabric_domain, &av_attr, &av, nullptr), "fi_av_open");
    av_.reset(av);
    fid_ep* ep;
    lib_.check(fi_endpoint(fabric_domain, info_.get(), &ep, nullptr), "fi_endpoint");
    ep_.reset(ep);
    lib_.check(fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind cq");
    lib_.check(fi_ep_bind(ep, &av->fid, 0), "fi_ep_bind av");
    lib_.check(fi_enable(ep), "fi_enable");
  }

  const char* description() const { return description_.c_str(); }
  uint64_t depth() const { return depth_; }

  size_t address(void* out, size_t room) {
    lib_.check(fi_getname(&ep_->fid, out, &room), "fi_getname");
    return room;
  }

  void connect(const void* address) {
    if (fi_av_insert(av_.get(), address, 1, &peer_, 0, nullptr) != 1) throw FabricError("fi_av_insert failed");
  }

  // Everything later is given as offsets into the one region of either side.
  void register_memory(void* base, uint64_t length) {
    fid_mr* mr;
    lib_.check(fi_mr_reg(domain_.get(), base, length, FI_WRITE | FI_READ | FI_REMOTE_WRITE | FI_REMOTE_READ, 0, 17, 0,
                         &mr, nullptr),
               "fi_mr_reg");
    mr_.reset(mr);
    if (info_->domain_attr->mr_mode & FI_MR_ENDPOINT) {
      lib_.check(fi_mr_bind(mr, &ep_->fid, 0), "fi_mr_bind");
      lib_.check(fi_mr_enable(mr), "fi_mr_enable");
    }
    base_ = static_cast<char*>(base);
  }
  uint64_t remote_base() const {
    return info_->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? reinterpret_cast<uint64_t>(base_) : 0;
  }
  uint64_t key() const { return fi_mr_key(mr_.get()); }
  void set_remote(uint64_t base, uint64_t key) {
    remote_base_ = base;
    remote_key_ = key;
  }

  struct Batch {
    const uint64_t* local;  // offsets, used round and round
    const uint64_t* remote;
    uint64_t offsets;  // how many of them
    uint64_t pages;    // WRs of one round
    uint64_t rounds;
    uint64_t bytes;   // of one WR
    uint64_t window;  // WRs outstanding at most
    bool read;
    bool delivered;  // completions prove landing
  };

  // Posts all rounds. `laps`: for each round the time from its first post to the completion that closes it, ns.
  void post_all(const Batch& b, int64_t* laps) {
    const uint64_t total = b.pages * b.rounds;
    const uint64_t window = std::min<uint64_t>(b.window, contexts_.size());
    // Posting in small bursts looks at the queue less often: a tenth faster on shm than topping up one by one.
    const uint64_t burst = std::clamp<uint64_t>(window / 8, 1, 16);
    uint64_t posted = 0, slot = 0, in_round = 0, round = 0;
    sent_ = 0;
    uint64_t closing = b.pages, closed = 0;
    starts_.assign(b.rounds, 0);
    while (sent_ < total) {
      const bool room = posted - sent_ + std::min(burst, total - posted) <= window;
      while (room && posted < total && posted - sent_ < window) {
        if (in_round == 0) starts_[round] = now_ns();
        if (!post(b.local[slot], b.remote[slot], b.bytes, b.read, b.delivered, &contexts_[posted % window])) break;
        ++posted;
        if (++slot == b.offsets) slot = 0;
        if (++in_round == b.pages) in_round = 0, ++round;
      }
      poll();
      while (closed < b.rounds && sent_ >= closing) {
        laps[closed] = now_ns() - starts_[closed];
        ++closed;
        closing += b.pages;
      }
    }
  }

  // Until `arrivals` immediates have come in all since the last call.
  void wait(uint64_t arrivals, int64_t timeout_ns) {
    const int64_t deadline = now_ns() + timeout_ns;
    uint32_t spins = 0;
    while (arrived_ < arrivals) {
      poll();
      if (++spins % 65536 == 0 && now_ns() > deadline) {
        throw FabricError("timed out: " + std::to_string(arrived_) + " of " + std::to_string(arrivals) + " arrivals");
      }
    }
    arrived_ -= arrivals;
  }

  // Round trips of one write with immediate each way; `laps` in ns. The second side sends back what it has received, to
  // offset `remote` of the first.
  void pingpong(bool first, uint64_t remote, uint64_t rounds, uint64_t bytes, int64_t* laps, int64_t timeout_ns) {
    for (uint64_t i = 0; i < rounds; ++i) {
      const int64_t start = now_ns();
      if (!first) wait(1, timeout_ns);
      while (!post(0, remote, bytes, false, false, &contexts_[i % contexts_.size()])) poll();
      if (first) wait(1, timeout_ns);
      laps[i] = now_ns() - start;
    }
    sent_ = 0;
  }

  void post_one(uint64_t local, uint64_t remote, uint64_t bytes) {
    sent_ = 0;
    while (!post(local, remote, bytes, false, true, &contexts_[0])) poll();
    while (sent_ < 1) poll();
  }

 private:
  bool post(uint64_t local, uint64_t remote, uint64_t bytes, bool read, bool delivered, void* context) {
    char* at = base_ + local;
    void* desc = fi_mr_desc(mr_.get());
    const uint64_t to = remote_base_ + remote;
    ssize_t code;
    if (read) {
      code = fi_read(ep_.get(), at, bytes, desc, peer_, to, remote_key_, context);
    } else if (delivered) {
      iovec local_part{at, bytes};
      fi_rma_iov remote_part{to, bytes, remote_key_};
      fi_msg_rma message{&local_part, &desc, 1, peer_, &remote_part, 1, context, 1};
      code = fi_writemsg(ep_.get(), &message, FI_REMOTE_CQ_DATA | FI_COMPLETION | FI_DELIVERY_COMPLETE);
    } else {
      code = fi_writedata(ep_.get(), at, bytes, desc, 1, peer_, to, remote_key_, context);
    }
    if (code == -FI_EAGAIN) return false;
    lib_.check(code, "posting a work request");
    return true;
  }

  void poll() {
    fi_cq_data_entry entries[64];
    const ssize_t got = fi_cq_read(cq_.get(), entries, 64);
    if (got == -FI_EAGAIN) return;
    if (got < 0) {
      fi_cq_err_entry error{};
      fi_cq_readerr(cq_.get(), &error, 0);
      throw FabricError(std::string("error completion: ") + lib_.strerror(error.err));
    }
    for (ssize_t i = 0; i < got; ++i) {
      if (entries[i].flags & FI_REMOTE_CQ_DATA) {
        ++arrived_;
      } else {
        ++sent_;
      }
    }
  }

  Library lib_;
  std::unique_ptr<fi_info, FreeInfo> info_;
  Handle<fid_fabric> fabric_;
  Handle<fid_domain> domain_;
  Handle<fid_cq> cq_;
  Handle<fid_av> av_;
  Handle<fid_mr> mr_;
  Handle<fid_ep> ep_;  // first to go: it is bound to all of the above
  fi_addr_t peer_ = FI_ADDR_UNSPEC;
  char* base_ = nullptr;
  uint64_t remote_base_ = 0, remote_key_ = 0, depth_ = 0;
  uint64_t sent_ = 0, arrived_ = 0;
  std::vector<fi_context2> contexts_ = std::vector<fi_context2>(4096);
  std::vector<int64_t> starts_;
  std::string description_;
};

thread_local std::string last_error;

template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace

// All return 0, or -1 with the reason in raw_error().
extern "C" {

const char* raw_error() { return last_error.c_str(); }

int raw_open(const char* library, const char* provider, const char* domain, const char* node, void** out) {
  return guarded([&] { *out = new RawNic(library, provider, domain, node); });
}
void raw_close(void* nic) { delete static_cast<RawNic*>(nic); }
const char* raw_description(void* nic) { return static_cast<RawNic*>(nic)->description(); }
uint64_t raw_depth(void* nic) { return static_cast<RawNic*>(nic)->depth(); }

int raw_address(void* nic, void* out, uint64_t* size) {
  return guarded([&] { *size = static_cast<RawNic*>(nic)->address(out, *size); });
}
int raw_register(void* nic, void* base, uint64_t length, uint64_t* remote_base, uint64_t* key) {
  return guarded([&] {
    auto* raw = static_cast<RawNic*>(nic);
    raw->register_memory(base, length);
    *remote_base = raw->remote_base();
    *key = raw->key();
  });
}
int raw_connect(void* nic, const void* address, uint64_t remote_base, uint64_t key) {
  return guarded([&] {
    static_cast<RawNic*>(nic)->connect(address);
    static_cast<RawNic*>(nic)->set_remote(remote_base, key);
  });
}
int raw_post_all(void* nic, const uint64_t* local, const uint64_t* remote, uint64_t offsets, uint64_t pages,
                 uint64_t rounds, uint64_t bytes, uint64_t window, int read, int delivered, int64_t* laps_ns) {
  return guarded([&] {
    static_cast<RawNic*>(nic)->post_all(
        {local, remote, offsets, pages, rounds, bytes, window, read != 0, delivered != 0}, laps_ns);
  });
}
int raw_post_one(void* nic, uint64_t local, uint64_t remote, uint64_t bytes) {
  return guarded([&] { static_cast<RawNic*>(nic)->post_one(local, remote, bytes); });
}
int raw_wait(void* nic, uint64_t arrivals, int64_t timeout_ns) {
  return guarded([&] { static_cast<RawNic*>(nic)->wait(arrivals, timeout_ns); });
}
int raw_pingpong(void* nic, int first, uint64_t remote, uint64_t rounds, uint64_t bytes, int64_t* laps_ns,
                 int64_t timeout_ns) {
  return guarded([&] { static_cast<RawNic*>(nic)->pingpong(first != 0, remote, rounds, bytes, laps_ns, timeout_ns); });
}
}
