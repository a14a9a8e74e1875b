#include "nic/host_copy.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "nic/text_file.h"

namespace railwire {

void CmaList::extend(std::array<iovec, kMost>& list, size_t* count, void* address, uint64_t length) {
  if (*count > 0) {
    iovec& last = list[*count - 1];
    if (static_cast<char*>(last.iov_base) + last.iov_len == address) {
      last.iov_len += length;
      return;
    }
  }
  list[(*count)++] = {address, length};
}

void CmaList::add(void* local, uint64_t remote, uint64_t length) {
  extend(local_, &locals_, local, length);
  extend(remote_, &remotes_, reinterpret_cast<void*>(remote), length);
  bytes_ += length;
}

int64_t CmaList::run(pid_t pid, bool read) const {
  const auto call = read ? process_vm_readv : process_vm_writev;
  const ssize_t done = call(pid, local_.data(), locals_, remote_.data(), remotes_, 0);
  return done >= 0 ? done : -errno;
}

std::string why_no_cma(pid_t pid, uint64_t address, std::span<const std::byte> expected) {
  if (pid == 0) {
    return "its process is in another PID namespace (containers: share one, as with --pid=host or "
           "shareProcessNamespace)";
  }
  std::vector<std::byte> found(expected.size());
  CmaList list;
  list.add(found.data(), address, found.size());
  const int64_t got = list.run(pid, true);
  if (got == static_cast<int64_t>(found.size())) {
    if (std::equal(found.begin(), found.end(), expected.begin())) return "";
    return "process " + std::to_string(pid) + " is not the one that its address names";
  }
  if (got == -EPERM) {
    const std::string value = first_line("/proc/sys/kernel/yama/ptrace_scope");
    return "the kernel does not allow to copy to process " + std::to_string(pid) +
           " (CMA; yama.ptrace_scope=" + (value.empty() ? "none" : value) +
           "): sysctl kernel.yama.ptrace_scope=0, in containers --cap-add=SYS_PTRACE";
  }
  if (got == -ENOSYS) return "this kernel or sandbox has no process_vm_readv (CMA)";
  return "copying from process " + std::to_string(pid) +
         " failed: " + (got < 0 ? std::strerror(static_cast<int>(-got)) : "it stopped half way");
}

bool readable(const void* address, uint64_t length) {
  if (length == 0) return true;
  const auto first = reinterpret_cast<uintptr_t>(address);
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  for (uint64_t at = first; at < first + length; at = (at / page + 1) * page) {
    char byte;
    CmaList list;
    list.add(&byte, at, 1);
    if (list.run(getpid(), true) != 1) return false;
  }
  return true;
}

void copy_long(void* to, const void* from, size_t length) { std::memcpy(to, from, length); }

}  // namespace railwire
