// Which device, port and GID a verbs NIC uses, and with what parameters. For the files of the verbs NIC only.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "nic/verbs_api.h"
#include "nic/verbs_library.h"

namespace railwire {

// What the user asked for: "verbs:DEVICE[:PORT]" and the options (docs/nics.md).
struct VerbsSpec {
  std::string text;
  std::string device;  // empty: the first with an active port
  uint32_t port = 0;   // 0: the first active one
  std::optional<uint32_t> gid_index;
  uint32_t pkey_index = 0;
  uint32_t traffic_class = 0;
  uint32_t service_level = 0;
  uint32_t mtu = 0;            // bytes; 0: what both ports have
  uint32_t timeout = 16;       // 4.096 us * 2^16 = 0.27 s; with 7 retries a dead path is known after about 2 s
  uint32_t retry_count = 7;    // of lost packets
  uint32_t rnr_retry = 7;      // 7: for as long as the receiver has no room; the engine's stall limit ends it
  uint32_t link_depth = 0;     // WRs; 0: kHardwareDepth, or kSoftDepth on a device without hardware
  uint32_t qps = 0;            // links between two NICs; 0: kHardwareQps, or one without hardware
  uint32_t recv_depth = 4096;  // immediates that may arrive before we look
  uint32_t max_inline = 64;    // bytes that travel in the WR itself
  bool relaxed_ordering = true;

  std::string prefix() const { return "NIC " + text + ": "; }
};
// 400 Gb/s are 12 pages of 4 KiB a microsecond: a round trip of 20 us holds 256. Two queue pairs are two flows, for the
// ports of a bond and the paths of the network.
inline constexpr uint32_t kHardwareDepth = 256, kSoftDepth = 128, kHardwareQps = 2;
VerbsSpec parse_verbs_spec(const std::string& text, const std::map<std::string, std::string>& options);

// A device that has been opened, with the port that is used.
struct VerbsPortChoice {
  ContextOwner context;
  std::string device;
  bool hardware = false;
  ibv_device_attr device_attributes{};
  ibv_port_attr port_attributes{};
  uint8_t port = 1;
  bool ethernet = false;
  uint32_t gid_index = 0;
  ibv_gid gid{};
  uint32_t mtu = 0;  // bytes
  double link_gbps = 0;
};
// Throws NicError that names the device and the remedy: no such device, no active port, no fitting GID, ...
VerbsPortChoice open_verbs_port(const VerbsSpec& spec);

uint32_t mtu_bytes(ibv_mtu mtu);
ibv_mtu mtu_code(uint32_t bytes);  // bytes: 256, 512, ..., 4096

// Whether the device's driver, and the kernel (5.12), import dma-bufs. Asked with a descriptor that is none.
bool imports_dmabufs(ibv_pd* pd);

// Of an InfiniBand GID (10 bits fixed, 22 bits zero, FLID, subnet, EUI), as NCCL reads it: which subnet it is in, and
// the LID by which routers forward to it; 0: there is none.
uint16_t subnet_of(const ibv_gid& gid);
uint16_t flid_of(const ibv_gid& gid);

// Words for an errno of ibv_reg_mr() and its kin: too small a memlock limit is by far the most common cause.
std::string registration_problem(int error, uint64_t bytes);

}  // namespace railwire
