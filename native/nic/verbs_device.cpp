// Which device, port and GID, and what is wrong with them.
#include "nic/verbs_device.h"

#include <arpa/inet.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "nic/text_file.h"

namespace railwire {
namespace {

constexpr const char* kRoot = "/sys/class/infiniband/";

std::string port_folder(const std::string& device, uint32_t port) {
  return kRoot + device + "/ports/" + std::to_string(port);
}

const char* state_name(ibv_port_state state) {
  switch (state) {
    case IBV_PORT_DOWN:
      return "DOWN";
    case IBV_PORT_INIT:
      return "INIT";
    case IBV_PORT_ARMED:
      return "ARMED";
    case IBV_PORT_ACTIVE:
      return "ACTIVE";
    case IBV_PORT_ACTIVE_DEFER:
      return "ACTIVE_DEFER";
    default:
      return "unknown";
  }
}

std::string gid_text(const ibv_gid& gid) {
  char text[INET6_ADDRSTRLEN];
  return inet_ntop(AF_INET6, gid.raw, text, sizeof text) ? text : "?";
}

bool is_zero(const ibv_gid& gid) {
  return std::all_of(std::begin(gid.raw), std::end(gid.raw), [](uint8_t byte) { return byte == 0; });
}
bool is_ipv4(const ibv_gid& gid) {
  constexpr uint8_t kMapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::memcmp(gid.raw, kMapped, sizeof kMapped) == 0;
}
bool is_link_local(const ibv_gid& gid) { return gid.raw[0] == 0xfe && (gid.raw[1] & 0xc0) == 0x80; }

// RoCE: v2 before v1 (which no router forwards), and in each IPv4, then routable IPv6, then link-local. 0: unusable.
int gid_rank(const ibv_gid& gid, const std::string& type) {
  if (is_zero(gid)) return 0;
  const int address = is_ipv4(gid) ? 3 : is_link_local(gid) ? 1 : 2;
  return type == "RoCE v2" ? 10 + address : address;
}

double rate_gbps(const ibv_port_attr& port) {
  double lane = 0;
  switch (port.active_speed) {
    case 1:
      lane = 2.5;
      break;
    case 2:
      lane = 5;
      break;
    case 4:
    case 8:
      lane = 10;
      break;
    case 16:
      lane = 14;
      break;
    case 32:
      lane = 25;
      break;
    case 64:
      lane = 50;
      break;
    case 128:
      lane = 100;
      break;
    default:
      break;
  }
  const int lanes = port.active_width == 1   ? 1
                    : port.active_width == 2 ? 4
                    : port.active_width == 4 ? 8
                    : port.active_width == 8 ? 12
                                             : 2;
  return lane * lanes;
}

struct DeviceList {
  DeviceList() : list(verbs_api().get_device_list(&count)) {}
  ~DeviceList() {
    if (list) verbs_api().free_device_list(list);
  }
  DeviceList(const DeviceList&) = delete;
  DeviceList& operator=(const DeviceList&) = delete;
  int count = 0;
  ibv_device** list;
};

std::string names_of(const DeviceList& devices) {
  std::string names;
  for (int i = 0; devices.list && i < devices.count; ++i) {
    names += (i ? ", " : "") + std::string(verbs_api().get_device_name(devices.list[i]));
  }
  return names;
}

std::string netdev_of(const std::string& device, uint32_t port, uint32_t gid) {
  // A container may show a device in libibverbs and hide it in /sys: then it is empty.
  return first_line(port_folder(device, port) + "/gid_attrs/ndevs/" + std::to_string(gid));
}

std::string gid_type(const std::string& device, uint32_t port, uint32_t gid) {
  return first_line(port_folder(device, port) + "/gid_attrs/types/" + std::to_string(gid));
}

// Index of the best GID, or -1.
int choose_gid(ibv_context* context, const std::string& device, uint8_t port, const ibv_port_attr& attributes) {
  if (attributes.link_layer != IBV_LINK_LAYER_ETHERNET) {
    // The second is the one with a forwardable LID, where routers join subnets.
    ibv_gid gid{};
    const bool routed =
        attributes.gid_tbl_len > 1 && verbs_api().query_gid(context, port, 1, &gid) == 0 && flid_of(gid);
    return attributes.gid_tbl_len > 0 ? (routed ? 1 : 0) : -1;
  }
  int best = -1, best_rank = 0;
  for (int i = 0; i < attributes.gid_tbl_len; ++i) {
    ibv_gid gid{};
    if (verbs_api().query_gid(context, port, i, &gid) != 0) continue;
    const int rank = is_zero(gid) ? 0 : gid_rank(gid, gid_type(device, port, static_cast<uint32_t>(i)));
    if (rank > best_rank) best = i, best_rank = rank;
  }
  return best;
}

[[noreturn]] void bad_option(const VerbsSpec& spec, const std::string& name, const std::string& value,
                             const std::string& range) {
  throw NicError(spec.prefix() + "option " + name + " is \"" + value + "\"; it must be " + range);
}

uint32_t number(const VerbsSpec& spec, const std::string& name, const std::string& value, uint32_t least,
                uint32_t most) {
  uint32_t out = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), out);
  if (error != std::errc() || end != value.data() + value.size() || out < least || out > most) {
    bad_option(spec, name, value, std::to_string(least) + " to " + std::to_string(most));
  }
  return out;
}

