// Whether a process of this host still runs.
#pragma once

#include <cstdint>

namespace railwire {

// Clock ticks after boot at which the process began (field 22 of /proc/PID/stat): tells it from a later one with the
// same number. 0: there is no such process, or it has ended and is only not yet waited for.
uint64_t process_start_ticks(int64_t pid);

// A descriptor that becomes readable when the process ends; -1 where there is none to be had: an old kernel, or the
// limit of open files.
int open_process(int64_t pid);

}  // namespace railwire
