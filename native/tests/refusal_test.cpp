// A refused write: the peer lives and means it, or its process is dying and its NIC still answers.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <thread>

#include "engine/frames.h"
#include "engines.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

constexpr int64_t kMillisecond = 1'000'000;

SimulatedSettings wire(bool resumable) {
  SimulatedSettings settings;
  settings.resumable = resumable;
  return settings;
}

void nap(int64_t milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

// The far end, worked by hand: a NIC that refuses whatever is written to it, as that of a process does whose memory
// has gone; and a process that says only what the test lets it say. It does nothing by itself.
class Puppet {
 public:
  Puppet(const TestFabric& fabric, TestEngine& engine)
      : nic_(make_simulated_nic("sim://" + fabric.name + "/puppet")), link_(nic_->create_link()) {
    static std::atomic<uint64_t> next{uint64_t{1} << 40};
    connection_ = next++;
    peer = engine.engine->create_peer(connection_, true, "puppet", {{0, 0, nic_->address()}});
    link_->connect(engine.engine->link_halves(*peer).at(0).address);
    engine.engine->activate_peer(*peer, {{link_->address(), plain_blob(0, 0)}}, 0, 0);
    to_engine_ = nic_->resolve(engine.engine->nics()[0]->address());
  }
  // Everything that has come. Pings are answered if `pongs`, records acknowledged if `acks`; returns the records'
  // types.
  std::vector<RecordType> listen(bool pongs, bool acks) {
    std::vector<RecordType> out;
    std::array<Completion, 16> completions;
    while (const size_t n = nic_->poll(completions)) {
      for (size_t i = 0; i < n; ++i) {
        if (completions[i].kind != Completion::kMessage) continue;
        const auto frame = parse_frame(completions[i].data);
        REQUIRE(frame);
        if (frame->header.type == FrameType::kRecord) {
          const auto record = parse_record(frame->payload);
          REQUIRE(record);
          if (record->sequence == taken_ + 1) {
            ++taken_;
            out.push_back(record->type);
          }
        }
        if (frame->header.type == FrameType::kPing ? pongs : acks) say(FrameType::kPong, acks ? taken_ : 0);
      }
    }
    return out;
  }
  void say(FrameType type, uint64_t ack = 0) {
    nic_->send(to_engine_,
               FrameWriter({.type = type, .to_initiator = true, .connection = connection_, .ack = ack})
                   .put<uint64_t>(0)
                   .take(),
               nullptr);
  }
  void say(RecordType type, std::span<const std::byte> body) {
    nic_->send(to_engine_,
               FrameWriter({.type = FrameType::kRecord, .to_initiator = true, .connection = connection_})
                   .put<uint64_t>(++said_)
                   .put(static_cast<uint8_t>(type))
                   .put_bytes(body)
                   .take(),
               nullptr);
  }
  // Whether the engine says this within a second, while nothing of it is acknowledged.
  bool hears(RecordType type) {
    for (const int64_t end = now_ns() + kSecond; now_ns() < end; nap(1)) {
      const auto heard = listen(false, false);
      if (std::find(heard.begin(), heard.end(), type) != heard.end()) return true;
    }
    return false;
  }

  std::shared_ptr<Peer> peer;
  const std::shared_ptr<RemoteKeys> keys =
      std::make_shared<RemoteKeys>(77, 1 << 20, std::vector<std::vector<std::byte>>{plain_blob(0, 1)});

 private:
  std::unique_ptr<Nic> nic_;
  std::unique_ptr<Link> link_;
  uint64_t connection_ = 0, to_engine_ = 0, taken_ = 0, said_ = 0;
};

// Until `count` WRs have come back refused.
void refused(TestEngine& engine, uint64_t count = 1) {
  const int64_t end = now_ns() + 5 * kSecond;
  while (engine.engine->stats().nics[0].errors < count) {
    REQUIRE(now_ns() < end);
    nap(1);
  }
}

// A write that has been refused by a peer of which nothing more is heard.
struct Doubt {
  explicit Doubt(const SimulatedSettings& settings = {}) : fabric(settings) {
    refused(a);
    CHECK_FALSE(transfer->wait(kSecond / 10));
  }
  TestFabric fabric;
  TestEngine a{fabric.name, "a", 1, 30 * kSecond};
  const Puppet puppet{fabric, a};
  std::vector<std::byte> source = std::vector<std::byte>(4096);
  const std::shared_ptr<Region> from = a.memory(source);
  const std::shared_ptr<Transfer> transfer = a.write(puppet.peer, from, 0, puppet.keys, 0, 1000, -1);
};

}  // namespace

