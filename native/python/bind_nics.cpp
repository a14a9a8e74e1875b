// What can be asked of NICs and their libraries without an engine (for `railwire doctor`).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "nic/host_nic.h"
#include "nic/libfabric_library.h"
#include "nic/verbs_library.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

nb::dict attempt_dict(const LibraryAttempt& attempt) {
  nb::dict dict;
  dict["path"] = attempt.path;
  dict["found"] = attempt.found;
  dict["error"] = attempt.error;
  dict["version"] = attempt.version;
  return dict;
}

nb::dict provider_dict(const ProviderFound& provider) {
  nb::dict dict;
  dict["name"] = provider.name;
  dict["domain"] = provider.domain;
  dict["fabric"] = provider.fabric;
  dict["version"] = provider.version;
  dict["kind"] = provider.kind;
  return dict;
}

nb::dict probe_dict() {
  LibfabricProbe probe;
  {
    nb::gil_scoped_release released;  // opening a library and asking its providers may take a second
    probe = libfabric_probe();
  }
  nb::list attempts;
  for (const LibraryAttempt& attempt : probe.attempts) attempts.append(attempt_dict(attempt));
  nb::list providers;
  for (const ProviderFound& provider : probe.providers) providers.append(provider_dict(provider));
  nb::dict dict;
  dict["attempts"] = attempts;
  dict["library"] = probe.library;
  dict["version"] = probe.version;
  dict["providers"] = providers;
  dict["error"] = probe.error;
  return dict;
}

nb::dict port_dict(const VerbsPort& port) {
  nb::list gids;
  for (const VerbsGid& gid : port.gids) {
    nb::dict one;
    one["index"] = gid.index;
    one["gid"] = gid.gid;
    one["type"] = gid.type;
    one["netdev"] = gid.netdev;
    gids.append(one);
  }
  nb::dict dict;
  dict["number"] = port.number;
  dict["state"] = port.state;
  dict["link_layer"] = port.link_layer;
  dict["mtu"] = port.mtu;
  dict["link_gbps"] = port.link_gbps;
  dict["lid"] = port.lid;
  dict["chosen_gid"] = port.chosen_gid;
  dict["gids"] = gids;
  return dict;
}

nb::dict verbs_probe_dict() {
  VerbsProbe probe;
  {
    nb::gil_scoped_release released;
    probe = verbs_probe();
  }
  nb::list devices;
  for (const VerbsDevice& device : probe.devices) {
    nb::list ports;
    for (const VerbsPort& port : device.ports) ports.append(port_dict(port));
    nb::dict dict;
    dict["name"] = device.name;
    dict["hardware"] = device.hardware;
    dict["dmabuf"] = device.dmabuf;
    dict["error"] = device.error;
    dict["ports"] = ports;
    devices.append(dict);
  }
  nb::dict dict;
  dict["library"] = probe.library;
  dict["error"] = probe.error;
  dict["devices"] = devices;
  return dict;
}

}  // namespace

void bind_nics(nb::module_& m) {
  m.def("set_libfabric_search", &set_libfabric_search, "paths"_a,
        "Where to look for libfabric, best first; has no effect once it has been opened.");
  m.def("libfabric_probe", &probe_dict,
        "Opens libfabric if that has not happened yet and says what was tried and found, as a dict: attempts (path, "
        "found, error, version), library, version, providers (name, domain, fabric, version, kind), error. Never "
        "raises for what the machine lacks.");
  m.def("shm_probe", &why_no_host_nic, nb::call_guard<nb::gil_scoped_release>(),
        "Opens an shm NIC and has it reach itself. Empty, or why there is none on this machine.");
  m.def(
      "verbs_probe", &verbs_probe_dict,
      "Opens libibverbs if that has not happened yet and says what it shows, as a dict: library, error, devices "
      "(name, hardware, dmabuf, error, ports (number, state, link_layer, mtu, link_gbps, lid, chosen_gid, gids (index, "
      "gid, type, netdev))). Never raises for what the machine lacks.");
}

}  // namespace railwire
