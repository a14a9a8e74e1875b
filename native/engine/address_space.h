// What this process may do with a range of its own memory, before a NIC or a peer finds out.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace railwire {

struct AddressRange {
  uint64_t address = 0;
  uint64_t length = 0;
};

// Why one of the ranges cannot be registered: not mapped, not readable, not writable (if that is wanted), or beyond the
// end of the file that is mapped there. Empty if nothing speaks against any. Looks at mappings, not at every page: of
// a file, its last page here is read. One call for many ranges is cheaper than many calls. `read_all`: as with kernels
// that answer no questions.
std::string refuse_ranges(std::span<const AddressRange> ranges, bool writable, bool read_all = false);

}  // namespace railwire