TEST_CASE("refused by a peer that lives: the transfer says so after about a round trip") {
  for (const bool resumable : {false, true}) {
    for (const int links : {1, 2}) {
      CAPTURE(resumable);
      CAPTURE(links);
      TestFabric fabric(wire(resumable));
      TestEngine a(fabric.name, "a", links, 10 * kSecond), b(fabric.name, "b", links, 10 * kSecond);
      const auto [to_b, to_a] = join(a, b);
      std::vector<std::byte> source(4096), target(4096);
      const auto from = a.memory(source), into = b.memory(target);
      const auto keys = b.keys(*into), forged = forge(*keys);
      int64_t fastest = kSecond;
      for (int round = 0; round < 10; ++round) {
        const auto fine = a.write(to_b, from, 0, keys, 0, 4096, -1);
        REQUIRE(fine->wait(5 * kSecond));
        CHECK(fine->state() == State::kDone);
        const int64_t begin = now_ns();
        const auto wrong = a.write(to_b, from, 0, forged, 0, 1000, -1);
        REQUIRE(wrong->wait(5 * kSecond));
        fastest = std::min(fastest, now_ns() - begin);
        CHECK(wrong->state() == State::kFailed);
        CHECK(wrong->failure().reason == Reason::kRemoteAccess);
        CHECK(wrong->failure().message.find("refused by the peer") != std::string::npos);
        CHECK(wrong->failure().message.find("answered") == std::string::npos);
        CHECK_FALSE(wrong->may_still_land());
      }
      CHECK(fastest < 20 * kMillisecond);  // nothing waited for a timer
      CHECK(to_b->connected());
      CHECK(a.engine->stats().active == 0);
    }
  }
}

TEST_CASE("refused by a peer that lives, over messages that get lost: still nobody takes it for dead") {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    SimulatedSettings settings = wire(seed % 2);
    settings.seed = seed;
    settings.message_loss_rate = 0.15;
    settings.max_delay_us = 200;
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 2, 4 * kSecond), b(fabric.name, "b", 2, 4 * kSecond);
    const auto [to_b, to_a] = join(a, b);
    std::vector<std::byte> source(4096), target(4096);
    const auto from = a.memory(source), into = b.memory(target);
    const auto forged = forge(*b.keys(*into));
    for (int round = 0; round < 5; ++round) {
      const auto wrong = a.write(to_b, from, 0, forged, 0, 1000, round % 2 ? 5 : -1);
      REQUIRE(wrong->wait(10 * kSecond));
      INFO(wrong->failure().message);
      CHECK(wrong->failure().reason == Reason::kRemoteAccess);
      CHECK_FALSE(wrong->may_still_land());
    }
    CHECK(to_b->connected());
  }
}

TEST_CASE("the reason of a link that broke by a refusal is the refusal, whoever notices the break first") {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SimulatedSettings settings = wire(true);
    settings.seed = seed;
    settings.max_delay_us = 100;
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 1, 10 * kSecond), b(fabric.name, "b", 1, 10 * kSecond);
    const auto [to_b, to_a] = join(a, b);
    std::vector<std::byte> source(4096), target(4096);
    const auto from = a.memory(source), into = b.memory(target);
    const auto keys = b.keys(*into), forged = forge(*keys);
    // Timers that run out all the time make the engine look at its links all the time; what comes back of this one is
    // more than one look at the NIC brings.
    std::vector<std::shared_ptr<Expectation>> timers;
    for (int64_t i = 1; i < 200; ++i) timers.push_back(a.expect(1, 1, i * kMillisecond));
    fabric.fabric->hold(true);
    std::vector<std::shared_ptr<Transfer>> transfers;
    for (size_t i = 0; i < 600; ++i) {
      transfers.push_back(a.write(to_b, from, 0, i == 200 ? forged : keys, 0, 64, -1));
    }
    fabric.fabric->hold(false);
    for (const auto& transfer : transfers) {
      REQUIRE(transfer->wait(10 * kSecond));
      INFO(transfer->failure().message);
      CHECK(transfer->failure().reason != Reason::kLinkFailed);
    }
    CHECK(transfers[200]->failure().reason == Reason::kRemoteAccess);
  }
}

