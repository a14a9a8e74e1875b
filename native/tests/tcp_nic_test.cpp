// The tcp NIC: two of them over loopback sockets, and strangers who do not keep to the rules.
#include "nic/tcp_nic.h"

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include "nic/tcp_internal.h"

namespace railwire {
namespace {

using Options = std::map<std::string, std::string>;

struct Side {
  explicit Side(const std::string& spec = "tcp://127.0.0.1", const Options& options = {}, size_t bytes = 8 << 20)
      : nic(make_tcp_nic(spec, options)), memory(bytes) {
    region = nic->register_memory({.address = memory.data(), .length = memory.size()});
    renew();
  }
  ~Side() {
    link.reset();
    nic->deregister(region);
  }
  void renew() { link = nic->create_link(); }
  size_t poll() {
    Completion out[16];
    const size_t n = nic->poll(out);
    for (size_t i = 0; i < n; ++i) {
      switch (out[i].kind) {
        case Completion::kWorkRequest:
          ends.push_back(out[i].status);
          if (out[i].provider_error) error = out[i].provider_error;
          break;
        case Completion::kImmediate:
          immediates.push_back(out[i].immediate);
          break;
        case Completion::kMessage:
          messages.emplace_back(reinterpret_cast<const char*>(out[i].data.data()), out[i].data.size());
          break;
        case Completion::kSend:
          sent.push_back(out[i].status);
          break;
      }
    }
    return n;
  }
  WorkRequest write(size_t from, size_t to, size_t length, uint32_t immediate = 0) {
    return {.local = memory.data() + from,
            .remote = remote.base + to,
            .rkey = remote.rkey,
            .length = length,
            .flags = immediate ? WorkRequest::kImmediate : WorkRequest::kWrite,
            .immediate = immediate};
  }
  size_t post(const WorkRequest& request) { return link->post({&request, 1}); }
  void send(uint64_t to, const std::string& text) {
    while (!nic->send(to, std::as_bytes(std::span(text)), nullptr)) poll();
  }

