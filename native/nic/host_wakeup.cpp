// The files behind host_wakeup.h, and the removal of those that dead processes left.
#include "nic/host_wakeup.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <vector>

#include "nic/nic.h"

namespace railwire {
namespace {

constexpr const char* kFolder = "/dev/shm/";
constexpr size_t kPageBytes = 4096;
constexpr std::string_view kPrefix = "railwire-", kPageSuffix = ".wake";

std::string page_path(std::string_view name) { return kFolder + HostWakeup::file_prefix(name) + ".wake"; }
std::string fifo_path(std::string_view name) { return kFolder + HostWakeup::file_prefix(name) + ".bell"; }

[[noreturn]] void fail(const std::string& what, const std::string& remedy) {
  throw NicError("shm: " + what + ": " + std::strerror(errno) + "; " + remedy);
}

std::string random_name() {
  unsigned char bytes[HostWakeup::kNameLength / 2];
  if (getrandom(bytes, sizeof bytes, 0) != static_cast<ssize_t>(sizeof bytes)) fail("getrandom", "check the kernel");
  std::string name;
  for (const unsigned char byte : bytes) {
    name += "0123456789abcdef"[byte >> 4];
    name += "0123456789abcdef"[byte & 15];
  }
  return name;
}

WakeupPage* map_page(int fd) {
  void* memory = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<WakeupPage*>(memory);
}

std::vector<std::string> folder_entries() {
  std::vector<std::string> entries;
  if (DIR* folder = opendir(kFolder)) {
    while (const dirent* entry = readdir(folder)) entries.emplace_back(entry->d_name);
    closedir(folder);
  }
  return entries;
}

// A process that is killed leaves its page, its FIFO and its endpoints' regions (half a megabyte each) behind.
void remove_leftovers() {
  const auto entries = folder_entries();
  for (const std::string& entry : entries) {
    if (entry.size() != kPrefix.size() + HostWakeup::kNameLength + kPageSuffix.size()) continue;
    if (!entry.starts_with(kPrefix) || !entry.ends_with(kPageSuffix)) continue;
    const std::string name = entry.substr(kPrefix.size(), HostWakeup::kNameLength);
    if (!HostWakeup::valid_name(name)) continue;
    const int fd = open(page_path(name).c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;
    struct stat status;
    if (fstat(fd, &status) == 0 && status.st_uid == geteuid() && flock(fd, LOCK_EX | LOCK_NB) == 0) {
      const std::string regions = HostWakeup::file_prefix(name) + "-";
      for (const std::string& other : entries) {
        if (other.starts_with(regions)) unlink((kFolder + other).c_str());
      }
      unlink(fifo_path(name).c_str());
      unlink(page_path(name).c_str());  // last: it is what marks the others as ours
    }
    close(fd);
  }
}

}  // namespace

bool HostWakeup::valid_name(std::string_view name) {
  return name.size() == kNameLength && name.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

HostWakeup::HostWakeup() : name_(random_name()) {
  const char* remedy = "the shm NIC needs a writable /dev/shm (in a container: --ipc=host or a larger --shm-size)";
  remove_leftovers();
  // Locked before it gets its name, or a process that starts now would take it for a leftover.
  const std::string unnamed = page_path(name_) + ".new";
  page_fd_ = open(unnamed.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (page_fd_ < 0) fail("cannot create " + unnamed, remedy);
  const bool ready = flock(page_fd_, LOCK_EX | LOCK_NB) == 0 && posix_fallocate(page_fd_, 0, kPageBytes) == 0 &&
                     (page_ = map_page(page_fd_)) != nullptr;
  if (ready) new (page_) WakeupPage{};
  if (!ready || rename(unnamed.c_str(), page_path(name_).c_str()) != 0) {
    const int why = errno;
    unlink(unnamed.c_str());
    if (page_) munmap(page_, kPageBytes);
    close(page_fd_);
    errno = why;
    fail("cannot prepare " + unnamed, remedy);
  }
  // Opened for both directions: it then never reports a hang-up, whoever comes and goes.
  const std::string fifo = fifo_path(name_);
  if (mkfifo(fifo.c_str(), 0600) != 0 || (fifo_ = open(fifo.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC)) < 0) {
    const int why = errno;
    unlink(fifo.c_str());
    unlink(page_path(name_).c_str());
    munmap(page_, kPageBytes);
    close(page_fd_);
    errno = why;
    fail("cannot create " + fifo, remedy);
  }
}

HostWakeup::~HostWakeup() {
  unlink(fifo_path(name_).c_str());
  unlink(page_path(name_).c_str());
  munmap(page_, kPageBytes);
  close(fifo_);
  close(page_fd_);
}

void HostWakeup::announce() {
  page_->asleep.store(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void HostWakeup::awake() {
  page_->asleep.store(0, std::memory_order_relaxed);
  char bytes[64];
  while (read(fifo_, bytes, sizeof bytes) == static_cast<ssize_t>(sizeof bytes)) {
  }
}

HostBell::HostBell(const std::string& name) {
  if (!HostWakeup::valid_name(name)) throw NicError("shm: malformed address: the wake-up name is not one");
  const char* remedy =
      "the peer has ended, or does not share this host's /dev/shm (in containers: --ipc=host), or belongs to another "
      "user; use tcp between them";
  const int page = open(page_path(name).c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (page < 0) fail("cannot open " + page_path(name), remedy);
  struct stat status;
  const bool usable = fstat(page, &status) == 0 && S_ISREG(status.st_mode) &&
                      status.st_size >= static_cast<off_t>(kPageBytes) && (page_ = map_page(page)) != nullptr;
  const int why = errno;
  close(page);
  errno = why;
  if (!usable) fail("unusable " + page_path(name), remedy);
  // For both directions, so that a dead sleeper costs us neither EPIPE nor SIGPIPE.
  fifo_ = open(fifo_path(name).c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
  if (fifo_ < 0 || fstat(fifo_, &status) != 0 || !S_ISFIFO(status.st_mode)) {
    const int reason = errno;
    if (fifo_ >= 0) close(fifo_);
    munmap(page_, kPageBytes);
    errno = reason;
    fail("unusable " + fifo_path(name), remedy);
  }
}

HostBell::~HostBell() {
  munmap(page_, kPageBytes);
  close(fifo_);
}

void HostBell::ring() {
  // Only one ringer writes; the sleeper sets the word again when it next goes to sleep.
  if (page_->asleep.exchange(0, std::memory_order_relaxed) == 0) return;
  const char byte = 1;
  // A full FIFO is readable already.
  [[maybe_unused]] const ssize_t ignored = write(fifo_, &byte, 1);
}

}  // namespace railwire
