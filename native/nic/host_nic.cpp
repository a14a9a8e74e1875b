// Opening the shm NIC, its memory, and its name.
#include "nic/host_nic.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/host_internal.h"
#include "nic/text_file.h"

namespace railwire {
namespace {

constexpr size_t kArenaBytes = 256 << 10;

// FNV-1a of the boot id: told apart, not kept secret.
uint64_t kernel_id() {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : first_line("/proc/sys/kernel/random/boot_id"))
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace

int64_t host_clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

HostToken random_token() {
  HostToken token;
  if (getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) {
    throw NicError("shm: the kernel gives no random bytes");
  }
  return token;
}

std::string to_hex(const HostToken& token) {
  std::string text;
  for (const std::byte byte : token) {
    text += "0123456789abcdef"[std::to_integer<int>(byte) >> 4];
    text += "0123456789abcdef"[std::to_integer<int>(byte) & 15];
  }
  return text;
}

HostNic::HostNic(const std::map<std::string, std::string>& options)
    : name_(random_token()), gpu_(gpu_options(options)), arena_(kArenaBytes) {
  listener_ = HostSocket::listen("railwire-shm-" + to_hex(name_));
  epoll_.reset(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) throw NicError(std::string("shm: cannot make an epoll descriptor: ") + std::strerror(errno));
  listener_event_ = watch(listener_.fd());
  info_.name = "shm";
  info_.kind = "shm";
  info_.provider = "railwire shm " + std::to_string(kHostVersion);
  info_.same_host_only = true;
  info_.takes_all_memory = false;
  info_.completion_proves_landing = true;
  info_.closing_fences = false;  // the writer copies by itself
  info_.closing_quiets = true;
  info_.max_write_bytes = 1ull << 40;
  info_.link_depth = 1024;
  info_.max_message_bytes = kLongestMessage;
}

HostNic::~HostNic() = default;

HostAddress HostNic::own_address() const {
  HostAddress address;
  address.name = name_;
  address.probe = reinterpret_cast<uintptr_t>(name_.data());
  address.kernel = kernel_id();
  address.pid = static_cast<uint64_t>(getpid());
  return address;
}

uint64_t HostNic::watch(int fd) {
  epoll_event event{.events = EPOLLIN, .data = {.u64 = next_event_++}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    throw NicError(std::string("shm: cannot watch a descriptor: ") + std::strerror(errno));
  }
  return event.data.u64;
}

void HostNic::unwatch(int fd) {
  epoll_event event{};
  if (fd >= 0) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, &event);
}

// ---- memory ------------------------------------------------------------------------------------------------------
std::string HostNic::refuses(const MemorySpec& memory) const { return gpu_.refuses(memory); }

Registration HostNic::register_memory(const MemorySpec& memory) {
  if (const std::string why = refuses(memory); !why.empty()) throw NicError(why);
  const uint64_t base = reinterpret_cast<uintptr_t>(memory.address);
  if (memory.device >= 0) {
    const uint64_t flags = RegionSlot::kGpu | (memory.writable ? uint64_t{RegionSlot::kWritable} : 0);
    uint64_t key = 0;
    {
      std::lock_guard lock(mutex_);
      key = table_.add({base, memory.length, flags});
    }
    try {
      // `local` is not null: the CPU must not touch it.
      return {.handle = reinterpret_cast<void*>(key),
              .local = &gpu_,
              .takes_lists = true,
              .blob = gpu_.share(memory, base, key, name_)};
    } catch (...) {
      std::lock_guard lock(mutex_);
      table_.remove(key);
      throw;
    }
  }
  // A file that could shrink would take whoever writes there down with SIGBUS; it is reached by CMA then.
  std::string ignored;
  const bool shared = memory.shared_fd >= 0 && memory.writable &&
                      is_unshrinkable_memfd(memory.shared_fd, memory.shared_offset + memory.length, &ignored);
  const uint64_t flags =
      (memory.writable ? uint64_t{RegionSlot::kWritable} : 0) | (shared ? uint64_t{RegionSlot::kShared} : 0);
  std::lock_guard lock(mutex_);
  const uint64_t key = table_.add({base, memory.length, flags});
  if (shared) shared_[key] = {memory.shared_fd, memory.shared_offset, memory.length, {}};
  return {.handle = reinterpret_cast<void*>(key), .blob = plain_blob(base, key)};
}

void HostNic::deregister(Registration& registration) {
  const auto key = reinterpret_cast<uint64_t>(registration.handle);
  if (key == 0) return;
  gpu_.forget(key);
  // Whoever holds the lock may be landing a peer's short write.
  std::lock_guard lock(mutex_);
  table_.remove(key);
  if (const auto found = shared_.find(key); found != shared_.end()) {
    for (HostLink* link : found->second.holders) {
      send_packet(*link->peer_, {.type = HostFrame::kGoneMemory, .to = link->remote_token_, .rkey = found->first});
    }
    shared_.erase(found);
  }
  registration = {};
}

std::string HostNic::describe(int32_t provider_error) const {
  return provider_error == EREMOTEIO && gpu_.failed() ? gpu_.failure() : std::strerror(provider_error);
}

std::unique_ptr<Nic> make_host_nic(const std::map<std::string, std::string>& options) {
  return std::make_unique<HostNic>(options);
}

std::string why_no_host_nic() {
  try {
    HostNic nic({});
    nic.forget(nic.resolve(nic.address()));
    return "";
  } catch (const NicError& error) {
    return error.what();
  }
}

}  // namespace railwire