std::string bring_up(const std::string& device, uint32_t port, bool ethernet) {
  if (!ethernet) return "is the subnet manager running, and the cable in?";
  const std::string interface = netdev_of(device, port, 0);
  return interface.empty() ? "bring its network interface up (`rdma link` names it)"
                           : "bring its network interface up: ip link set " + interface + " up";
}

}  // namespace

bool imports_dmabufs(ibv_pd* pd) {
  if (!verbs_api().reg_dmabuf_mr) return false;
  const MrOwner mr(verbs_api().reg_dmabuf_mr(pd, 0, 0, 0, -1, 0));
  return mr != nullptr || (errno != EOPNOTSUPP && errno != EPROTONOSUPPORT && errno != ENOSYS);
}

uint16_t subnet_of(const ibv_gid& gid) { return static_cast<uint16_t>(gid.raw[6] << 8 | gid.raw[7]); }
uint16_t flid_of(const ibv_gid& gid) { return static_cast<uint16_t>(gid.raw[4] << 8 | gid.raw[5]); }

uint32_t mtu_bytes(ibv_mtu mtu) {
  return mtu >= IBV_MTU_256 && mtu <= IBV_MTU_4096 ? 128u << static_cast<int>(mtu) : 256;
}

ibv_mtu mtu_code(uint32_t bytes) {
  for (int code = IBV_MTU_4096; code > IBV_MTU_256; --code) {
    if (mtu_bytes(static_cast<ibv_mtu>(code)) <= bytes) return static_cast<ibv_mtu>(code);
  }
  return IBV_MTU_256;
}

std::string registration_problem(int error, uint64_t bytes) {
  std::string text = "registering " + std::to_string(bytes) + " bytes: " + errno_text(error);
  if (error != ENOMEM && error != EPERM && error != EAGAIN) return text;
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    text += "; this process may lock " + std::to_string(limit.rlim_cur / 1024) +
            " KiB of memory, and RDMA locks all it registers: ulimit -l unlimited (docker run --ulimit memlock=-1)";
  }
  return text;
}

