// A verbs provider in memory, beneath the verbs NIC: what no device here can be made to do on purpose.
//
// It carries WRs out at once (or when told to), answers with fields that verbs leaves undefined on errors filled with
// rubbish, and counts what a real device punishes with a dead queue: more WRs, receives or completions than a queue
// was made for.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "nic/verbs_api.h"

namespace railwire::testing {

struct StubVerbs {
  struct Cq : ibv_cq {
    std::deque<ibv_wc> entries;
    size_t most = 0;
  };
  struct Srq : ibv_srq {
    std::deque<uint64_t> receives;
    size_t most = 0;
  };
  struct Qp : ibv_qp {
    struct Receive {
      uint64_t wr_id;
      ibv_sge sge;
    };
    struct Sent {
      ibv_send_wr wr;
      ibv_sge sge;
    };
    ibv_qp_cap cap{};
    uint32_t remote = 0;
    uint32_t qkey = 0;
    uint32_t first_packet_out = 0, first_packet_in = 0;
    std::deque<Receive> receives;
    std::deque<Sent> queue;                          // posted, not carried out
    size_t unretired = 0;                            // WRs whose room only a polled completion gives back
    size_t carried = 0;                              // since the last completion
    std::deque<std::pair<uint64_t, size_t>> retire;  // wr_id of a completion, and how many WRs' room it gives back
  };

  // ---- what a test sets and sees
  bool held = false;    // WRs wait for carry_out()
  bool carries = true;  // bytes and immediates are delivered
  int fail_in = -1;     // this many WRs from now ends with...
  ibv_wc_status fail_with = IBV_WC_REM_ACCESS_ERR;
  uint32_t lose_every = 0;  // datagrams
  size_t overruns = 0;
  size_t doorbells = 0, posted = 0, signalled = 0, inlined = 0, receive_doorbells = 0, receives_posted = 0;
  int max_cqe = 1 << 20;
  ibv_port_state state = IBV_PORT_ACTIVE;
  uint8_t link_layer = IBV_LINK_LAYER_ETHERNET;
  int reg_errno = 0;
  std::function<void()> on_create, on_error, on_destroy;  // in these calls for a queue pair
  // mlx5's limits and refusals
  bool dmabuf = true;                    // the kernel imports dma-bufs, and this driver
  bool peermem = false;                  // nvidia_peermem is loaded
  std::pair<const void*, size_t> gpu{};  // memory that no CPU reads
  uint32_t most_inline = 1020;           // more is no queue pair
  uint8_t port_flags = 0;                // IBV_QPF_GRH_REQUIRED
  uint16_t lid = 7;
  std::vector<ibv_gid> gids;    // empty: two link-local ones
  unsigned access = 0;          // of the last registration
  bool by_dmabuf = false;       // the last registration was
  ibv_ah_attr path{};           // of the last queue pair or address handle
  size_t inlined_from_gpu = 0;  // a crash
  VerbsApi api;

  bool of_gpu(const void* address) const {
    const auto at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(gpu.first);
    return gpu.first && at >= begin && at - begin < gpu.second;
  }
  // What mlx5 accepts as a path: RoCE has no other than by GID, and a virtual function's port asks for one, too.
  int take_path(const ibv_ah_attr& attributes) {
    path = attributes;
    const bool needs_header = link_layer == IBV_LINK_LAYER_ETHERNET || (port_flags & IBV_QPF_GRH_REQUIRED);
    if (needs_header && !attributes.is_global) return EINVAL;
    return link_layer != IBV_LINK_LAYER_ETHERNET && attributes.dlid == 0 ? EINVAL : 0;
  }

  static StubVerbs*& now() {
    static StubVerbs* the_stub = nullptr;
    return the_stub;
  }

