#include "nic/host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "nic/nic.h"

namespace railwire {
namespace {

#ifndef F_SEAL_FUTURE_WRITE
constexpr int F_SEAL_FUTURE_WRITE = 0x0010;
#endif

[[noreturn]] void fail(const std::string& what) {
  throw NicError("shm: " + what + ": " + std::strerror(errno) +
                 "; the shm NIC needs memfd_create (Linux 3.17) and free descriptors (ulimit -n)");
}

}  // namespace

void UniqueFd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  if (this != &other) {
    unmap();
    fd_ = std::move(other.fd_);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void SharedMemory::unmap() {
  if (data_) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

SharedMemory SharedMemory::create(const char* name, size_t bytes, bool read_only_for_others) {
  SharedMemory memory;
  memory.fd_.reset(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.fd_) fail("cannot create shared memory");
  if (ftruncate(memory.fd(), static_cast<off_t>(bytes)) != 0) fail("cannot size shared memory");
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd(), 0);
  if (mapped == MAP_FAILED) fail("cannot map shared memory");
  memory.data_ = static_cast<std::byte*>(mapped);
  memory.bytes_ = bytes;
  madvise(mapped, bytes, MADV_DONTFORK);
  if (read_only_for_others) fcntl(memory.fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE);  // a kernel without it: as said
  if (fcntl(memory.fd(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    fail("cannot seal shared memory");
  return memory;
}

bool is_unshrinkable_memfd(int fd, uint64_t bytes, std::string* why) {
  const int seals = fcntl(fd, F_GET_SEALS);
  struct stat status;
  if (seals < 0 || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    *why = "it is not a memfd";
  } else if (!(seals & F_SEAL_SHRINK)) {
    *why = "it is not sealed against shrinking";
  } else if (static_cast<uint64_t>(status.st_size) < bytes) {
    *why = "it has " + std::to_string(status.st_size) + " bytes instead of " + std::to_string(bytes);
  } else {
    return true;
  }
  return false;
}

SharedMemory SharedMemory::map(int fd, uint64_t offset, size_t bytes, bool writable, std::string* why) {
  SharedMemory memory;
  if (bytes == 0 || offset > UINT64_MAX - bytes || offset + bytes > INT64_MAX ||
      !is_unshrinkable_memfd(fd, offset + bytes, why)) {
    if (why->empty()) *why = "its size is impossible";
    return memory;
  }
  void* mapped =
      mmap(nullptr, bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (mapped == MAP_FAILED) {
    *why = std::string("mapping it failed: ") + std::strerror(errno);
    return memory;
  }
  madvise(mapped, bytes, MADV_DONTFORK);
  memory.data_ = static_cast<std::byte*>(mapped);
  memory.bytes_ = bytes;
  return memory;
}

}  // namespace railwire