VerbsSpec parse_verbs_spec(const std::string& text, const std::map<std::string, std::string>& options) {
  VerbsSpec spec;
  spec.text = text;
  const std::string rest = text.size() > 6 ? text.substr(6) : "";
  const size_t colon = rest.find(':');
  spec.device = rest.substr(0, colon);
  if (colon != std::string::npos) spec.port = number(spec, "port", rest.substr(colon + 1), 1, 255);
  if ((text != "verbs" && !text.starts_with("verbs:")) || (spec.device.empty() && text.size() > 5)) {
    throw NicError("\"" + text + "\": write verbs, verbs:DEVICE or verbs:DEVICE:PORT (`railwire doctor` lists them)");
  }
  for (const auto& [name, value] : options) {
    const auto read = [&](const char* known, uint32_t& into, uint32_t least, uint32_t most) {
      if (name == known) into = number(spec, name, value, least, most);
    };
    if (colon == std::string::npos) read("port", spec.port, 1, 255);
    if (name == "gid_index") spec.gid_index = number(spec, name, value, 0, 1023);
    read("pkey_index", spec.pkey_index, 0, 65535);
    read("traffic_class", spec.traffic_class, 0, 255);
    read("service_level", spec.service_level, 0, 15);
    read("mtu", spec.mtu, 256, 4096);
    read("timeout", spec.timeout, 1, 31);  // 0 would wait for ever
    read("retry_count", spec.retry_count, 0, 7);
    read("rnr_retry", spec.rnr_retry, 0, 7);
    read("link_depth", spec.link_depth, 1, 65536);
    read("qps", spec.qps, 1, 16);
    read("recv_depth", spec.recv_depth, 64, 65536);
    read("max_inline", spec.max_inline, 0, 1024);
    if (name == "relaxed_ordering") {
      if (value != "on" && value != "off") bad_option(spec, name, value, "on or off");
      spec.relaxed_ordering = value == "on";
    }
  }
  if (spec.mtu && mtu_bytes(mtu_code(spec.mtu)) != spec.mtu) {
    bad_option(spec, "mtu", std::to_string(spec.mtu), "256, 512, 1024, 2048 or 4096");
  }
  return spec;
}

VerbsPortChoice open_verbs_port(const VerbsSpec& spec) {
  const VerbsApi& api = verbs_api();
  const DeviceList devices;
  if (!devices.list || devices.count == 0) {
    throw NicError(spec.prefix() + "this machine has no RDMA device that libibverbs (" + api.path +
                   ") knows; is the driver loaded (`rdma link`), is ibverbs-providers installed, and does the "
                   "container have /dev/infiniband?");
  }
  std::string problem;
  bool seen = false;
  for (int i = 0; i < devices.count; ++i) {
    const std::string name = api.get_device_name(devices.list[i]);
    if (!spec.device.empty() && spec.device != name) continue;
    seen = true;
    VerbsPortChoice choice;
    choice.device = name;
    choice.hardware = access((kRoot + name + "/device").c_str(), F_OK) == 0;
    choice.context.reset(api.open_device(devices.list[i]));
    if (!choice.context) {
      problem = "device " + name + " cannot be opened: " + errno_text(errno) +
                "; may this process read and write /dev/infiniband/uverbs*?";
      continue;
    }
    if (const int error = api.query_device(choice.context.get(), &choice.device_attributes)) {
      problem = "device " + name + " does not answer: " + errno_text(error);
      continue;
    }
    const uint8_t ports = choice.device_attributes.phys_port_cnt;
    if (spec.port > ports) {
      problem = "device " + name + " has " + std::to_string(ports) + " port(s), there is no port " +
                std::to_string(spec.port);
      continue;
    }
    for (uint8_t port = 1; port <= ports; ++port) {
      if (spec.port && spec.port != port) continue;
      ibv_port_attr attributes{};
      if (verbs_query_port(choice.context.get(), port, &attributes) != 0) continue;
      const bool ethernet = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
      if (attributes.state != IBV_PORT_ACTIVE && attributes.state != IBV_PORT_ACTIVE_DEFER) {
        problem = "port " + std::to_string(port) + " of " + name + " is " + state_name(attributes.state) + "; " +
                  bring_up(name, port, ethernet);
        continue;
      }
      choice.port = port;
      choice.port_attributes = attributes;
      choice.ethernet = ethernet;
      choice.link_gbps = rate_gbps(attributes);
      choice.mtu = mtu_bytes(attributes.active_mtu);
      if (spec.mtu > choice.mtu) {
        throw NicError(spec.prefix() + "option mtu is " + std::to_string(spec.mtu) + ", but port " +
                       std::to_string(port) + " of " + name + " carries " + std::to_string(choice.mtu) +
                       ": raise the MTU of its interface, or leave the option out");
      }
      if (spec.mtu) choice.mtu = spec.mtu;
      const int gid =
          spec.gid_index ? static_cast<int>(*spec.gid_index) : choose_gid(choice.context.get(), name, port, attributes);
      if (gid < 0) {
        throw NicError(spec.prefix() + "port " + std::to_string(port) + " of " + name +
                       " has no GID: give its network interface an IP address (" + netdev_of(name, port, 0) + ")");
      }
      const int error = gid < attributes.gid_tbl_len ? api.query_gid(choice.context.get(), port, gid, &choice.gid) : -1;
      if (error != 0 || is_zero(choice.gid)) {
        throw NicError(spec.prefix() + "gid_index " + std::to_string(gid) + " of " + name + " port " +
                       std::to_string(port) + " is " +
                       (error ? "outside its table of " + std::to_string(attributes.gid_tbl_len) : "empty") +
                       "; leave the option out, or take one that `railwire doctor` lists");
      }
      choice.gid_index = static_cast<uint32_t>(gid);
      if (spec.pkey_index >= attributes.pkey_tbl_len) {
        throw NicError(spec.prefix() + "pkey_index " + std::to_string(spec.pkey_index) + " is outside the table of " +
                       std::to_string(attributes.pkey_tbl_len) + " of " + name);
      }
      return choice;
    }
  }
  if (!seen) {
    throw NicError(spec.prefix() + "there is no RDMA device " + spec.device + "; this machine has " +
                   names_of(devices) + " (`railwire doctor` describes them)");
  }
  throw NicError(spec.prefix() + problem);
}

