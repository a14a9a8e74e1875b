// Who connects to us. Nothing is held for a stranger but its socket and the few bytes of its hello, for a few seconds.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "nic/tcp_internal.h"

namespace railwire {
namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr size_t kMostStrangers = 128;
constexpr int64_t kHelloWithin = 3 * kSecond;
constexpr int64_t kMessageWithin = 10 * kSecond;  // from its first byte to its last
constexpr int64_t kPause = kSecond / 10;          // when there are no descriptors left
constexpr int64_t kClockEvery = kSecond / 10;
constexpr int kAcceptAtOnce = 64;

}  // namespace

void TcpNic::Listener::event(uint32_t) {
  more = false;
  if (paused_until > tcp_clock_ns()) {
    more = true;
    return;
  }
  paused_until = 0;
  for (int i = 0; i < kAcceptAtOnce; ++i) {
    TcpFd fd(accept4(fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        paused_until = tcp_clock_ns() + kPause;
        more = true;
        return;
      }
      continue;  // that connection has ended already
    }
    set_up_tcp(fd.get(), nic_.spec_);
    if (nic_.strangers_.size() >= kMostStrangers) nic_.strangers_.pop_front();
    try {
      nic_.strangers_.push_back(std::make_unique<TcpStranger>(nic_, std::move(fd), tcp_clock_ns()));
    } catch (const NicError&) {  // it cannot be watched: it goes
    }
  }
  more = true;
}

TcpStranger::TcpStranger(TcpNic& nic, TcpFd fd, int64_t now) : TcpWatched(nic), since_(now) { hold(std::move(fd)); }

void TcpStranger::event(uint32_t) {
  auto* bytes = reinterpret_cast<std::byte*>(&hello_);
  while (got_ < sizeof hello_) {
    const ssize_t got = recv(fd_.get(), bytes + got_, sizeof hello_ - got_, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got <= 0) break;
    got_ += static_cast<size_t>(got);
  }
  TcpFd fd = release();
  const bool sound = got_ == sizeof hello_ && hello_.magic == TcpHello::kMagic && hello_.version == kTcpVersion;
  if (!sound) fd.reset();
  nic_.introduced(*this, std::move(fd), hello_);  // which ends this object
}

void TcpNic::introduced(TcpStranger& stranger, TcpFd fd, const TcpHello& hello) {
  const auto found =
      std::find_if(strangers_.begin(), strangers_.end(), [&](const auto& one) { return one.get() == &stranger; });
  const std::unique_ptr<TcpStranger> keep = std::move(*found);
  const TcpHello said = hello;
  strangers_.erase(found);
  if (!fd) return;
  try {
    if (said.kind == TcpHello::kControl) {
      make_room_for_inbox();
      inboxes_.push_back(std::make_unique<TcpInbox>(*this, std::move(fd)));
    } else if (said.kind == TcpHello::kLink) {
      if (const auto link = links_.find(said.to); link != links_.end()) link->second->adopt(std::move(fd), said.from);
    }
  } catch (const NicError&) {
  }
}

// Who is heard of all the time stays.
void TcpNic::make_room_for_inbox() {
  if (inboxes_.size() < most_inboxes_) return;
  const auto quiet = std::min_element(inboxes_.begin(), inboxes_.end(), [](const auto& a, const auto& b) {
    return std::pair(a->lent(), a->last_turn()) < std::pair(b->lent(), b->last_turn());
  });
  if (!(*quiet)->lent()) inboxes_.erase(quiet);
}

void TcpNic::look_at_clock() {
  const int64_t now = tcp_clock_ns();
  if (now < next_clock_) return;
  next_clock_ = now + kClockEvery;
  while (!strangers_.empty() && now - strangers_.front()->since() > kHelloWithin) strangers_.pop_front();
  std::erase_if(inboxes_, [&](const auto& inbox) {
    const int64_t since = inbox->stuck_since(now);
    return since != 0 && now - since > kMessageWithin && !inbox->lent();
  });
  for (const auto& [token, link] : links_) link->look_at_clock(now);
  if (listener_->more) listener_->event(0);
}

}  // namespace railwire
