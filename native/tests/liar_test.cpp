// A connected peer that lies: whatever it says, what we keep for it has an end, and so has the connection. And what
// looks alike and is honest: messages longer than a NIC carries, and as many as the window takes.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "engine/frames.h"
#include "engines.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

// The far end, worked by hand: says what the test wants, and acknowledges nothing.
class Liar {
 public:
  Liar(const TestFabric& fabric, TestEngine& engine)
      : engine_(engine),
        nic_(make_simulated_nic("sim://" + fabric.name + "/liar" + std::to_string(number()))),
        link_(nic_->create_link()) {
    static std::atomic<uint64_t> next{uint64_t{1} << 42};
    connection_ = next++;
    peer = engine.engine->create_peer(connection_, true, "liar", {{0, 0, nic_->address()}});
    link_->connect(engine.engine->link_halves(*peer).at(0).address);
    engine.engine->activate_peer(*peer, {{link_->address(), plain_blob(0, 0)}}, 0, 0);
    to_engine_ = nic_->resolve(engine.engine->nics()[0]->address());
  }
  void say(RecordType type, std::span<const std::byte> body) { say(++said_, type, body); }
  void say(uint64_t sequence, RecordType type, std::span<const std::byte> body) {
    const auto frame = FrameWriter({.type = FrameType::kRecord, .to_initiator = true, .connection = connection_})
                           .put<uint64_t>(sequence)
                           .put(static_cast<uint8_t>(type))
                           .put_bytes(body)
                           .take();
    nic_->send(to_engine_, frame, nullptr);
    if (++sent_ % 64 == 0) {
      std::array<Completion, 64> answers;
      while (nic_->poll(answers)) {
      }
      // Not faster than it is listened to: the wire between is nobody's memory, and has no end here.
      while (engine_.engine->stats().nics[0].messages + 256 < sent_) std::this_thread::yield();
    }
  }
  // Says it until the connection ends, at most `most` times; returns how often.
  size_t say_often(RecordType type, size_t most, auto&& body) {
    size_t n = 0;
    while (n < most && !peer->ended()) say(type, body(n++));
    engine_.engine->stats();
    return n;
  }
  static int number() {
    static std::atomic<int> next{0};
    return next++;
  }
  bool cut_off_because_it(const std::string& what) {
    const Failure why = engine_.engine->peer_failure(*peer);
    CAPTURE(why.message);
    return peer->state.load() == PeerState::kLost && why.message.find("cut off: it " + what) != std::string::npos;
  }

  std::shared_ptr<Peer> peer;

 private:
  TestEngine& engine_;
  std::unique_ptr<Nic> nic_;
  std::unique_ptr<Link> link_;
  uint64_t connection_ = 0, to_engine_ = 0, said_ = 0, sent_ = 0;
};

struct Bench {
  TestFabric fabric;
  TestEngine engine{fabric.name, "a", 1, 60 * kSecond};
  Liar liar{fabric, engine};

  // Bytes of messages that the user has not taken, and their number.
  std::pair<size_t, size_t> untaken() {
    size_t bytes = 0, count = 0;
    for (const auto& event : engine.events.pop(0, SIZE_MAX)) {
      if (event.kind != Event::kMessage) continue;
      bytes += event.data.size();
      ++count;
    }
    return {bytes, count};
  }
};

template <class T>
std::vector<std::byte> bytes_of(T first, size_t size) {
  std::vector<std::byte> out(size);
  std::memcpy(out.data(), &first, sizeof first);
  return out;
}

}  // namespace

