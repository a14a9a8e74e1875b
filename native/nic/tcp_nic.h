// The tcp NIC: RDMA-like links over plain sockets, with no library behind it.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "nic/nic.h"

namespace railwire {

// "tcp" or "tcp://HOST[:PORT]". Options: docs/nics.md. Throws NicError.
std::unique_ptr<Nic> make_tcp_nic(const std::string& spec, const std::map<std::string, std::string>& options);

}  // namespace railwire
