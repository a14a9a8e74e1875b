// What the fake library answers before anything is open: its version, its devices, and which hints it refuses.
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "fake_efa/fake_efa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake_efa {
namespace {

Rules read_rules() {
  Rules rules;
  const char* text = std::getenv("RAILWIRE_FAKE_EFA");
  std::istringstream words(text ? text : "");
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    const auto number = static_cast<size_t>(std::atoll(value.c_str()));
    if (name == "version") {
      const size_t dot = value.find('.');
      rules.version = FI_VERSION(static_cast<uint32_t>(std::atoi(value.c_str())),
                                 static_cast<uint32_t>(std::atoi(value.c_str() + dot + 1)));
    } else if (name == "devices") {
      rules.devices.clear();
      for (size_t i = 0; i < number; ++i) rules.devices.push_back("fake" + std::to_string(i) + "-rdm");
    } else if (name == "write") {
      rules.rdma_write = number;
    } else if (name == "unsolicited") {
      rules.unsolicited = number;
    } else if (name == "hmem") {
      rules.hmem = number;
    } else if (name == "p2p") {
      rules.p2p = number;
    } else if (name == "dmabuf") {
      rules.dmabuf = number;
    } else if (name == "silent") {
      rules.silent = number;
    } else if (name == "tx") {
      rules.tx = number;
    } else if (name == "rx") {
      rules.rx = number;
    } else if (name == "cq") {
      rules.cq = number;
    } else if (name == "message") {
      rules.message = number;
    } else if (name == "speed") {
      rules.speed = number;
    } else {
      std::abort();
    }
  }
  return rules;
}

// One allocation for all that hangs on an fi_info, as nobody but us frees it.
struct Info {
  fi_info info{};
  fi_tx_attr tx{};
  fi_rx_attr rx{};
  fi_ep_attr ep{};
  fi_domain_attr domain{};
  fi_fabric_attr fabric{};
  fid_nic nic{};
  fi_link_attr link{};
};

fi_info* blank() {
  auto* all = new Info;
  all->info.tx_attr = &all->tx;
  all->info.rx_attr = &all->rx;
  all->info.ep_attr = &all->ep;
  all->info.domain_attr = &all->domain;
  all->info.fabric_attr = &all->fabric;
  return &all->info;
}

bool differs(const char* wanted, const std::string& have) { return wanted && have != wanted; }

// One device on one fabric, shaped to the hints; null: it does not fit them.
fi_info* offer(const std::string& device, bool direct, const fi_info& hints) {
  const Rules& r = rules();
  const std::string fabric = direct ? "efa-direct" : "efa";
  if (differs(hints.fabric_attr->prov_name, "efa") || differs(hints.fabric_attr->name, fabric) ||
      differs(hints.domain_attr->name, device)) {
    return nullptr;
  }
  uint64_t caps = FI_MSG | FI_SEND | FI_RECV | FI_LOCAL_COMM | FI_REMOTE_COMM | FI_SOURCE;
  // "efa" emulates what the device cannot; "efa-direct" has RMA only where the device reads and writes.
  if (!direct || r.rdma_write) caps |= FI_RMA | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;
  // "efa" claims GPU memory wherever there is a CUDA driver (the interface of 1.18 and later): it would copy by CUDA
  // calls. "efa-direct" needs the device to reach it.
  if (r.hmem && (!direct || r.p2p)) caps |= FI_HMEM;
  if (hints.caps & ~caps) return nullptr;
  int required = FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | (direct ? FI_MR_LOCAL : 0) |
                 (hints.caps & FI_HMEM ? FI_MR_HMEM : 0);
  if ((hints.domain_attr->mr_mode & required) != required) return nullptr;
  if (direct && !(hints.mode & FI_CONTEXT2)) return nullptr;
  if (hints.tx_attr->size > r.tx || hints.rx_attr->size > r.rx) return nullptr;
  const bool takes_receives = since(2, 4) && direct && (hints.mode & FI_RX_CQ_DATA);
  // Since 2.4: without unsolicited receives in the device, RMA is offered only to those who know FI_RX_CQ_DATA.
  if (since(2, 4) && direct && !r.unsolicited && !takes_receives && (hints.caps & FI_RMA)) return nullptr;

  fi_info* info = blank();
  auto* all = reinterpret_cast<Info*>(info);
  info->caps = hints.caps | FI_SEND | FI_RECV;
  // Who asks for FI_REMOTE_COMM without FI_LOCAL_COMM wants no detour through shared memory.
  if (!(hints.caps & FI_REMOTE_COMM) || (hints.caps & FI_LOCAL_COMM)) info->caps |= FI_LOCAL_COMM;
  info->caps |= FI_REMOTE_COMM;
  info->mode = (direct ? FI_CONTEXT2 : 0) | (takes_receives ? FI_RX_CQ_DATA : 0);
  info->addr_format = FI_ADDR_EFA;
  all->tx.size = hints.tx_attr->size ? hints.tx_attr->size : r.tx;
  all->tx.op_flags = hints.tx_attr->op_flags;
  all->rx.size = hints.rx_attr->size ? hints.rx_attr->size : r.rx;
  all->ep.type = FI_EP_RDM;
  all->ep.protocol = FI_PROTO_EFA;
  // The larger of what messages and RMA take; FI_OPT_MAX_MSG_SIZE tells them apart.
  all->ep.max_msg_size = direct ? size_t{1} << 30 : SIZE_MAX;
  all->domain.name = strdup(device.c_str());
  all->domain.mr_mode = required | (hints.domain_attr->mr_mode & FI_MR_LOCAL);
  all->domain.mr_key_size = 4;
  all->domain.threading = hints.domain_attr->threading;
  all->fabric.prov_name = strdup("efa");
  all->fabric.name = strdup(fabric.c_str());
  all->fabric.prov_version = r.version;
  all->link.speed = r.speed * 1'000'000'000;
  all->nic.link_attr = &all->link;
  info->nic = &all->nic;
  return info;
}