TEST_CASE("refused by the NIC of a process that is silent: the peer is lost, within the liveness time") {
  for (const bool resumable : {false, true}) {
    CAPTURE(resumable);
    TestFabric fabric(wire(resumable));
    TestEngine a(fabric.name, "a", 1);
    const Puppet puppet(fabric, a);
    std::vector<std::byte> source(4096);
    const auto from = a.memory(source);
    const int64_t begin = now_ns();
    std::vector<std::shared_ptr<Transfer>> transfers;
    for (int i = 0; i < 10; ++i)
      transfers.push_back(a.write(puppet.peer, from, 0, puppet.keys, 0, 1000, i % 2 ? 5 : -1));
    refused(a);
    CHECK_FALSE(transfers[0]->wait(kSecond / 2));
    for (const auto& transfer : transfers) {
      REQUIRE(transfer->wait(5 * kSecond));
      INFO(transfer->failure().message);
      CHECK(transfer->state() == State::kFailed);
      CHECK(transfer->failure().reason == Reason::kPeerLost);
      CHECK(transfer->failure().peer == puppet.peer->id);
    }
    CHECK(now_ns() - begin < 2 * kSecond);
    CHECK(puppet.peer->ended());
    // What was refused has not landed. Only a link that broke leaves open what was behind it.
    CHECK_FALSE(transfers[0]->may_still_land());
    CHECK(transfers[0]->failure().message.find("refused by the peer") != std::string::npos);
    CHECK(transfers[0]->failure().message.find("has not been heard") != std::string::npos);
  }
}

TEST_CASE("a message that may have been sent before the refusal does not vouch for the peer") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1);
  Puppet puppet(fabric, a);
  std::vector<std::byte> source(4096);
  const auto from = a.memory(source);
  const auto transfer = a.write(puppet.peer, from, 0, puppet.keys, 0, 1000, -1);
  refused(a);
  puppet.say(FrameType::kPong);
  puppet.say(RecordType::kMessage, {});
  CHECK_FALSE(transfer->wait(kSecond / 2));
  REQUIRE(transfer->wait(5 * kSecond));
  CHECK(transfer->failure().reason == Reason::kPeerLost);
}

TEST_CASE("an acknowledgement of what was sent after the refusal vouches for the peer") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 30 * kSecond);
  Puppet puppet(fabric, a);
  std::vector<std::byte> source(4096);
  const auto from = a.memory(source);
  std::vector<std::shared_ptr<Transfer>> transfers;
  for (int i = 0; i < 10; ++i) transfers.push_back(a.write(puppet.peer, from, 0, puppet.keys, 0, 1000, -1));
  refused(a, 10);
  CHECK_FALSE(transfers[0]->wait(kSecond / 10));
  size_t records = 0;
  for (const int64_t end = now_ns() + 5 * kSecond; !transfers[9]->done() && now_ns() < end; nap(1)) {
    records += puppet.listen(false, true).size();
  }
  for (const auto& transfer : transfers) {
    REQUIRE(transfer->wait(kSecond));
    CHECK(transfer->failure().reason == Reason::kRemoteAccess);
  }
  CHECK(records < 10);  // one question may do for many
}

TEST_CASE("the doubt has an end even if the peer answers pings and acknowledges nothing") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1);
  Puppet puppet(fabric, a);
  std::vector<std::byte> source(4096);
  const auto from = a.memory(source);
  const int64_t begin = now_ns();
  const auto transfer = a.write(puppet.peer, from, 0, puppet.keys, 0, 1000, -1);
  while (!transfer->done() && now_ns() < begin + 5 * kSecond) {
    puppet.listen(true, false);
    nap(5);
  }
  CHECK(now_ns() - begin < 2 * kSecond);
  CHECK(transfer->failure().reason == Reason::kRemoteAccess);
  CHECK(puppet.peer->connected());
}

