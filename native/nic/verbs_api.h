// libibverbs' entry points and owners for its objects. For the files of the verbs NIC and their tests only.
//
// Only what the library really exports is here. Posting and polling are inline in its header and go through the tables
// in ibv_context, so they need no symbol: that is also how a test puts a provider of its own beneath the NIC.
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <memory>
#include <string>

#include "nic/nic.h"

// Macros of the header that would call symbols we look up ourselves.
#undef ibv_query_port
#undef ibv_reg_mr

namespace railwire {

struct VerbsApi {
  decltype(&ibv_get_device_list) get_device_list = nullptr;
  decltype(&ibv_free_device_list) free_device_list = nullptr;
  decltype(&ibv_get_device_name) get_device_name = nullptr;
  decltype(&ibv_open_device) open_device = nullptr;
  decltype(&ibv_close_device) close_device = nullptr;
  decltype(&ibv_query_device) query_device = nullptr;
  decltype(&ibv_query_port) query_port = nullptr;  // fills the older, shorter structure: see query_port() below
  decltype(&ibv_query_gid) query_gid = nullptr;
  decltype(&ibv_query_pkey) query_pkey = nullptr;
  decltype(&ibv_alloc_pd) alloc_pd = nullptr;
  decltype(&ibv_dealloc_pd) dealloc_pd = nullptr;
  decltype(&ibv_reg_mr) reg_mr = nullptr;
  decltype(&ibv_reg_mr_iova2) reg_mr_iova2 = nullptr;    // optional: since rdma-core 28, knows relaxed ordering
  decltype(&ibv_reg_dmabuf_mr) reg_dmabuf_mr = nullptr;  // optional: since rdma-core 34
  decltype(&ibv_dereg_mr) dereg_mr = nullptr;
  decltype(&ibv_create_comp_channel) create_comp_channel = nullptr;
  decltype(&ibv_destroy_comp_channel) destroy_comp_channel = nullptr;
  decltype(&ibv_create_cq) create_cq = nullptr;
  decltype(&ibv_resize_cq) resize_cq = nullptr;
  decltype(&ibv_destroy_cq) destroy_cq = nullptr;
  decltype(&ibv_get_cq_event) get_cq_event = nullptr;
  decltype(&ibv_ack_cq_events) ack_cq_events = nullptr;
  decltype(&ibv_create_srq) create_srq = nullptr;
  decltype(&ibv_destroy_srq) destroy_srq = nullptr;
  decltype(&ibv_create_qp) create_qp = nullptr;
  decltype(&ibv_modify_qp) modify_qp = nullptr;
  decltype(&ibv_destroy_qp) destroy_qp = nullptr;
  decltype(&ibv_create_ah) create_ah = nullptr;
  decltype(&ibv_destroy_ah) destroy_ah = nullptr;
  decltype(&ibv_get_async_event) get_async_event = nullptr;
  decltype(&ibv_ack_async_event) ack_async_event = nullptr;
  decltype(&ibv_wc_status_str) wc_status_str = nullptr;
  decltype(&ibv_fork_init) fork_init = nullptr;
  ibv_fork_status (*is_fork_initialized)() = nullptr;  // optional: since rdma-core 35
  std::string path;                                    // the file behind it
};

// Opens the library at the first call. Throws NicError with what was tried.
const VerbsApi& verbs_api();
// Before anything is registered: where the kernel does not copy pinned pages at a fork (before 5.12), a fork would move
// what a device writes to out of our sight. libibverbs then keeps registered pages out of the child.
void protect_from_forks(const VerbsApi& api);
// For tests: from now on this instead of a library. nullptr: the library again.
void set_verbs_api(const VerbsApi* api);

// ibv_query_port() as the header's macro does it: the structure has grown, and only the table knows the new one.
int verbs_query_port(ibv_context* context, uint8_t port, ibv_port_attr* attributes);

// "Cannot allocate memory (12)"
std::string errno_text(int error);
// "IBV_WC_RETRY_EXC_ERR (transport retry counter exceeded)"
std::string wc_status_text(int status);

template <auto Member>
struct VerbsDeleter {
  void operator()(auto* object) const { (verbs_api().*Member)(object); }
};
using ContextOwner = std::unique_ptr<ibv_context, VerbsDeleter<&VerbsApi::close_device>>;
using PdOwner = std::unique_ptr<ibv_pd, VerbsDeleter<&VerbsApi::dealloc_pd>>;
using MrOwner = std::unique_ptr<ibv_mr, VerbsDeleter<&VerbsApi::dereg_mr>>;
using ChannelOwner = std::unique_ptr<ibv_comp_channel, VerbsDeleter<&VerbsApi::destroy_comp_channel>>;
using CqOwner = std::unique_ptr<ibv_cq, VerbsDeleter<&VerbsApi::destroy_cq>>;
using SrqOwner = std::unique_ptr<ibv_srq, VerbsDeleter<&VerbsApi::destroy_srq>>;
using QpOwner = std::unique_ptr<ibv_qp, VerbsDeleter<&VerbsApi::destroy_qp>>;
using AhOwner = std::unique_ptr<ibv_ah, VerbsDeleter<&VerbsApi::destroy_ah>>;

}  // namespace railwire
