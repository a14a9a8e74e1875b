// The control endpoint: messages to and from anyone who knows the address. Each NIC sends over connections that it has
// made itself, so that nobody can pass for somebody else's way to us.
//
// A message that the kernel has taken may still be lost with its connection; whoever must know repeats it.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nic/tcp_internal.h"

namespace railwire {
namespace {

constexpr size_t kOutboxBytes = 512 << 10;  // that wait for a peer to take them
constexpr size_t kInboxBytes = 4096;        // of a buffer, unless a message is longer
constexpr size_t kGather = 64;
using Length = uint32_t;

}  // namespace

// ---- to others
// -------------------------------------------------------------------------------------------------------
uint64_t TcpNic::resolve(std::span<const std::byte> address) {
  const TcpEnd end = unpack_tcp_address(address, nullptr, info_.name);
  std::lock_guard lock(mutex_);
  std::unique_ptr<TcpOutbox>& outbox = outboxes_[{reinterpret_cast<const char*>(address.data()), address.size()}];
  if (!outbox) outbox = std::make_unique<TcpOutbox>(*this, end);
  ++outbox->references;
  return reinterpret_cast<uint64_t>(outbox.get());
}

void TcpNic::forget(uint64_t peer) {
  std::lock_guard lock(mutex_);
  auto* outbox = reinterpret_cast<TcpOutbox*>(peer);
  if (--outbox->references > 0) return;
  std::erase_if(outboxes_, [&](const auto& entry) { return entry.second.get() == outbox; });
}

bool TcpNic::send(uint64_t peer, std::span<const std::byte> message, void* context) {
  if (message.size() > kTcpLongestMessage) return false;
  std::lock_guard lock(mutex_);
  return reinterpret_cast<TcpOutbox*>(peer)->send(message, context);
}

void TcpNic::send_ended(void* context, int error) {
  sends_.push_back({.kind = Completion::kSend,
                    .status = error ? Status::kUnreachable : Status::kOk,
                    .provider_error = error,
                    .context = context});
  if (error) wake_if_asleep();
}

bool TcpOutbox::send(std::span<const std::byte> message, void* context) {
  const size_t size = sizeof(Length) + message.size();
  if (queued_ + size > kOutboxBytes) return false;
  if (!fd_) dial();
  if (!fd_) {
    nic_.send_ended(context, errno);
    return true;
  }
  Message made{.bytes = std::vector<std::byte>(size), .context = context};
  const auto length = static_cast<Length>(message.size());
  std::memcpy(made.bytes.data(), &length, sizeof length);
  if (!message.empty()) std::memcpy(made.bytes.data() + sizeof length, message.data(), message.size());
  queued_ += size;
  queue_.push_back(std::move(made));
  if (up_ && writable_) flush();
  return true;
}

void TcpOutbox::dial() {
  TcpFd fd = dial_tcp(nic_.spec_, to_);
  if (!fd) return;
  try {
    hold(std::move(fd));
  } catch (const NicError&) {
    errno = ENOMEM;
    return;
  }
  up_ = writable_ = false;
  const TcpHello hello;
  Message first{.bytes = std::vector<std::byte>(sizeof hello), .hello = true};
  std::memcpy(first.bytes.data(), &hello, sizeof hello);
  queued_ += sizeof hello;
  queue_.push_front(std::move(first));
  first_sent_ = 0;
}

void TcpOutbox::flush() {
  while (!queue_.empty()) {
    iovec parts[kGather];
    size_t count = 0;
    for (const Message& message : queue_) {
      const size_t skip = count == 0 ? first_sent_ : 0;
      parts[count++] = {const_cast<std::byte*>(message.bytes.data()) + skip, message.bytes.size() - skip};
      if (count == kGather) break;
    }
    msghdr header{};
    header.msg_iov = parts;
    header.msg_iovlen = count;
    ssize_t sent = sendmsg(fd_.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      writable_ = false;
      return;
    }
    if (sent < 0) return broke(errno);
    first_sent_ += static_cast<size_t>(sent);
    while (!queue_.empty() && first_sent_ >= queue_.front().bytes.size()) {
      const Message& done = queue_.front();
      first_sent_ -= done.bytes.size();
      queued_ -= done.bytes.size();
      if (!done.hello) nic_.send_ended(done.context, 0);
      queue_.pop_front();
    }
  }
}

void TcpOutbox::broke(int error) {
  drop();
  up_ = writable_ = false;
  queued_ = first_sent_ = 0;
  std::deque<Message> lost;
  lost.swap(queue_);
  for (const Message& message : lost) {
    if (!message.hello) nic_.send_ended(message.context, error ? error : ECONNRESET);
  }
}

void TcpOutbox::event(uint32_t events) {
  if (!up_) {
    if (const int error = socket_error(fd_.get())) return broke(error);
    if (!(events & EPOLLOUT)) return;
    up_ = true;
  }
  // Nobody sends us anything here: what can be read is the end.
  if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) return broke(socket_error(fd_.get()));
  if (events & EPOLLOUT) writable_ = true;
  if (writable_) flush();
}