TEST_CASE("messages beyond the window end the connection") {
  for (const size_t size : {size_t{60'000}, size_t{100}, size_t{0}}) {
    CAPTURE(size);
    Bench bench;
    const std::vector<std::byte> message(size);
    bench.liar.say_often(RecordType::kMessage, 100'000, [&](size_t) -> const auto& { return message; });
    CHECK(bench.liar.cut_off_because_it("sent more messages than it had room for"));
    const auto [bytes, count] = bench.untaken();
    CHECK(bytes <= Peer::kMessageWindow);
    CHECK(count <= Peer::kMessageWindow / Peer::kMessageOverhead);
    CHECK(bytes + count * Peer::kMessageOverhead > Peer::kMessageWindow - 61'000);
  }
}

TEST_CASE("a message in parts that never end, or are empty, ends the connection") {
  for (const size_t size : {size_t{1000}, size_t{0}}) {
    Bench bench;
    const std::vector<std::byte> part(size);
    const size_t said =
        bench.liar.say_often(RecordType::kMessagePart, 10'000, [&](size_t) -> const auto& { return part; });
    CHECK(said < 400);
    CHECK(bench.liar.cut_off_because_it("sent a message of more than 61440 bytes"));
    CHECK(bench.liar.peer->partial_message.empty());
    CHECK(bench.untaken().second == 0);
  }
}

TEST_CASE("records that come too early are held back for as many as an honest peer has under way, and no more") {
  Bench bench;
  const std::vector<std::byte> message(60'000);
  for (uint64_t sequence = 2; sequence < 2000; ++sequence) bench.liar.say(sequence, RecordType::kMessage, message);
  for (const uint64_t sequence : {UINT64_MAX, uint64_t{1} << 63}) bench.liar.say(sequence, RecordType::kMessage, {});
  const int64_t end = now_ns() + 10 * kSecond;
  while (bench.engine.engine->stats().nics[0].messages < 2000 && now_ns() < end) std::this_thread::yield();
  CHECK(bench.liar.peer->early.size() == 255);
  CHECK(bench.liar.peer->connected());
  bench.liar.say(1, RecordType::kMessage, {});  // and they are good for what they are kept for
  while (bench.liar.peer->stats.messages_received < 256 && now_ns() < end) bench.engine.engine->stats();
  CHECK(bench.untaken().second == 256);
}

TEST_CASE("failed writes without end: the connection ends, and so does whoever waits") {
  Bench bench;
  const auto waiting = bench.engine.expect(4'000'000, 1, 60 * kSecond);
  const size_t said = bench.liar.say_often(RecordType::kPoison, 400'000,
                                           [](size_t n) { return bytes_of(static_cast<uint32_t>(n), 300); });
  CHECK(said < 150'000);
  CHECK(bench.liar.cut_off_because_it("told of more failed writes than there is room for"));
  REQUIRE(waiting->wait(5 * kSecond));
  CHECK(waiting->state() == State::kFailed);
  // The next one is not made to pay for it: what a peer told that is gone makes room.
  Liar other(bench.fabric, bench.engine);
  other.say(RecordType::kPoison, bytes_of(uint32_t{4'000'001}, 10));
  const auto next = bench.engine.expect(4'000'001, 1, 60 * kSecond);
  REQUIRE(next->wait(5 * kSecond));
  CHECK(next->failure().reason == Reason::kWriterFailed);
  CHECK(other.peer->connected());
}

TEST_CASE("one counter poisoned again and again is one") {
  Bench bench;
  const size_t said =
      bench.liar.say_often(RecordType::kPoison, 50'000, [](size_t) { return bytes_of(uint32_t{7}, 20); });
  CHECK(said == 50'000);
  CHECK(bench.liar.peer->connected());
}

TEST_CASE("revokes whose answers nobody acknowledges end the connection") {
  Bench bench;
  const size_t said =
      bench.liar.say_often(RecordType::kRevoke, 400'000, [](size_t n) { return bytes_of(uint64_t{n}, 16); });
  CHECK(said < 80'000);
  CHECK(bench.liar.cut_off_because_it("asks, and acknowledges no answer"));
  CHECK(bench.liar.peer->unacked.empty());
}

TEST_CASE("a message longer than a NIC carries arrives whole, and nothing waits behind it") {
  for (const uint32_t longest : {64u, 300u, 4096u, 61440u}) {
    CAPTURE(longest);
    SimulatedSettings settings;
    settings.max_message_bytes = longest;
    settings.message_loss_rate = 0.02;
    settings.seed = longest;
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 2, 20 * kSecond), b(fabric.name, "b", 1, 20 * kSecond);
    const auto [to_b, to_a] = join(a, b);
    std::mt19937_64 random(longest);
    std::vector<std::vector<std::byte>> messages;
    for (const size_t size : {size_t{8}, kMaxMessageBytes, size_t{0}, size_t{longest}, kMaxMessageBytes - 1}) {
      messages.push_back(random_bytes(size, random));
    }
    std::vector<std::shared_ptr<SendOperation>> sends;
    for (const auto& message : messages) {
      sends.push_back(std::make_shared<SendOperation>(a.engine, to_b, message));
      a.engine->submit(sends.back());
    }
    for (const auto& send : sends) {
      REQUIRE(send->wait(20 * kSecond));
      CHECK(send->state() == State::kDone);
    }
    std::vector<std::vector<std::byte>> arrived;
    for (auto& event : b.events.pop(0, SIZE_MAX)) {
      if (event.kind == Event::kMessage) arrived.push_back(std::move(event.data));
    }
    CHECK(arrived == messages);
  }
}

TEST_CASE("an honest sender stays within the window, whatever the size of its messages") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, 20 * kSecond), b(fabric.name, "b", 1, 20 * kSecond);
  const auto [to_b, to_a] = join(a, b);
  std::vector<std::shared_ptr<SendOperation>> sends;
  for (size_t i = 0; i < 70'000; ++i) {
    sends.push_back(std::make_shared<SendOperation>(a.engine, to_b, std::vector<std::byte>(i % 3)));
    a.engine->submit(sends.back());
  }
  size_t taken = 0;
  for (const int64_t end = now_ns() + 20 * kSecond; taken < sends.size() && now_ns() < end;) {
    uint64_t bytes = 0;
    for (const auto& event : b.events.pop(1'000'000, SIZE_MAX)) {
      if (event.kind != Event::kMessage) continue;
      bytes += event.data.size() + Peer::kMessageOverhead;
      ++taken;
    }
    if (bytes) b.engine->message_taken(*to_a, bytes);
  }
  CHECK(taken == sends.size());
  CHECK(to_a->connected());
  CHECK(sends.back()->wait(5 * kSecond));
}
