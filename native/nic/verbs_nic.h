// A NIC driven through libibverbs: ConnectX (RoCE v2, InfiniBand) and anything else with RC queue pairs.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "nic/nic.h"

namespace railwire {

// "verbs", "verbs:DEVICE" or "verbs:DEVICE:PORT"; options as in docs/nics.md.
// Throws NicError that names the device and the remedy.
std::unique_ptr<Nic> make_verbs_nic(const std::string& spec, const std::map<std::string, std::string>& options);

}  // namespace railwire