  StubVerbs() {
    now() = this;
    context.ops.post_send = [](ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad) { return now()->send(qp, wr, bad); };
    context.ops.post_recv = [](ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr**) {
      for (; wr; wr = wr->next) static_cast<Qp*>(qp)->receives.push_back({wr->wr_id, *wr->sg_list});
      now()->overruns += static_cast<Qp*>(qp)->receives.size() > static_cast<Qp*>(qp)->cap.max_recv_wr;
      return 0;
    };
    context.ops.post_srq_recv = [](ibv_srq* srq, ibv_recv_wr* wr, ibv_recv_wr**) {
      auto* own = static_cast<Srq*>(srq);
      ++now()->receive_doorbells;
      for (; wr; wr = wr->next, ++now()->receives_posted) own->receives.push_back(wr->wr_id);
      now()->overruns += own->receives.size() > own->most;
      return 0;
    };
    context.ops.poll_cq = [](ibv_cq* cq, int most, ibv_wc* out) {
      return now()->poll(static_cast<Cq*>(cq), most, out);
    };
    context.ops.req_notify_cq = [](ibv_cq*, int) { return 0; };
    context.device = &device;
    context.async_fd = eventfd(0, EFD_CLOEXEC);
    std::strcpy(device.name, "stub0");
    fill_api();
    set_verbs_api(&api);
  }
  ~StubVerbs() {
    set_verbs_api(nullptr);
    now() = nullptr;
    ::close(context.async_fd);
  }

  // Carries out what is held, at most `count` WRs of every queue pair.
  void carry_out(size_t count = SIZE_MAX) {
    std::lock_guard lock(mutex);
    for (auto& [number, qp] : qps) {
      for (size_t i = 0; i < count && !qp->queue.empty(); ++i) carry_one(*qp);
    }
  }

  ibv_context context{};  // whose `ops` a benchmark may replace

 private:
  std::recursive_mutex mutex;  // queue pairs are made and destroyed beside the driver
  ibv_device device{};
  std::map<uint32_t, Qp*> qps;
  uint32_t next_number = 17;
  uint32_t datagrams = 0;

  void complete(ibv_cq* cq, ibv_wc wc, bool rubbish) {
    auto* own = static_cast<Cq*>(cq);
    if (rubbish) wc.opcode = static_cast<ibv_wc_opcode>(IBV_WC_RECV_RDMA_WITH_IMM);
    own->entries.push_back(wc);
    overruns += own->entries.size() > own->most;
  }

  int send(ibv_qp* base, ibv_send_wr* wr, ibv_send_wr** bad) {
    std::lock_guard lock(mutex);
    auto& qp = *static_cast<Qp*>(base);
    if (qp.qp_type == IBV_QPT_UD) return datagram(qp, wr);
    ++doorbells;
    for (; wr; wr = wr->next) {
      if (qp.unretired >= qp.cap.max_send_wr) {
        ++overruns;
        *bad = wr;
        return ENOMEM;
      }
      ++posted;
      ++qp.unretired;
      signalled += (wr->send_flags & IBV_SEND_SIGNALED) != 0;
      inlined += (wr->send_flags & IBV_SEND_INLINE) != 0;
      inlined_from_gpu +=
          (wr->send_flags & IBV_SEND_INLINE) && wr->num_sge && of_gpu(reinterpret_cast<const void*>(wr->sg_list->addr));
      qp.queue.push_back({*wr, wr->num_sge ? *wr->sg_list : ibv_sge{}});
      if (!held) carry_one(qp);
    }
    return 0;
  }

  void carry_one(Qp& qp) {
    const auto [wr, sge] = qp.queue.front();
    qp.queue.pop_front();
    ibv_wc wc{};
    wc.wr_id = wr.wr_id;
    wc.qp_num = qp.qp_num;
    if (qp.state == IBV_QPS_ERR) {
      wc.status = IBV_WC_WR_FLUSH_ERR;
    } else if (fail_in >= 0 && fail_in-- == 0) {
      wc.status = fail_with;
      qp.state = IBV_QPS_ERR;
    } else {
      wc.status = IBV_WC_SUCCESS;
      if (carries) deliver(qp, wr, sge);
    }
    ++qp.carried;
    if (wc.status != IBV_WC_SUCCESS || (wr.send_flags & IBV_SEND_SIGNALED)) {
      qp.retire.push_back({wr.wr_id, std::exchange(qp.carried, 0)});
      complete(qp.send_cq, wc, true);
    }
  }

