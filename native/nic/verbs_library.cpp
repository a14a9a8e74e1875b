// Opens libibverbs with dlopen: nothing in the core links to it.
#include "nic/verbs_library.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "nic/process_lock.h"
#include "nic/verbs_api.h"

namespace railwire {
namespace {

struct Loader {
  ProcessLock mutex;
  bool tried = false;
  std::string error;
  VerbsApi api;
  std::atomic<const VerbsApi*> open{nullptr};
};

// Never destroyed: NICs may outlive static destructors.
Loader& loader() {
  static Loader* the_loader = new Loader;
  return *the_loader;
}

void open_library(Loader& state) {
  const char* named = std::getenv("RAILWIRE_LIBIBVERBS");
  const std::string path = named && *named ? named : "libibverbs.so.1";
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* why = dlerror();
    state.error = "no libibverbs could be opened; install libibverbs1 and ibverbs-providers (Debian, Ubuntu) or " +
                  std::string("rdma-core (Fedora), or name the file in RAILWIRE_LIBIBVERBS. Tried: ") + path + " (" +
                  (why ? why : "dlopen failed") + ")";
    return;
  }
  std::string missing;
  const auto find = [&](const char* name, auto& function, bool optional = false) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
    if (!function && !optional && missing.empty()) missing = name;
  };
  VerbsApi& api = state.api;
  find("ibv_get_device_list", api.get_device_list);
  find("ibv_free_device_list", api.free_device_list);
  find("ibv_get_device_name", api.get_device_name);
  find("ibv_open_device", api.open_device);
  find("ibv_close_device", api.close_device);
  find("ibv_query_device", api.query_device);
  find("ibv_query_port", api.query_port);
  find("ibv_query_gid", api.query_gid);
  find("ibv_query_pkey", api.query_pkey);
  find("ibv_alloc_pd", api.alloc_pd);
  find("ibv_dealloc_pd", api.dealloc_pd);
  find("ibv_reg_mr", api.reg_mr);
  find("ibv_reg_mr_iova2", api.reg_mr_iova2, true);
  find("ibv_reg_dmabuf_mr", api.reg_dmabuf_mr, true);
  find("ibv_dereg_mr", api.dereg_mr);
  find("ibv_create_comp_channel", api.create_comp_channel);
  find("ibv_destroy_comp_channel", api.destroy_comp_channel);
  find("ibv_create_cq", api.create_cq);
  find("ibv_resize_cq", api.resize_cq);
  find("ibv_destroy_cq", api.destroy_cq);
  find("ibv_get_cq_event", api.get_cq_event);
  find("ibv_ack_cq_events", api.ack_cq_events);
  find("ibv_create_srq", api.create_srq);
  find("ibv_destroy_srq", api.destroy_srq);
  find("ibv_create_qp", api.create_qp);
  find("ibv_modify_qp", api.modify_qp);
  find("ibv_destroy_qp", api.destroy_qp);
  find("ibv_create_ah", api.create_ah);
  find("ibv_destroy_ah", api.destroy_ah);
  find("ibv_get_async_event", api.get_async_event);
  find("ibv_ack_async_event", api.ack_async_event);
  find("ibv_wc_status_str", api.wc_status_str);
  find("ibv_fork_init", api.fork_init);
  find("ibv_is_fork_initialized", api.is_fork_initialized, true);
  if (!missing.empty()) {
    state.error = path + " is no libibverbs that Railwire can use: it has no " + missing +
                  "; rdma-core 17 or newer is needed (RAILWIRE_LIBIBVERBS names another file)";
    dlclose(handle);
    return;
  }
  Dl_info where;
  api.path = dladdr(reinterpret_cast<void*>(api.open_device), &where) && where.dli_fname ? where.dli_fname : path;
  protect_from_forks(api);
  state.open.store(&api, std::memory_order_release);
}

const char* status_name(int status) {
  switch (status) {
#define RAILWIRE_STATUS(name) \
  case name:                  \
    return #name;
    RAILWIRE_STATUS(IBV_WC_SUCCESS)
    RAILWIRE_STATUS(IBV_WC_LOC_LEN_ERR)
    RAILWIRE_STATUS(IBV_WC_LOC_QP_OP_ERR)
    RAILWIRE_STATUS(IBV_WC_LOC_EEC_OP_ERR)
    RAILWIRE_STATUS(IBV_WC_LOC_PROT_ERR)
    RAILWIRE_STATUS(IBV_WC_WR_FLUSH_ERR)
    RAILWIRE_STATUS(IBV_WC_MW_BIND_ERR)
    RAILWIRE_STATUS(IBV_WC_BAD_RESP_ERR)
    RAILWIRE_STATUS(IBV_WC_LOC_ACCESS_ERR)
    RAILWIRE_STATUS(IBV_WC_REM_INV_REQ_ERR)
    RAILWIRE_STATUS(IBV_WC_REM_ACCESS_ERR)
    RAILWIRE_STATUS(IBV_WC_REM_OP_ERR)
    RAILWIRE_STATUS(IBV_WC_RETRY_EXC_ERR)
    RAILWIRE_STATUS(IBV_WC_RNR_RETRY_EXC_ERR)
    RAILWIRE_STATUS(IBV_WC_LOC_RDD_VIOL_ERR)
    RAILWIRE_STATUS(IBV_WC_REM_INV_RD_REQ_ERR)
    RAILWIRE_STATUS(IBV_WC_REM_ABORT_ERR)
    RAILWIRE_STATUS(IBV_WC_FATAL_ERR)
    RAILWIRE_STATUS(IBV_WC_RESP_TIMEOUT_ERR)
    RAILWIRE_STATUS(IBV_WC_GENERAL_ERR)
#undef RAILWIRE_STATUS
    default:
      return "unknown verbs status";
  }
}

}  // namespace

void protect_from_forks(const VerbsApi& api) {
  const bool unneeded = api.is_fork_initialized && api.is_fork_initialized() == IBV_FORK_UNNEEDED;
  if (!unneeded && api.fork_init) api.fork_init();
}

const VerbsApi& verbs_api() {
  Loader& state = loader();
  if (const VerbsApi* api = state.open.load(std::memory_order_acquire)) return *api;
  std::lock_guard lock(state.mutex);
  if (!state.tried) open_library(state);
  state.tried = true;
  if (const VerbsApi* api = state.open.load(std::memory_order_relaxed)) return *api;
  throw NicError(state.error);
}

void set_verbs_api(const VerbsApi* api) {
  Loader& state = loader();
  std::lock_guard lock(state.mutex);
  state.open.store(api, std::memory_order_release);
  state.tried = api != nullptr;
}

int verbs_query_port(ibv_context* context, uint8_t port, ibv_port_attr* attributes) {
  if (verbs_context* newer = verbs_get_ctx_op(context, query_port)) {
    return newer->query_port(context, port, attributes, sizeof *attributes);
  }
  std::memset(attributes, 0, sizeof *attributes);
  return verbs_api().query_port(context, port, reinterpret_cast<_compat_ibv_port_attr*>(attributes));
}

std::string errno_text(int error) {
  char buffer[128];
  // The GNU variant returns the text, which need not be in the buffer.
  return std::string(strerror_r(error, buffer, sizeof buffer)) + " (" + std::to_string(error) + ")";
}

std::string wc_status_text(int status) {
  const char* words = verbs_api().wc_status_str(static_cast<ibv_wc_status>(status));
  return std::string(status_name(status)) + " (" + (words ? words : "?") + ")";
}

}  // namespace railwire