int close_plain(fid* fid) {
  if (fid->fclass == FI_CLASS_DOMAIN) {
    delete reinterpret_cast<Domain*>(fid);
  } else {
    delete reinterpret_cast<fid_fabric*>(fid);
  }
  return 0;
}
fi_ops plain_ops{.size = sizeof(fi_ops), .close = close_plain};

int open_domain(fid_fabric*, fi_info* info, fid_domain** out, void*) {
  static fi_ops_domain ops{
      .size = sizeof(fi_ops_domain), .av_open = open_vector, .cq_open = open_queue, .endpoint = open_endpoint};
  static fi_ops_mr mr_ops{.size = sizeof(fi_ops_mr), .regattr = register_memory};
  auto* domain = new Domain;
  domain->fid.fid = {.fclass = FI_CLASS_DOMAIN, .context = nullptr, .ops = &plain_ops};
  domain->fid.ops = &ops;
  domain->fid.mr = &mr_ops;
  domain->direct = std::strcmp(info->fabric_attr->name, "efa-direct") == 0;
  domain->own_shm = !domain->direct && (info->caps & FI_LOCAL_COMM);
  *out = &domain->fid;
  return 0;
}

}  // namespace

const Rules& rules() {
  static const Rules the_rules = read_rules();
  return the_rules;
}

World& world() {
  static auto* the_world = new World;
  return *the_world;
}

}  // namespace fake_efa

using namespace fake_efa;

EXPORT uint32_t fi_version() { return rules().version; }

EXPORT const char* fi_strerror(int error) { return error == FI_EOVERRUN ? "Queue has been overrun" : strerror(error); }

EXPORT fi_info* fi_dupinfo(const fi_info* info) { return info ? nullptr : blank(); }

EXPORT void fi_freeinfo(fi_info* info) {
  while (info) {
    fi_info* next = info->next;
    std::free(info->domain_attr->name);
    std::free(info->fabric_attr->name);
    std::free(info->fabric_attr->prov_name);
    delete reinterpret_cast<Info*>(info);
    info = next;
  }
}

EXPORT int fi_getinfo(uint32_t, const char*, const char*, uint64_t, const fi_info* hints, fi_info** out) {
  fi_info* first = nullptr;
  fi_info** end = &first;
  for (const std::string& device : rules().devices) {
    for (const bool direct : {false, true}) {
      if (fi_info* info = offer(device, direct, *hints)) {
        *end = info;
        end = &info->next;
      }
    }
  }
  *out = first;
  return first ? 0 : -FI_ENODATA;
}

EXPORT int fi_fabric(fi_fabric_attr*, fid_fabric** out, void*) {
  static fi_ops_fabric ops{.size = sizeof(fi_ops_fabric), .domain = open_domain, .trywait = trywait};
  auto* fabric = new fid_fabric{};
  fabric->fid = {.fclass = FI_CLASS_FABRIC, .context = nullptr, .ops = &plain_ops};
  fabric->ops = &ops;
  *out = fabric;
  return 0;
}

// For the tests. How: 0 as usual, 1 its process stands still, 2 nothing reaches it and nobody says so.
EXPORT void fake_efa_treat(const void* name, int how) {
  std::lock_guard lock(world().mutex);
  const auto found = world().endpoints.find(Name(static_cast<const char*>(name), kNameBytes));
  if (found == world().endpoints.end()) std::abort();
  found->second->stopped = how == 1;
  found->second->silent = how == 2;
}
