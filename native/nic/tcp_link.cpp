// A link: one connection, from its making to its end.
//
//   new --connect()--> dialling, or waiting for the other half to dial --> up --> broken --> closed
//
// Broken, it has no connection any more: nothing lands through it, and what was posted comes back. Only a refusal keeps
// the connection for a moment, so that the peer hears of it.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/tcp_internal.h"

namespace railwire {
namespace {

constexpr uint64_t kReadTurn = 1 << 20;  // bytes of one link, before the next one's turn
constexpr uint64_t kWriteTurn = 1 << 20;
constexpr uint64_t kPostTurn = 4 << 20;  // sent while posting; the socket is full before that, mostly
constexpr size_t kHeldBatch = 32;        // as many at once are followed by more, mostly: they go out together
constexpr uint64_t kTellAfter = 256;     // work requests that have landed, while more are coming
constexpr int64_t kLinger = 1'000'000'000;

// What of it lies on its first page: whether that is there, the kernel tells of one page alone.
iovec on_first_page(const iovec& bytes) {
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return {bytes.iov_base, std::min(bytes.iov_len, page - reinterpret_cast<uintptr_t>(bytes.iov_base) % page)};
}

}  // namespace

std::unique_ptr<Link> TcpNic::create_link() {
  auto link = std::make_unique<TcpLink>(*this);
  std::lock_guard lock(mutex_);
  links_.emplace(link->token(), link.get());
  return link;
}

TcpLink::TcpLink(TcpNic& nic)
    : TcpWatched(nic),
      machine_(nic.regions_, nic.info_.link_depth, nic.has_gpu_ ? &nic.gpu_ : nullptr),
      token_(random_tcp_token()) {}

TcpLink::~TcpLink() {
  close();
  nic_.await_gpu(machine_.last_copy());
  std::lock_guard lock(nic_.mutex_);
  drop();
  std::erase(nic_.copying_, this);
  nic_.links_.erase(token_);
  std::erase(nic_.working_, this);
  std::erase(nic_.ended_, this);
  std::erase(nic_.owing_, this);
}

std::vector<std::byte> TcpLink::address() const { return pack_tcp_address(nic_.spec_.end, &token_); }

void TcpLink::connect(std::span<const std::byte> remote_address) {
  const std::string& name = nic_.info_.name;
  TcpToken remote{};
  const TcpEnd end = unpack_tcp_address(remote_address, &remote, name);
  std::lock_guard lock(nic_.mutex_);
  if (closed_) throw NicError(name + ": the link is closed");
  if (connected_) throw NicError(name + ": the link is connected already");
  if (remote == token_) throw NicError(name + ": a link cannot be connected to itself");
  connected_ = true;
  remote_ = remote;
  up_by_ = tcp_clock_ns() + int64_t{nic_.spec_.timeout_ms} * 1'000'000;
  if (token_ > remote) {  // the other half dials
    if (parked_ && parked_from_ == remote_) adopt(std::move(parked_), parked_from_);
    parked_.reset();
    return;
  }
  TcpFd fd = dial_tcp(nic_.spec_, end);
  if (!fd) throw NicError(name + ": cannot connect to " + end.text() + ": " + std::strerror(errno));
  dialling_ = true;
  hello_left_ = sizeof(TcpHello);
  hold(std::move(fd));
}

// The peer's half has dialled. It knows our token, so it is the peer; perhaps we are yet to be told of it.
void TcpLink::adopt(TcpFd fd, const TcpToken& from) {
  if (closed_ || broken() || fd_ || (connected_ && from != remote_)) return;
  if (!connected_) {
    if (parked_) return;
    parked_ = std::move(fd);
    parked_from_ = from;
    return;
  }
  if (token_ < remote_) return;  // we dial
  hold(std::move(fd));
  came_up();
}

void TcpLink::came_up() {
  up_ = true;
  dialling_ = false;
  writable_ = readable_ = true;
  nic_.note_work(*this);
}

void TcpLink::event(uint32_t events) {
  if (dialling_) {
    if (const int error = socket_error(fd_.get())) return broke(Status::kUnreachable, error);
    if (!(events & EPOLLOUT)) return;
    came_up();
  }
  if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) readable_ = true;
  if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) ending_ = true;
  if (events & EPOLLOUT) writable_ = true;
  nic_.note_work(*this);
}

size_t TcpLink::post(std::span<const WorkRequest> batch) {
  std::lock_guard lock(nic_.mutex_);
  if (broken() || !connected_) return 0;
  const size_t taken = machine_.post(batch);
  if (up_ && writable_ && taken > 0) {
    // What is held goes out with poll(), which comes before anybody sleeps.
    const bool held = taken >= kHeldBatch && !batch[0].local_key && !machine_.fills_frame();
    if (!held) write(kPostTurn, false);
    nic_.note_gpu(*this);
    if (has_work() && fd_) {
      nic_.note_work(*this);
      nic_.wake_if_asleep();
    }
  }
  return taken;
}

void TcpLink::progress() {
  if (readable_) read(kReadTurn);
  if (fd_ && has_output()) write(kWriteTurn, false);
  nic_.note_gpu(*this);
}

