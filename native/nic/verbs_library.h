// What can be asked of libibverbs and its devices without opening a NIC. Needs none of the library's headers, so that
// the binding can use it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace railwire {

struct VerbsGid {
  uint32_t index = 0;
  std::string gid;   // "fe80:0000:0000:0000:0000:00ff:fe00:0001"
  std::string type;  // "IB/RoCE v1", "RoCE v2"; empty where the kernel does not say
  std::string netdev;
};

struct VerbsPort {
  uint32_t number = 0;
  std::string state;       // "ACTIVE", "DOWN", ...
  std::string link_layer;  // "Ethernet", "InfiniBand"
  uint32_t mtu = 0;        // bytes, the active one
  double link_gbps = 0;
  uint32_t lid = 0;
  int chosen_gid = -1;  // index that a NIC would take; -1: none will do
  std::vector<VerbsGid> gids;
};

struct VerbsDevice {
  std::string name;
  bool hardware = false;  // on a bus; false: Soft-RoCE and the like
  bool dmabuf = false;    // the library can register dma-bufs; only trying tells whether the driver does, too
  std::string error;      // why it cannot be used; empty if it can
  std::vector<VerbsPort> ports;
};

struct VerbsProbe {
  std::string library;  // the file that was opened; empty if none
  std::string error;    // why there is none, or no device
  std::vector<VerbsDevice> devices;
};

// Opens the library if that has not happened yet. Never throws for what the machine lacks: the answer says it.
VerbsProbe verbs_probe();

}  // namespace railwire
