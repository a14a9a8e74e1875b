// Copying between this process and another one of the same host with Cross Memory Attach (CMA): process_vm_writev and
// process_vm_readv take up to 1,024 pieces a call, and are allowed where ptrace would be.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace railwire {

// A list of pieces for one call. What is contiguous with the piece before is joined with it, on each side for itself:
// the kernel only asks that both sides have the same number of bytes.
class CmaList {
 public:
  static constexpr size_t kMost = 1024;  // UIO_MAXIOV

  void clear() { locals_ = remotes_ = 0, bytes_ = 0; }
  bool has_room() const { return locals_ < kMost && remotes_ < kMost; }
  void add(void* local, uint64_t remote, uint64_t length);
  uint64_t bytes() const { return bytes_; }
  // Bytes copied: a prefix of the list; or -errno if there were none.
  int64_t run(pid_t pid, bool read) const;

 private:
  static void extend(std::array<iovec, kMost>& list, size_t* count, void* address, uint64_t length);

  std::array<iovec, kMost> local_, remote_;
  size_t locals_ = 0, remotes_ = 0;
  uint64_t bytes_ = 0;
};

// Whether this process may copy from and to that one: tried by reading what must stand at `address`. Empty: yes;
// otherwise what keeps us from it, and the remedy.
std::string why_no_cma(pid_t pid, uint64_t address, std::span<const std::byte> expected);

// Whether memory of our own can be read. Slow; for finding out whose fault an EFAULT was.
bool readable(const void* address, uint64_t length);

// Long copies into mapped memory.
void copy_long(void* to, const void* from, size_t length);

}  // namespace railwire
