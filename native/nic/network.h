// What this host says about its network: addresses and interfaces.
#pragma once

#include <string>

namespace railwire {

// The address that this host uses towards the rest of the world; the loopback one if there is no way there.
std::string default_host(bool ipv6 = false);
// Of the interface with this address, in Gbit/s; 0 if nobody knows.
double gbps_of_host(const std::string& host);
double gbps_of_interface(const std::string& name);

}  // namespace railwire
