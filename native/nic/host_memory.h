// Shared memory between processes of one host: memfds, sealed by whoever makes them, checked by whoever maps them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace railwire {

// Owns a file descriptor.
class UniqueFd {
 public:
  explicit UniqueFd(int fd = -1) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~UniqueFd() { reset(); }
  void reset(int fd = -1);
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// A mapping of a memfd. Children of fork() do not get it.
class SharedMemory {
 public:
  SharedMemory() = default;
  // Makes a memfd of so many zero bytes that nobody can shrink or grow, and maps it. `read_only_for_others`: whoever
  // maps it later can only read (Linux 5.1 and newer; before, nothing keeps them from writing). Throws NicError.
  static SharedMemory create(const char* name, size_t bytes, bool read_only_for_others = false);
  // Maps another process's memfd: `bytes` of it from `offset` (a multiple of the page size). Empty if it is not one
  // that is at least so long and can never be shrunk: touching what was cut off would be SIGBUS. `why` says what is
  // wrong with it.
  static SharedMemory map(int fd, uint64_t offset, size_t bytes, bool writable, std::string* why);

  SharedMemory(SharedMemory&& other) noexcept
      : fd_(std::move(other.fd_)), data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory() { unmap(); }

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Of memory that create() made, until drop_fd(); -1 otherwise.
  int fd() const { return fd_.get(); }
  void drop_fd() { fd_.reset(); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void unmap();

  UniqueFd fd_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Whether a descriptor is a memfd that is at least `bytes` long and cannot be shrunk.
bool is_unshrinkable_memfd(int fd, uint64_t bytes, std::string* why);

}  // namespace railwire
