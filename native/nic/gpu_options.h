// What NICs that copy with the engine's GPU have to know of it.
#pragma once

#include <map>
#include <string>

namespace railwire {

struct GpuOptions {
  int ordinal = -1;         // "gpu", which TransferEngine names; -1: the engine has none
  int multiprocessors = 8;  // "copy_sms": at most so many run the copy kernel
};
// Throws NicError on a value that is no number, or out of range.
GpuOptions gpu_options(const std::map<std::string, std::string>& options);

}  // namespace railwire
