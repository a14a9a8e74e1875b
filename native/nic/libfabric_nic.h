// NICs over libfabric: one implementation for every provider with reliable datagram endpoints (tcp, shm, efa,
// efa-direct, verbs;ofi_rxm).
#pragma once

#include <map>
#include <memory>
#include <string>

#include "nic/nic.h"

namespace railwire {

// `spec`: "tcp://HOST[:PORT]", "tcp" (the address of the default route), "shm", "efa:DOMAIN" or
// "libfabric:PROVIDER[:DOMAIN]". Options, all optional:
//   link_depth              WRs a link may have outstanding (default: what the provider takes, at most 1024)
//   unsolicited_write_recv  "on" (default) or "off": EFA's writes with immediate need no receive buffers
// Throws NicError if the name is wrong or the NIC cannot be opened.
std::unique_ptr<Nic> make_libfabric_nic(const std::string& spec, const std::map<std::string, std::string>& options);

}  // namespace railwire