VerbsProbe verbs_probe() {
  VerbsProbe probe;
  try {
    const VerbsApi& api = verbs_api();
    probe.library = api.path;
    const DeviceList devices;
    for (int i = 0; devices.list && i < devices.count; ++i) {
      VerbsDevice found;
      found.name = api.get_device_name(devices.list[i]);
      found.hardware = access((kRoot + found.name + "/device").c_str(), F_OK) == 0;
      const ContextOwner context(api.open_device(devices.list[i]));
      const PdOwner pd(context ? api.alloc_pd(context.get()) : nullptr);
      found.dmabuf = pd && imports_dmabufs(pd.get());
      ibv_device_attr attributes{};
      if (!context) {
        found.error = "cannot be opened: " + errno_text(errno) + "; /dev/infiniband/uverbs* needs read and write";
      } else if (const int error = api.query_device(context.get(), &attributes)) {
        found.error = "does not answer: " + errno_text(error);
      } else {
        for (uint8_t number = 1; number <= attributes.phys_port_cnt; ++number) {
          ibv_port_attr port{};
          if (verbs_query_port(context.get(), number, &port) != 0) continue;
          VerbsPort out;
          out.number = number;
          out.state = state_name(port.state);
          out.link_layer = port.link_layer == IBV_LINK_LAYER_ETHERNET ? "Ethernet" : "InfiniBand";
          out.mtu = mtu_bytes(port.active_mtu);
          out.link_gbps = rate_gbps(port);
          out.lid = port.lid;
          out.chosen_gid = choose_gid(context.get(), found.name, number, port);
          for (int gid = 0; gid < port.gid_tbl_len; ++gid) {
            ibv_gid value{};
            if (api.query_gid(context.get(), number, gid, &value) != 0 || is_zero(value)) continue;
            const auto index = static_cast<uint32_t>(gid);
            out.gids.push_back(
                {index, gid_text(value), gid_type(found.name, number, index), netdev_of(found.name, number, index)});
          }
          found.ports.push_back(std::move(out));
        }
        try {
          VerbsSpec spec;
          spec.device = found.name;
          spec.text = "verbs:" + found.name;
          open_verbs_port(spec);
        } catch (const NicError& error) {
          found.error = error.what();
        }
      }
      probe.devices.push_back(std::move(found));
    }
    if (probe.devices.empty()) probe.error = "this machine has no RDMA device that libibverbs knows";
  } catch (const NicError& error) {
    probe.error = error.what();
  }
  return probe;
}

}  // namespace railwire