void TcpLink::read(uint64_t budget) {
  iovec places[TcpMachine::kMostPlaces];
  bool by_page = false;
  while (budget > 0 && readable_ && fd_) {
    size_t count = machine_.room(places);
    if (count == 0) break;
    if (by_page) [[unlikely]] {
      places[0] = on_first_page(places[0]);
      count = 1;
    }
    size_t room = 0;
    for (size_t i = 0; i < count; ++i) room += places[i].iov_len;
    const ssize_t got = ::readv(fd_.get(), places, static_cast<int>(count));
    if (got <= 0) machine_.nothing_received();
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      readable_ = false;
      break;
    }
    if (got < 0 && errno == EFAULT) {
      if (by_page) {
        machine_.room_gone();
        look_at_machine();
      }
      by_page = !by_page;
      continue;
    }
    by_page = false;
    if (got <= 0) {
      const int error = got < 0 ? errno : error_ ? error_ : ECONNRESET;
      return broke(Status::kUnreachable, error);
    }
    if (static_cast<size_t>(got) < room && !ending_) readable_ = false;
    budget -= std::min<uint64_t>(budget, static_cast<uint64_t>(got));
    read_turn_ = nic_.turn_number_;
    machine_.received(static_cast<size_t>(got), nic_.immediates_);
    look_at_machine();
    if (machine_.untold() >= kTellAfter && up_ && writable_) write(kWriteTurn, true);
  }
  if (machine_.untold() > 0) nic_.note_owes(*this);
  nic_.note_gpu(*this);
}

void TcpLink::write(uint64_t budget, bool landed_too) {
  bool by_page = false;
  while (budget > 0 && fd_) {
    if (hello_left_ > 0) {
      const TcpHello hello{.kind = TcpHello::kLink, .to = remote_, .from = token_};
      const auto* bytes = reinterpret_cast<const std::byte*>(&hello) + sizeof hello - hello_left_;
      const ssize_t sent = ::send(fd_.get(), bytes, hello_left_, MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE);
      if (sent > 0) {
        hello_left_ -= static_cast<size_t>(sent);
        continue;
      }
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        writable_ = false;
        return;
      }
      return broke(Status::kUnreachable, errno);
    }
    std::span<iovec> parts = machine_.output(landed_too);
    look_at_machine();
    if (parts.empty()) return;
    iovec first;
    if (by_page) [[unlikely]] {
      first = on_first_page(parts[0]);
      parts = {&first, 1};
    }
    msghdr header{};
    header.msg_iov = parts.data();
    header.msg_iovlen = parts.size();
    const ssize_t sent = sendmsg(fd_.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      writable_ = false;
      return;
    }
    if (sent < 0 && errno == EFAULT) {
      if (by_page) return source_gone();
      by_page = true;
      continue;
    }
    by_page = false;
    if (sent < 0) {
      // What the peer had said before may tell why: it is read first.
      error_ = errno;
      writable_ = false;
      readable_ = ending_ = true;
      nic_.note_work(*this);
      return;
    }
    machine_.sent(static_cast<size_t>(sent));
    look_at_machine();
    budget -= std::min<uint64_t>(budget, static_cast<uint64_t>(sent));
  }
}

// The others go on over a new link; there, a peer that reads what is gone is refused.
void TcpLink::source_gone() {
  if (const auto rkey = machine_.output_gone()) {
    nic_.regions_.doubt(*rkey);
    return broke(Status::kUnreachable, EFAULT);
  }
  look_at_machine();
}

// It may have found what ends the link.
void TcpLink::look_at_machine() {
  if (machine_.has_ended()) nic_.note_ended(*this);
  if (machine_.state() == TcpMachine::State::kOpen || lingering_) return;
  broken_.store(true, std::memory_order_relaxed);
  if (machine_.state() == TcpMachine::State::kRefusing) {
    if (fd_ && writable_) nic_.note_work(*this);
    return;
  }
  if (!fd_) return;
  lingering_ = true;  // a refusal of ours may be on its way: to close now could take it back
  linger_until_ = tcp_clock_ns() + kLinger;
  shutdown(fd_.get(), SHUT_WR);
  readable_ = true;
  nic_.note_work(*this);
}

void TcpLink::broke(Status status, int error) {
  machine_.fail(status, error);
  broken_.store(true, std::memory_order_relaxed);
  lingering_ = true;
  up_ = dialling_ = readable_ = writable_ = false;
  drop();
  nic_.note_ended(*this);
}

void TcpLink::close() {
  std::lock_guard lock(nic_.mutex_);
  if (closed_) return;
  closed_ = true;
  parked_.reset();
  if (fd_ && up_ && machine_.state() == TcpMachine::State::kOpen) {
    if (writable_ && machine_.untold() > 0 && !machine_.has_output()) write(kWriteTurn, true);
    if (fd_ && machine_.outstanding() > 0) {
      const linger abort{.l_onoff = 1, .l_linger = 0};  // what the kernel still holds is not to land either
      setsockopt(fd_.get(), SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
    }
  }
  broke(Status::kFlushed, 0);
}

void TcpLink::look_at_clock(int64_t now) {
  if (lingering_ && fd_ && now > linger_until_) broke(Status::kFlushed, 0);
  if (connected_ && !up_ && !broken() && now > up_by_) broke(Status::kUnreachable, ETIMEDOUT);
}

}  // namespace railwire
