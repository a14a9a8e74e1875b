// Finding and opening libfabric at run time: nothing in the core links to it.
//
// This header needs none of libfabric's own, so that the binding can use it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace railwire {

// Where to look for libfabric, best first. Has no effect once it has been opened.
void set_libfabric_search(std::vector<std::string> paths);

// One place that was looked at.
struct LibraryAttempt {
  std::string path;
  bool found = false;   // this is the one that was opened
  std::string error;    // why it was not, empty if it was
  std::string version;  // "2.5", empty if it could not be asked
};

// One device that libfabric offers for what a NIC needs (reliable datagram endpoints with messages and RMA).
struct ProviderFound {
  std::string name;     // "tcp;ofi_rxm"
  std::string domain;   // "lo", "shm", "rdmap0s6-rdm"
  std::string fabric;   // "127.0.0.1/32"
  std::string version;  // of the provider: "205.10"
  std::string kind;     // NicInfo::kind of a NIC on it: "tcp", "shm", "efa", or the provider's name
};

// For `railwire doctor`.
struct LibfabricProbe {
  std::vector<LibraryAttempt> attempts;
  std::string library;  // the file that was opened; empty if none
  std::string version;
  std::vector<ProviderFound> providers;
  std::string error;  // why there are no libraries or providers; empty if all is well
};

// Opens the library if that has not happened yet. Never throws for what the machine lacks: the answer says it.
LibfabricProbe libfabric_probe();

}  // namespace railwire