  void deliver(Qp& from, const ibv_send_wr& wr, const ibv_sge& sge) {
    const auto found = qps.find(from.remote);
    if (found == qps.end()) return;
    auto* far = reinterpret_cast<void*>(wr.wr.rdma.remote_addr);
    auto* near = reinterpret_cast<void*>(sge.addr);
    if (wr.num_sge) {
      wr.opcode == IBV_WR_RDMA_READ ? std::memcpy(near, far, sge.length) : std::memcpy(far, near, sge.length);
    }
    if (wr.opcode != IBV_WR_RDMA_WRITE_WITH_IMM) return;
    auto* srq = static_cast<Srq*>(found->second->srq);
    if (srq->receives.empty()) {  // a device would ask to wait
      ++overruns;
      return;
    }
    ibv_wc wc{};
    wc.wr_id = srq->receives.front();
    srq->receives.pop_front();
    wc.status = IBV_WC_SUCCESS;
    wc.qp_num = found->first;
    wc.wc_flags = IBV_WC_WITH_IMM;
    wc.imm_data = wr.imm_data;
    complete(found->second->recv_cq, wc, true);
  }

  int datagram(Qp& qp, ibv_send_wr* wr) {
    ibv_wc wc{};
    wc.wr_id = wr->wr_id;
    wc.status = IBV_WC_SUCCESS;
    wc.qp_num = qp.qp_num;
    complete(qp.send_cq, wc, true);
    const auto found = qps.find(wr->wr.ud.remote_qpn);
    if (lose_every && ++datagrams % lose_every == 0) return 0;
    if (found == qps.end() || found->second->qkey != wr->wr.ud.remote_qkey || found->second->receives.empty()) return 0;
    const auto receive = found->second->receives.front();
    found->second->receives.pop_front();
    std::memcpy(reinterpret_cast<std::byte*>(receive.sge.addr) + 40, reinterpret_cast<void*>(wr->sg_list->addr),
                wr->sg_list->length);
    wc.wr_id = receive.wr_id;
    wc.byte_len = 40 + wr->sg_list->length;
    wc.qp_num = found->first;
    complete(found->second->recv_cq, wc, true);
    return 0;
  }

  int poll(Cq* cq, int most, ibv_wc* out) {
    std::lock_guard lock(mutex);
    int n = 0;
    for (; n < most && !cq->entries.empty(); ++n) {
      out[n] = cq->entries.front();
      cq->entries.pop_front();
      const auto found = qps.find(out[n].qp_num);
      if (found == qps.end() || found->second->qp_type == IBV_QPT_UD) continue;
      Qp& qp = *found->second;
      if (qp.retire.empty() || qp.retire.front().first != out[n].wr_id) continue;
      // A polled completion gives back the room of its WR and of all before it.
      qp.unretired -= qp.retire.front().second;
      qp.retire.pop_front();
    }
    return n;
  }

  ibv_mr* registration(ibv_pd* pd, void* address, size_t length, unsigned flags, int error) {
    if (error) {
      errno = error;
      return nullptr;
    }
    static uint32_t key = 100;
    auto* mr = new ibv_mr{};
    mr->pd = pd;
    mr->addr = address;
    mr->length = length;
    mr->lkey = mr->rkey = key++;
    access = flags;
    by_dmabuf = false;
    return mr;
  }

