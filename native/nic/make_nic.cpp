// Which implementation a NIC's name belongs to.
#include "nic/make_nic.h"

#include "nic/host_nic.h"
#include "nic/libfabric_nic.h"
#include "nic/simulated_nic.h"
#include "nic/tcp_nic.h"
#include "nic/verbs_nic.h"

namespace railwire {

std::unique_ptr<Nic> make_nic(const std::string& spec, const std::map<std::string, std::string>& all_options) {
  const std::string kind = spec.substr(0, spec.find(':'));
  auto options = all_options;
  // The engine's GPU, which only NICs that copy have to know.
  if (spec != "shm" && kind != "tcp") {
    options.erase("gpu");
    options.erase("copy_sms");
  }
  if (kind == "sim") return make_simulated_nic(spec);
  if (spec == "shm") return make_host_nic(options);
  if (kind == "tcp") return make_tcp_nic(spec, options);
  if (kind == "efa" || kind == "libfabric") return make_libfabric_nic(spec, options);
  if (kind == "verbs") return make_verbs_nic(spec, options);
  throw NicError("unknown NIC \"" + spec +
                 "\": use tcp://HOST[:PORT], tcp, shm, efa:DOMAIN, verbs:DEVICE[:PORT], libfabric:PROVIDER[:DOMAIN] or "
                 "sim://FABRIC/NAME "
                 "(`railwire doctor` lists what this machine has)");
}

}  // namespace railwire