TEST_CASE("a transfer in doubt ends at once by cancel()") {
  for (const bool resumable : {false, true}) {
    TestFabric fabric(wire(resumable));
    TestEngine a(fabric.name, "a", 1, 30 * kSecond);
    const Puppet puppet(fabric, a);
    std::vector<std::byte> source(4096);
    const auto from = a.memory(source);
    std::vector<int64_t> took;
    for (uint64_t round = 1; round <= (resumable ? 1 : 15); ++round) {  // a link that broke is not made anew here
      const auto transfer = a.write(puppet.peer, from, 0, puppet.keys, 0, 1000, -1);
      refused(a, round);
      CHECK_FALSE(transfer->wait(20 * kMillisecond));
      const int64_t begin = now_ns();
      transfer->cancel();
      REQUIRE(transfer->wait(5 * kSecond));
      took.push_back(now_ns() - begin);
      CHECK(transfer->state() == State::kFailed);  // before it was cancelled
      CHECK(transfer->failure().reason == Reason::kRemoteAccess);
      CHECK(transfer->failure().message.find("has not answered") != std::string::npos);
      CHECK_FALSE(transfer->may_still_land());
    }
    std::sort(took.begin(), took.end());
    CHECK(took[took.size() / 2] < 2 * kMillisecond);  // no timer
    CHECK(a.engine->stats().active == 0);
  }
}

TEST_CASE("a transfer in doubt ends with its engine") {
  for (const bool resumable : {false, true}) {
    for (const int64_t timeout : {int64_t{0}, kSecond / 5}) {
      Doubt doubt(wire(resumable));
      const int64_t begin = now_ns();
      doubt.a.engine->close(timeout);
      CHECK(doubt.transfer->done());
      CHECK(doubt.transfer->state() == State::kFailed);
      CHECK(now_ns() - begin < 3 * kSecond);
      CHECK(doubt.transfer.use_count() == 1);
    }
  }
}

TEST_CASE("a transfer in doubt ends with the connection") {
  Doubt doubt;
  const auto close = std::make_shared<CloseOperation>(doubt.a.engine, doubt.puppet.peer, kSecond / 5);
  doubt.a.engine->submit(close);
  REQUIRE(close->wait(5 * kSecond));
  REQUIRE(doubt.transfer->wait(kSecond));
  CHECK(doubt.transfer->failure().reason == Reason::kPeerLost);  // it did not confirm the close either
}

TEST_CASE("a transfer in doubt holds nobody up: other writes, its source, the fences of the peer that refused") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 30 * kSecond), b(fabric.name, "b", 1, 30 * kSecond);
  const auto [to_b, to_a] = join(a, b);
  Puppet puppet(fabric, a);
  std::vector<std::byte> source(4096, std::byte{7}), target(4096);
  const auto from = a.memory(source), into = b.memory(target);
  // To both at once: the half that reaches b lands and is counted.
  const auto both = std::make_shared<Transfer>(a.engine, Transfer::Kind::kWrite, 9);
  both->submitted_ns = now_ns();
  for (const auto& [peer, remote] : {std::pair(puppet.peer, puppet.keys), std::pair(to_b, b.keys(*into))}) {
    both->add_lane<PieceSource>(peer, from, std::vector<Piece>{{0, a.engine->reach(peer, *remote), 0, 4096}}, false, 9,
                                peer->limits());
  }
  const auto landed = b.expect(9, 1);
  a.engine->submit(both);
  refused(a);
  REQUIRE(landed->wait(5 * kSecond));
  CHECK(landed->state() == State::kDone);
  CHECK(target == source);
  const auto fine = a.write(to_b, from, 0, b.keys(*into), 0, 4096, -1);
  REQUIRE(fine->wait(5 * kSecond));
  CHECK(fine->state() == State::kDone);
  CHECK(from->users.load() == 0);
  // The receiver is told that its count will not be reached, and gets its fences.
  CHECK(puppet.hears(RecordType::kPoison));
  std::array<std::byte, 16> revoke{};
  std::memcpy(revoke.data(), &puppet.keys->region_id, 8);
  puppet.say(RecordType::kRevoke, revoke);
  CHECK(puppet.hears(RecordType::kRevoked));
  puppet.say(RecordType::kClose, {});
  CHECK(puppet.hears(RecordType::kClosed));
  CHECK_FALSE(both->done());
  REQUIRE(both->wait(5 * kSecond));  // the end of the connection
  CHECK(both->state() == State::kFailed);
}