// ---- from others
// -----------------------------------------------------------------------------------------------------
TcpInbox::TcpInbox(TcpNic& nic, TcpFd fd) : TcpWatched(nic), last_turn_(nic.turn_number_) { hold(std::move(fd)); }

TcpInbox::~TcpInbox() {
  std::erase(nic_.talking_, this);
  std::erase(nic_.lent_, this);
}

void TcpInbox::event(uint32_t events) {
  if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) readable_ = true;
  if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) ending_ = true;
  if (!readable_ || listed_) return;
  listed_ = true;
  nic_.talking_.push_back(this);
}

bool TcpInbox::take(std::span<Completion> out, size_t* filled) {
  while (*filled < out.size()) {
    const size_t there = end_ - begin_;
    size_t wanted = kInboxBytes;
    if (there >= sizeof(Length)) {
      Length length = 0;
      std::memcpy(&length, bytes_.data() + begin_, sizeof length);
      if (length > kTcpLongestMessage) {
        gone_ = true;
        return lent_;
      }
      wanted = std::max(wanted, sizeof length + length);
      if (there >= sizeof length + length) {
        out[(*filled)++] = {.kind = Completion::kMessage,
                            .data = {bytes_.data() + begin_ + sizeof length, size_t{length}}};
        begin_ += sizeof length + length;
        if (!lent_) nic_.lent_.push_back(this);
        lent_ = true;
        stuck_since_ = 0;
        last_turn_ = nic_.turn_number_;
        continue;
      }
    }
    if (!readable_) return false;
    if (lent_) return true;  // what was handed out lies in the buffer
    if (begin_ > 0) {
      std::memmove(bytes_.data(), bytes_.data() + begin_, there);
      begin_ = 0;
      end_ = there;
    }
    if (bytes_.size() < wanted || (there == 0 && bytes_.size() > kInboxBytes)) {
      bytes_.resize(wanted);
      bytes_.shrink_to_fit();
    }
    const ssize_t got = recv(fd_.get(), bytes_.data() + end_, bytes_.size() - end_, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      readable_ = false;
      return false;
    }
    if (got <= 0) {
      gone_ = true;
      return false;
    }
    end_ += static_cast<size_t>(got);
    if (end_ < bytes_.size() && !ending_) readable_ = false;
  }
  return true;
}

int64_t TcpInbox::stuck_since(int64_t now) {
  if (begin_ == end_) return 0;
  if (stuck_since_ == 0) stuck_since_ = now;
  return stuck_since_;
}

size_t TcpNic::hand_out_messages(std::span<Completion> out) {
  size_t filled = 0;
  for (size_t turns = talking_.size(); turns > 0 && filled < out.size(); --turns) {
    TcpInbox* inbox = talking_.front();
    talking_.pop_front();
    const bool more = inbox->take(out, &filled);
    if (more) {
      talking_.push_back(inbox);
      continue;
    }
    inbox->listed_ = false;
    if (!inbox->gone()) continue;
    std::erase_if(inboxes_, [&](const auto& one) { return one.get() == inbox; });
  }
  return filled;
}

}  // namespace railwire
