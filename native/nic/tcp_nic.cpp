// Opening the tcp NIC, its memory, and its epoll set.
#include "nic/tcp_nic.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "nic/network.h"
#include "nic/tcp_internal.h"

namespace railwire {
namespace {

constexpr size_t kFewestInboxes = 64;

size_t most_inboxes() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return kFewestInboxes;
  return std::clamp<size_t>(limit.rlim_cur / 3, kFewestInboxes, 16384);
}

uint64_t random_key() {
  const TcpToken token = random_tcp_token();
  uint64_t key;
  std::memcpy(&key, token.data(), sizeof key);
  return key;
}

}  // namespace

int64_t tcp_clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

std::unique_ptr<Nic> make_tcp_nic(const std::string& spec, const std::map<std::string, std::string>& options) {
  return std::make_unique<TcpNic>(parse_tcp_spec(spec, options), gpu_options(options));
}

TcpNic::TcpNic(TcpSpec spec, const GpuOptions& gpu)
    : spec_(std::move(spec)), has_gpu_(gpu.ordinal >= 0), gpu_(gpu), most_inboxes_(most_inboxes()) {
  epoll_ = TcpFd(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) throw NicError("NIC \"" + spec_.text + "\": cannot make an epoll descriptor: " + std::strerror(errno));
  TcpFd fd = listen_tcp(spec_);
  listener_ = std::make_unique<Listener>(*this, std::move(fd));
  bell_ = std::make_unique<Bell>(*this);
  info_.name = "tcp://" + spec_.end.text();
  info_.kind = "tcp";
  info_.provider = "railwire tcp " + std::to_string(kTcpVersion);
  info_.resumable = true;
  info_.max_write_bytes = kTcpLongestWrite;
  info_.takes_all_memory = has_gpu_;  // of an engine: of its own GPU, and the host's
  info_.link_depth = spec_.link_depth;
  info_.max_message_bytes = kTcpLongestMessage;
  info_.links_per_pair = spec_.streams;
  info_.link_gbps = gbps_of_host(spec_.end.host());
}

TcpNic::~TcpNic() {
  strangers_.clear();
  inboxes_.clear();  // which take themselves off the lists
}

// ---- memory
// ----------------------------------------------------------------------------------------------------------
std::string TcpNic::refuses(const MemorySpec& memory) const {
  const std::string why = gpu_.refuses(memory);
  return why.empty() ? "" : "tcp: " + why;
}

Registration TcpNic::register_memory(const MemorySpec& memory) {
  if (const std::string why = refuses(memory); !why.empty()) throw NicError(why);
  const bool gpu = memory.device >= 0;
  if (gpu) gpu_.open(mutex_);
  uint64_t key = memory.key_hint ? memory.key_hint : random_key();
  std::lock_guard lock(mutex_);
  const TcpRegions::Region region{static_cast<std::byte*>(memory.address), memory.length, memory.writable, gpu};
  while (!regions_.add(key, region)) key = random_key();
  // `local` of a GPU's is not null: the CPU must not touch it.
  return {.handle = reinterpret_cast<void*>(key), .local = gpu ? &gpu_ : nullptr, .blob = plain_blob(0, key)};
}

void TcpNic::deregister(Registration& registration) {
  const auto key = reinterpret_cast<uint64_t>(registration.handle);
  uint64_t last_copy = 0;
  {
    std::lock_guard lock(mutex_);
    regions_.remove(key);
    for (const auto& [token, link] : links_) {
      link->machine_.region_gone(key);  // in the middle of a write, too
      link->look_at_machine();
      if (link->broken()) wake_if_asleep();
    }
    if (registration.local) last_copy = gpu_.asked();
  }
  await_gpu(last_copy);
  registration = {};
}

// All copies up to this one have ended: nobody may touch memory that is no longer ours to touch. It takes milliseconds.
void TcpNic::await_gpu(uint64_t copy) {
  while (copy > 0) {
    {
      std::lock_guard lock(mutex_);
      gpu_.progress();
      if (gpu_.copied() >= copy || gpu_.failed()) return;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

std::string TcpNic::describe(int32_t provider_error) const {
  if (provider_error == 0) return "no error";
  if (provider_error == EREMOTEIO && gpu_.failed()) return gpu_.failure();
  if (provider_error == EFAULT) return "the memory is not there any more: unmapped, or of a file that was cut";
  if (provider_error == EPROTO) return "the peer sent what is no frame of Railwire's";
  return std::strerror(provider_error);
}

// ---- the epoll set -------------------------------------------------------------------------------------------------
uint64_t TcpNic::watch(TcpWatched* object, int fd) {
  if (free_watches_.empty()) {
    free_watches_.push_back(static_cast<uint32_t>(watches_.size()));
    watches_.emplace_back();
  }
  const uint32_t place = free_watches_.back();
  Watch& watch = watches_[place];
  epoll_event event{.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data = {}};
  event.data.u64 = uint64_t{place} << 32 | ++watch.generation;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    throw NicError(spec_.text + ": cannot watch a socket: " + std::strerror(errno));
  }
  free_watches_.pop_back();
  watch.object = object;
  return event.data.u64;
}

void TcpNic::unwatch(uint64_t id, int fd) {
  const auto place = static_cast<uint32_t>(id >> 32);
  watches_[place].object = nullptr;
  free_watches_.push_back(place);
  epoll_event event{};
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, &event);  // a copy of a fork()'s would keep it there
}

void TcpWatched::hold(TcpFd fd) {
  watch_ = nic_.watch(this, fd.get());
  fd_ = std::move(fd);
}

TcpFd TcpWatched::release() {
  if (fd_) nic_.unwatch(watch_, fd_.get());
  return std::move(fd_);
}

void TcpWatched::drop() { release(); }

TcpNic::Bell::Bell(TcpNic& nic) : TcpWatched(nic) {
  TcpFd fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!fd) throw NicError(nic.spec_.text + ": cannot make an eventfd: " + std::strerror(errno));
  hold(std::move(fd));
}

void TcpNic::Bell::event(uint32_t) {
  uint64_t count;
  [[maybe_unused]] const ssize_t got = ::read(fd_.get(), &count, sizeof count);
}

void TcpNic::Bell::ring() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t sent = ::write(fd_.get(), &one, sizeof one);
}

void TcpNic::wake_if_asleep() {
  if (!armed_) return;
  armed_ = false;  // one ring is enough
  bell_->ring();
}

}  // namespace railwire
