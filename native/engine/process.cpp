// Asking the kernel about other processes.
#include "engine/process.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "nic/text_file.h"

namespace railwire {

uint64_t process_start_ticks(int64_t pid) {
  const std::string line = first_line("/proc/" + std::to_string(pid) + "/stat");
  size_t at = line.rfind(')');  // ends the name, which may hold anything
  if (at == std::string::npos || at + 2 >= line.size()) return 0;
  at += 2;  // the third field, the state
  if (line[at] == 'Z' || line[at] == 'X') return 0;
  for (int field = 3; field < 22; ++field) {
    at = line.find(' ', at);
    if (at == std::string::npos) return 0;
    ++at;
  }
  return std::strtoull(line.c_str() + at, nullptr, 10);
}

int open_process(int64_t pid) { return static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0)); }

}  // namespace railwire