  std::unique_ptr<Nic> nic;
  std::vector<std::byte> memory;
  Registration region;
  std::unique_ptr<Link> link;
  RemoteMemory remote{};
  std::vector<Status> ends, sent;
  std::vector<uint32_t> immediates;
  std::vector<std::string> messages;
  int error = 0;
};

template <class F>
void until(Side& a, Side& b, F&& done, int seconds = 20) {
  const int64_t end = tcp_clock_ns() + seconds * int64_t{1'000'000'000};
  while (!done()) {
    a.poll();
    b.poll();
    REQUIRE(tcp_clock_ns() < end);
  }
}

void join(Side& a, Side& b) {
  a.remote = b.nic->import_memory(b.region.blob);
  b.remote = a.nic->import_memory(a.region.blob);
  a.link->connect(b.link->address());
  b.link->connect(a.link->address());
}

void fill(Side& side, unsigned seed) {
  std::mt19937 random(seed);
  for (std::byte& byte : side.memory) byte = static_cast<std::byte>(random());
}

TEST_CASE("tcp: writes and reads of every length, on IPv4, IPv6 and by host name") {
  for (const char* spec : {"tcp://127.0.0.1", "tcp://[::1]", "tcp://localhost", "tcp://0.0.0.0"}) {
    CAPTURE(spec);
    Side a(spec), b(spec);
    fill(a, 1);
    join(a, b);
    for (const size_t length : {size_t{0}, size_t{1}, size_t{64}, size_t{8192}, size_t{1} << 20, size_t{3} << 20}) {
      a.ends.clear();
      REQUIRE(a.post(a.write(11, 4 << 20, length, 7)) == 1);
      until(a, b, [&] { return a.ends.size() == 1; });
      CHECK(a.ends[0] == Status::kOk);
      CHECK(std::equal(a.memory.begin() + 11, a.memory.begin() + 11 + static_cast<long>(length),
                       b.memory.begin() + (4 << 20)));
      WorkRequest read = a.write(0, 4 << 20, length);
      read.flags = WorkRequest::kRead;
      const std::vector<std::byte> want(b.memory.begin() + (4 << 20),
                                        b.memory.begin() + (4 << 20) + static_cast<long>(length));
      REQUIRE(a.post(read) == 1);
      until(a, b, [&] { return a.ends.size() == 2; });
      CHECK(std::equal(want.begin(), want.end(), a.memory.begin()));
    }
    CHECK(b.immediates.size() == 6);
    CHECK(a.link->outstanding() == 0);
    CHECK(a.link->immediates_completed() == 6);
    CHECK(b.link->immediates_landed() == 6);
  }
}

TEST_CASE("tcp: either half may be told of the other first, long before it") {
  for (int round = 0; round < 20; ++round) {
    Side a, b;
    a.remote = b.nic->import_memory(b.region.blob);
    (round % 2 ? a : b).link->connect((round % 2 ? b : a).link->address());
    for (int i = 0; i < 50; ++i) a.poll(), b.poll(), usleep(100);
    (round % 2 ? b : a).link->connect((round % 2 ? a : b).link->address());
    REQUIRE(a.post(a.write(0, 0, 100, 3)) == 1);
    until(a, b, [&] { return a.ends.size() == 1; });
    CHECK(a.ends[0] == Status::kOk);
  }
}

TEST_CASE("tcp: many writes both ways at once, each immediate once and in order") {
  constexpr uint32_t kCount = 30'000;
  Side a, b;
  join(a, b);
  uint32_t posted[2] = {0, 0};
  std::vector<WorkRequest> batch;
  until(a, b, [&] {
    for (int side = 0; side < 2; ++side) {
      Side& one = side ? b : a;
      batch.clear();
      for (uint32_t i = posted[side]; i < std::min(posted[side] + 64, kCount); ++i) {
        batch.push_back(one.write(i % 4096, i * 100, i % 2000, i + 1));
      }
      posted[side] += static_cast<uint32_t>(one.link->post(batch));
      REQUIRE(!one.link->broken());
    }
    return a.ends.size() == kCount && b.ends.size() == kCount;
  });
  for (Side* side : {&a, &b}) {
    CHECK(std::all_of(side->ends.begin(), side->ends.end(), [](Status s) { return s == Status::kOk; }));
    REQUIRE(side->immediates.size() == kCount);
    for (uint32_t i = 0; i < kCount; ++i) REQUIRE(side->immediates[i] == i + 1);
  }
}

TEST_CASE("tcp: messages both ways, of every length, and to one who has gone") {
  Side a, b;
  const uint64_t to_b = a.nic->resolve(b.nic->address()), to_a = b.nic->resolve(a.nic->address());
  std::vector<std::string> texts;
  for (size_t i = 0; i < 1000; ++i) {
    texts.emplace_back(i % 100 == 0 ? 65536 : (i * 37) % 5000, static_cast<char>('a' + i % 26));
    while (!a.nic->send(to_b, std::as_bytes(std::span(texts.back())), nullptr)) a.poll(), b.poll();
    while (!b.nic->send(to_a, std::as_bytes(std::span(texts.back())), nullptr)) a.poll(), b.poll();
  }
  until(a, b, [&] { return a.messages.size() == 1000 && b.messages.size() == 1000 && a.sent.size() == 1000; });
  CHECK(a.messages == texts);
  CHECK(b.messages == texts);
  CHECK(std::all_of(a.sent.begin(), a.sent.end(), [](Status s) { return s == Status::kOk; }));
  CHECK(!a.nic->send(to_b, std::vector<std::byte>(65537), nullptr));
  {
    Side c;
    const uint64_t to_c = a.nic->resolve(c.nic->address());
    a.send(to_c, "hello");
    until(a, c, [&] { return c.messages.size() == 1; });
    c.link.reset();
    c.nic->deregister(c.region);
    c.nic = make_tcp_nic("tcp://127.0.0.1", {});  // the old one is gone
    c.renew();
    c.region = c.nic->register_memory({.address = c.memory.data(), .length = c.memory.size()});
    a.sent.clear();
    until(a, c, [&] {
      if (a.sent.empty() || a.sent.back() == Status::kOk) a.send(to_c, "still there?");
      return !a.sent.empty() && a.sent.back() == Status::kUnreachable;
    });
    a.nic->forget(to_c);
  }
  a.nic->forget(to_b);
}

TEST_CASE("tcp: a wrong key is refused with the right end, and the link breaks on both sides") {
  Side a, b;
  join(a, b);
  std::vector<WorkRequest> batch{a.write(0, 0, 100'000, 1), a.write(0, 0, 100'000, 2), a.write(0, 0, 100'000, 3)};
  batch[1].rkey ^= 1;
  REQUIRE(a.link->post(batch) == 3);
  until(a, b, [&] { return a.ends.size() == 3 && a.link->broken() && b.link->broken(); });
  CHECK(a.ends == std::vector{Status::kOk, Status::kRemoteAccess, Status::kFlushed});
  CHECK(b.immediates == std::vector<uint32_t>{1});
}

TEST_CASE("tcp: memory that may only be read refuses writes") {
  Side a, b;
  b.nic->deregister(b.region);
  b.region = b.nic->register_memory({.address = b.memory.data(), .length = b.memory.size(), .writable = false});
  join(a, b);
  WorkRequest read = a.write(0, 0, 100);
  read.flags = WorkRequest::kRead;
  a.post(read);
  a.post(a.write(0, 0, 100));
  until(a, b, [&] { return a.ends.size() == 2; });
  CHECK(a.ends == std::vector{Status::kOk, Status::kRemoteAccess});
}

TEST_CASE("tcp: close() gives all back, nothing lands after it, and the counts tell what had") {
  for (int round = 0; round < 30; ++round) {
    Side a, b;
    fill(a, 5);
    join(a, b);
    std::vector<WorkRequest> batch;
    for (uint32_t i = 0; i < 64; ++i) batch.push_back(a.write(0, i * 1000, 120'000, i + 1));
    until(a, b, [&] { return a.link->post({}) == 0 && b.poll() == 0; });
    REQUIRE(a.link->post(batch) == 64);
    for (int i = 0; i < round; ++i) a.poll(), b.poll();
    const bool by_writer = round % 2;
    Side& closer = by_writer ? a : b;
    closer.link->close();
    const auto after = b.memory;
    until(a, b, [&] { return a.link->outstanding() == 0 && a.link->broken() && b.link->broken(); });
    CHECK(a.ends.size() == 64);
    if (!by_writer) CHECK(b.memory == after);
    const auto landed = b.link->immediates_landed();
    const auto ok = static_cast<uint64_t>(std::count(a.ends.begin(), a.ends.end(), Status::kOk));
    CHECK(a.link->immediates_completed() == ok);
    CHECK(ok <= landed);
    until(a, b, [&] { return b.immediates.size() == landed; });
    CHECK(closer.link->closed());
    // What came back unfinished is sent again, over a new link.
    a.renew();
    b.renew();
    join(a, b);
    batch.erase(batch.begin(), batch.begin() + static_cast<long>(landed));
    if (!batch.empty()) REQUIRE(a.link->post(batch) == batch.size());
    until(a, b, [&] { return b.immediates.size() == 64; });
    for (uint32_t i = 0; i < 64; ++i) CHECK(b.immediates[i] == i + 1);
  }
}

TEST_CASE("tcp: a peer that is gone breaks the link, one that was never there, too") {
  Side a;
  {
    Side b;
    join(a, b);
    a.post(a.write(0, 0, 10, 1));
    until(a, b, [&] { return a.ends.size() == 1; });
  }
  a.post(a.write(0, 0, 10, 1));
  until(a, a, [&] { return a.link->broken() && a.link->outstanding() == 0; });
  Side c("tcp://127.0.0.1", {{"timeout_ms", "200"}});
  std::vector<std::byte> address;
  {
    Side d;
    address = d.link->address();
  }
  c.link->connect(address);
  c.post(c.write(0, 0, 10, 1));
  until(c, c, [&] { return c.link->broken() && c.link->outstanding() == 0; });
  CHECK(c.ends == std::vector{Status::kUnreachable});
  CHECK((c.error == ECONNREFUSED || c.error == ETIMEDOUT));
}

TEST_CASE("tcp: a sleeping side wakes for writes, messages, breaks and its own completions") {
  Side a, b;
  join(a, b);
  const uint64_t to_b = a.nic->resolve(b.nic->address());
  std::atomic<bool> stop{false};
  std::atomic<int> sleeps{0}, rounds{0};
  std::thread sleeper([&] {
    while (!stop) {
      while (b.poll() > 0) {
      }
      rounds = static_cast<int>(b.immediates.size() + b.messages.size());
      if (!b.nic->arm()) continue;
      pollfd fd{b.nic->wait_fd(), POLLIN, 0};
      ++sleeps;
      if (::poll(&fd, 1, 5000) == 0) {
        MESSAGE("nothing woke it");
        std::abort();
      }
      b.nic->disarm();
    }
  });
  for (int i = 1; i <= 300; ++i) {
    if (i % 3 == 0) {
      a.send(to_b, "x");
    } else {
      a.post(a.write(0, 0, i % 2 ? 64 : 300'000, 1));
    }
    const int64_t end = tcp_clock_ns() + 5'000'000'000;
    while (rounds < i) {
      a.poll();
      REQUIRE(tcp_clock_ns() < end);
    }
  }
  stop = true;
  a.send(to_b, "end");
  sleeper.join();
  CHECK(sleeps > 20);
}

TEST_CASE("tcp: memory may go while a peer writes to it") {
  Side a, b;
  join(a, b);
  std::vector<WorkRequest> batch(64, a.write(0, 0, 1 << 20, 1));
  REQUIRE(a.link->post(batch) == 64);
  for (int i = 0; i < 5; ++i) a.poll(), b.poll();
  b.nic->deregister(b.region);
  std::fill(b.memory.begin(), b.memory.end(), std::byte{0xee});
  until(a, b, [&] { return a.ends.size() == 64; });
  CHECK(std::all_of(b.memory.begin(), b.memory.end(), [](std::byte x) { return x == std::byte{0xee}; }));
  CHECK(std::find(a.ends.begin(), a.ends.end(), Status::kRemoteAccess) != a.ends.end());
}

int plain_connection(const Nic& nic) {
  const std::string name = nic.info().name;
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(name.substr(name.rfind(':') + 1))));
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  REQUIRE(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0);
  return fd;
}

TEST_CASE("tcp: strangers cost a bounded number of descriptors, and disturb nobody") {
  Side a, b;
  join(a, b);
  std::mt19937 random(7);
  std::vector<int> fds;
  const auto highest = [] {
    const int fd = dup(0);
    ::close(fd);
    return fd;
  };
  const int before = highest();
  for (int i = 0; i < 400; ++i) {
    const int fd = plain_connection(*b.nic);
    std::vector<unsigned char> garbage(random() % 200);
    for (auto& byte : garbage) byte = static_cast<unsigned char>(random());
    TcpHello hello;
    if (i % 4 == 1) hello.version = 99;
    if (i % 4 == 2) hello.kind = TcpHello::kLink;
    if (i % 4 > 0) {
      garbage.resize(sizeof hello);
      std::memcpy(garbage.data(), &hello, sizeof hello);
    }
    if (i % 8 == 3) garbage.insert(garbage.end(), 100, 0xff);                  // a message longer than any
    if (i % 8 == 7) garbage.insert(garbage.end(), {0, 0xff, 0, 0, 'x', 'x'});  // and one that never ends
    if (i % 5 != 4) REQUIRE(::send(fd, garbage.data(), garbage.size(), MSG_NOSIGNAL) >= 0);
    fds.push_back(fd);
    for (int k = 0; k < 3; ++k) a.poll(), b.poll();
  }
  a.ends.clear();
  for (uint32_t i = 0; i < 100; ++i) a.post(a.write(0, 0, 1000, i + 1));
  until(a, b, [&] { return a.ends.size() == 100; });
  CHECK(std::all_of(a.ends.begin(), a.ends.end(), [](Status s) { return s == Status::kOk; }));
  CHECK(b.messages.empty());
  CHECK(highest() <= before + 400 + 128 + 110);
  for (const int fd : fds) ::close(fd);
  const int64_t end = tcp_clock_ns() + 10'000'000'000;
  while (highest() > before && tcp_clock_ns() < end) a.poll(), b.poll();
  CHECK(highest() <= before);
}

TEST_CASE("tcp: names, options and addresses that are wrong are refused with a reason") {
  const auto refused = [](const std::string& spec, const Options& options = {}) {
    try {
      make_tcp_nic(spec, options);
    } catch (const NicError& error) {
      return std::strlen(error.what()) > 20;
    }
    return false;
  };
  for (const char* spec : {"tcp://", "tcp://127.0.0.1:", "tcp://127.0.0.1:x", "tcp://127.0.0.1:65536", "tcp://[::1",
                           "tcp:127.0.0.1", "tcp://192.0.2.77", "tcp://no.such.host.invalid"}) {
    CAPTURE(spec);
    CHECK(refused(spec));
  }
  for (const char* option : {"link_depth", "streams", "socket_buffer", "timeout_ms"}) {
    CHECK(refused("tcp://127.0.0.1", {{option, "0"}}));
    CHECK(refused("tcp://127.0.0.1", {{option, "many"}}));
    CHECK(refused("tcp://127.0.0.1", {{option, "99999999999"}}));
  }
  Side a("tcp://127.0.0.1", {{"link_depth", "32"}, {"streams", "2"}});
  CHECK(a.nic->info().link_depth == 32);
  CHECK(a.nic->info().links_per_pair == 2);
  CHECK(a.nic->info().name.starts_with("tcp://127.0.0.1:"));
  CHECK(refused(a.nic->info().name));  // the port is taken
  CHECK_THROWS_AS(a.nic->register_memory({.address = a.memory.data(), .length = 1, .device = 0}), NicError);
  const auto good = a.nic->address(), link = a.link->address();
  CHECK(link.size() <= 128);
  std::mt19937 random(8);
  for (int i = 0; i < 2000; ++i) {
    auto bad = i % 2 ? good : link;
    if (i % 3 == 0) {
      bad.resize(random() % bad.size());
    } else {
      for (int k = 0; k < 3; ++k) bad[random() % bad.size()] ^= static_cast<std::byte>(random());
    }
    try {
      const uint64_t to = a.nic->resolve(bad);
      a.nic->forget(to);
    } catch (const NicError& error) {
      CHECK(std::strlen(error.what()) > 20);
    }
  }
  auto other = good;
  other[0] = std::byte{2};
  CHECK_THROWS_WITH_AS(a.nic->resolve(other), doctest::Contains("version 2"), NicError);
}

}  // namespace
}  // namespace railwire