  void fill_api();
};

inline void StubVerbs::fill_api() {
  api.path = "stub";
  api.get_device_list = [](int* count) {
    *count = 1;
    return new ibv_device*[2]{&now()->device, nullptr};
  };
  api.free_device_list = [](ibv_device** list) { delete[] list; };
  api.get_device_name = [](ibv_device* one) -> const char* { return one->name; };
  api.open_device = [](ibv_device*) { return &now()->context; };
  api.close_device = [](ibv_context*) { return 0; };
  api.query_device = [](ibv_context*, ibv_device_attr* out) {
    *out = {};
    out->phys_port_cnt = 1;
    out->max_qp_wr = 32768;
    out->max_srq_wr = 32767;
    out->max_cqe = now()->max_cqe;
    out->max_qp_rd_atom = out->max_qp_init_rd_atom = 16;
    return 0;
  };
  api.query_port = [](ibv_context*, uint8_t, _compat_ibv_port_attr* out) {
    auto* port = reinterpret_cast<ibv_port_attr*>(out);
    port->state = now()->state;
    port->active_mtu = port->max_mtu = IBV_MTU_1024;
    port->gid_tbl_len = 2;
    port->pkey_tbl_len = 1;
    port->max_msg_sz = 1u << 30;
    port->link_layer = now()->link_layer;
    port->flags = now()->port_flags;
    port->lid = now()->lid;
    return 0;
  };
  api.query_gid = [](ibv_context*, uint8_t, int index, ibv_gid* out) {
    *out = {};
    if (!now()->gids.empty()) {
      *out = now()->gids.at(static_cast<size_t>(index));
      return 0;
    }
    out->raw[0] = 0xfe;
    out->raw[1] = 0x80;
    out->raw[15] = static_cast<uint8_t>(1 + index);
    return 0;
  };
  api.query_pkey = [](ibv_context*, uint8_t, int, __be16*) { return 0; };
  api.alloc_pd = [](ibv_context* owner) {
    auto* pd = new ibv_pd{};
    pd->context = owner;
    return pd;
  };
  api.dealloc_pd = [](ibv_pd* pd) {
    delete pd;
    return 0;
  };
  api.reg_mr_iova2 = [](ibv_pd* pd, void* address, size_t length, uint64_t, unsigned access) -> ibv_mr* {
    // Without a peer-memory module the kernel finds no pages behind a GPU's address.
    const int error = now()->of_gpu(address) && !now()->peermem ? EFAULT : now()->reg_errno;
    return now()->registration(pd, address, length, access, error);
  };
  api.reg_mr = [](ibv_pd* pd, void* address, size_t length, int access) -> ibv_mr* {
    return now()->api.reg_mr_iova2(pd, address, length, 0, static_cast<unsigned>(access));
  };
  api.reg_dmabuf_mr = [](ibv_pd* pd, uint64_t, size_t length, uint64_t iova, int fd, int access) -> ibv_mr* {
    const int error = !now()->dmabuf ? EOPNOTSUPP : fd < 0 ? EBADF : 0;
    ibv_mr* mr = now()->registration(pd, reinterpret_cast<void*>(iova), length, static_cast<unsigned>(access), error);
    if (mr) now()->by_dmabuf = true;
    return mr;
  };
  api.fork_init = []() { return 0; };
  api.dereg_mr = [](ibv_mr* mr) {
    delete mr;
    return 0;
  };
  api.create_comp_channel = [](ibv_context* owner) {
    auto* channel = new ibv_comp_channel{};
    channel->context = owner;
    channel->fd = eventfd(0, EFD_CLOEXEC);
    return channel;
  };
  api.destroy_comp_channel = [](ibv_comp_channel* channel) {
    ::close(channel->fd);
    delete channel;
    return 0;
  };
  api.create_cq = [](ibv_context* owner, int entries, void*, ibv_comp_channel*, int) -> ibv_cq* {
    auto* cq = new Cq{};
    cq->context = owner;
    cq->most = static_cast<size_t>(entries);
    return cq;
  };
  api.resize_cq = [](ibv_cq* cq, int entries) {
    static_cast<Cq*>(cq)->most = static_cast<size_t>(entries);
    return 0;
  };
  api.destroy_cq = [](ibv_cq* cq) {
    delete static_cast<Cq*>(cq);
    return 0;
  };
  api.get_cq_event = [](ibv_comp_channel*, ibv_cq**, void**) { return -1; };
  api.ack_cq_events = [](ibv_cq*, unsigned) {};
  api.create_srq = [](ibv_pd* pd, ibv_srq_init_attr* attributes) -> ibv_srq* {
    auto* srq = new Srq{};
    srq->context = pd->context;
    srq->most = attributes->attr.max_wr;
    return srq;
  };
  api.destroy_srq = [](ibv_srq* srq) {
    delete static_cast<Srq*>(srq);
    return 0;
  };
  api.create_qp = [](ibv_pd* pd, ibv_qp_init_attr* attributes) -> ibv_qp* {
    if (now()->on_create) now()->on_create();
    std::lock_guard lock(now()->mutex);
    // A WR with room for inline data takes several of the 32,768 blocks of 64 bytes that a queue has.
    const uint64_t blocks = 1 + (attributes->cap.max_inline_data + 16 + 63) / 64;
    if (attributes->cap.max_inline_data > now()->most_inline || attributes->cap.max_send_wr * blocks > 32768) {
      errno = attributes->cap.max_inline_data > now()->most_inline ? EINVAL : ENOMEM;
      return nullptr;
    }
    auto* qp = new Qp{};
    qp->context = pd->context;
    qp->send_cq = attributes->send_cq;
    qp->recv_cq = attributes->recv_cq;
    qp->srq = attributes->srq;
    qp->qp_type = attributes->qp_type;
    qp->cap = attributes->cap;
    qp->qp_num = now()->next_number++;
    now()->qps[qp->qp_num] = qp;
    return qp;
  };
  api.modify_qp = [](ibv_qp* base, ibv_qp_attr* attributes, int mask) {
    if (attributes->qp_state == IBV_QPS_ERR && now()->on_error) now()->on_error();
    std::lock_guard lock(now()->mutex);
    auto* qp = static_cast<Qp*>(base);
    if (mask & IBV_QP_AV) {
      if (const int error = now()->take_path(attributes->ah_attr)) return error;
    }
    qp->state = attributes->qp_state;
    if (mask & IBV_QP_DEST_QPN) qp->remote = attributes->dest_qp_num;
    if (mask & IBV_QP_QKEY) qp->qkey = attributes->qkey;
    if (mask & IBV_QP_SQ_PSN) qp->first_packet_out = attributes->sq_psn;
    if (mask & IBV_QP_RQ_PSN) qp->first_packet_in = attributes->rq_psn;
    if (qp->state == IBV_QPS_ERR) {
      while (!qp->queue.empty()) now()->carry_one(*qp);
    }
    return 0;
  };
  api.destroy_qp = [](ibv_qp* base) {
    if (now()->on_destroy) now()->on_destroy();
    std::lock_guard lock(now()->mutex);
    now()->qps.erase(base->qp_num);
    delete static_cast<Qp*>(base);
    return 0;
  };
  api.create_ah = [](ibv_pd*, ibv_ah_attr* attributes) -> ibv_ah* {
    if (const int error = now()->take_path(*attributes)) {
      errno = error;
      return nullptr;
    }
    return new ibv_ah{};
  };
  api.destroy_ah = [](ibv_ah* route) {
    delete route;
    return 0;
  };
  api.get_async_event = [](ibv_context*, ibv_async_event*) { return -1; };
  api.ack_async_event = [](ibv_async_event*) {};
  api.wc_status_str = [](ibv_wc_status) -> const char* { return "stub"; };
}

}  // namespace railwire::testing
