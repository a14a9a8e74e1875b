// From a NIC's name to the NIC.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "nic/nic.h"

namespace railwire {

// "tcp://HOST[:PORT]", "tcp", "shm", "efa:DOMAIN", "verbs:DEVICE[:PORT]", "libfabric:PROVIDER[:DOMAIN]",
// "sim://FABRIC/NAME". Throws NicError if the name is wrong or the NIC cannot be opened.
std::unique_ptr<Nic> make_nic(const std::string& spec, const std::map<std::string, std::string>& options);

}  // namespace railwire
