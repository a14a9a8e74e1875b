// Write protection of watched pages.
#include "engine/word_guard.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace railwire {
namespace {

constexpr size_t kPage = 4096;

uffdio_range range_of(void* page) { return {reinterpret_cast<uintptr_t>(page), kPage}; }

}  // namespace

WordGuard::WordGuard() {
  if (sysconf(_SC_PAGESIZE) != static_cast<long>(kPage)) return;
  const int fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  if (fd < 0) return;
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
  if (ioctl(fd, UFFDIO_API, &api) != 0) {
    ::close(fd);
    return;
  }
  fd_ = fd;
}

WordGuard::~WordGuard() {
  if (fd_ >= 0) ::close(fd_);
}

void WordGuard::add(void* page) {
  if (fd_ < 0) return;
  uffdio_register wanted{};
  wanted.range = range_of(page);
  wanted.mode = UFFDIO_REGISTER_MODE_WP;
  if (ioctl(fd_, UFFDIO_REGISTER, &wanted) == 0) pages_.push_back(page);
}

void WordGuard::remove(void* page) {
  if (std::erase(pages_, page) == 0) return;
  uffdio_range range = range_of(page);
  ioctl(fd_, UFFDIO_UNREGISTER, &range);
}

bool WordGuard::set(void* page, bool on) {
  uffdio_writeprotect change{};
  change.range = range_of(page);
  change.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
  return ioctl(fd_, UFFDIO_WRITEPROTECT, &change) == 0;
}

bool WordGuard::protect() {
  if (pages_.empty()) return false;
  for (void* page : pages_) {
    if (!set(page, true)) {
      release();
      return false;
    }
  }
  return true;
}

void WordGuard::release() {
  for (void* page : pages_) set(page, false);  // wakes whoever waits
  uffd_msg message;
  while (read(fd_, &message, sizeof message) == sizeof message) continue;
}

}  // namespace railwire
