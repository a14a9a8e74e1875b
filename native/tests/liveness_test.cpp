// Silence: when a peer is lost by it, and when not.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "engine/process.h"
#include "engines.h"
#include "far_end.h"

using namespace railwire;
using namespace railwire::testing;

TEST_CASE("liveness: a peer that dies while this process is stopped is lost no later than any other") {
  constexpr int64_t kLiveness = kSecond / 2, kStop = 3 * kSecond;
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, kLiveness, false), b(fabric.name, "b", 1, 5 * kSecond);
  const auto to_b = join(a, b).first;
  const auto drive_for = [&](int64_t ns) { a.expect(1, 1, 60 * kSecond)->wait(ns); };
  drive_for(kSecond / 10);
  std::this_thread::sleep_for(std::chrono::nanoseconds(kStop));
  fabric.fabric->hold(true);  // what b has said before lies in a's queue; nothing follows, and no error tells of it
  const int64_t begin = now_ns();
  drive_for(kLiveness / 4);
  CHECK(to_b->connected());  // the silence so far was our own
  while (!to_b->ended() && now_ns() < begin + 5 * kSecond) drive_for(kSecond / 50);
  CHECK(to_b->ended());
  CHECK(now_ns() - begin < kLiveness + kStop / 2);  // and not by all of kStop later
  fabric.fabric->hold(false);
}

TEST_CASE(
    "liveness: a port that sends no datagrams for a moment costs no peer; a process that refuses messages is gone") {
  for (const bool datagrams : {true, false}) {
    CAPTURE(datagrams);
    SimulatedSettings settings;
    settings.datagrams = datagrams;
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 1, 4 * kSecond), b(fabric.name, "b", 1, 4 * kSecond);
    const auto to_b = join(a, b).first;
    settings.message_loss_rate = 1;
    fabric.fabric->configure(settings);
    for (const int64_t end = now_ns() + 2 * kSecond; to_b->connected() && now_ns() < end;) std::this_thread::yield();
    CHECK(to_b->connected() == datagrams);
    if (!datagrams) continue;
    settings.message_loss_rate = 0;
    fabric.fabric->configure(settings);
    for (const int64_t end = now_ns() + 3 * kSecond; to_b->connected() && now_ns() < end;) std::this_thread::yield();
    CHECK(to_b->connected());
    settings.message_loss_rate = 1;  // for good
    fabric.fabric->configure(settings);
    for (const int64_t end = now_ns() + 10 * kSecond; !to_b->ended() && now_ns() < end;) std::this_thread::yield();
    CHECK(to_b->ended());
    CHECK(a.engine->peer_failure(*to_b).message.find("has not been heard") != std::string::npos);
  }
}

TEST_CASE("liveness: a peer that answers, and acknowledges nothing, is lost, and what waits for it fails") {
  TestFabric fabric;
  TestEngine a(fabric.name, "a", 1, kSecond / 2);
  FarEnd far(fabric, a, 1);
  far.acknowledges = false;
  const int64_t begin = now_ns();
  const auto send = std::make_shared<SendOperation>(a.engine, far.peer, std::vector<std::byte>(10));
  a.engine->submit(send);
  const auto close = std::make_shared<CloseOperation>(a.engine, far.peer, 60 * kSecond);
  a.engine->submit(close);
  REQUIRE(send->wait(10 * kSecond));
  CHECK(now_ns() - begin >= 4 * (kSecond / 2));  // it was heard all the while
  CHECK(send->state() == State::kFailed);
  CHECK(send->failure().reason == Reason::kPeerLost);
  CHECK(send->failure().message.find("acknowledges nothing") != std::string::npos);
  CHECK(far.peer->state.load() == PeerState::kLost);
  CHECK(close->wait(kSecond));
}

TEST_CASE("liveness: a peer that does not confirm the end of a link is lost, and no transfer waits for it for ever") {
  for (const bool resumable : {false, true}) {
    CAPTURE(resumable);
    SimulatedSettings settings;
    settings.resumable = resumable;
    TestFabric fabric(settings);
    TestEngine a(fabric.name, "a", 2, kSecond / 2);
    FarEnd far(fabric, a, 2);
    fabric.fabric->freeze("far0", true);  // what is written stays under way
    fabric.fabric->freeze("far1", true);
    std::vector<std::byte> source(1 << 20), target(source.size());
    const auto from = a.memory(source);
    const auto write = a.write(far.peer, from, 0, far.lend(target), 0, source.size(), -1);
    fabric.fabric->break_links("far0");
    fabric.fabric->freeze("far0", false);
    fabric.fabric->freeze("far1", false);
    const int64_t begin = now_ns();
    REQUIRE(write->wait(20 * kSecond));
    CHECK(write->state() == State::kFailed);
    CAPTURE(write->failure().message);
    // The write may end before the other side has been told of the link.
    const int64_t patience = now_ns() + 10 * kSecond;
    while (far.links_reported_down == 0 && now_ns() < patience) std::this_thread::yield();
    REQUIRE(far.links_reported_down > 0);
    for (const int64_t end = now_ns() + 10 * kSecond; !far.peer->ended() && now_ns() < end;) std::this_thread::yield();
    CHECK(far.peer->state.load() == PeerState::kLost);
    CHECK(a.engine->peer_failure(*far.peer).message.find("does not confirm the end") != std::string::npos);
    CHECK(now_ns() - begin < 15 * kSecond);
  }
}

TEST_CASE("liveness: a process of which there is no descriptor is looked for by its number, and its end is a fence") {
  SimulatedSettings settings;
  settings.closing_fences = settings.closing_quiets = false;
  TestFabric fabric(settings);
  TestEngine a(fabric.name, "a", 1, 60 * kSecond, false);  // nobody drives it but this thread
  std::vector<std::byte> bytes(4096);
  const auto region = a.memory(bytes);
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  FarEnd far(fabric, a, 1, "far", false);
  a.engine->watch_process(*far.peer, child, process_start_ticks(child));
  REQUIRE(far.peer->pid == child);
  far.peer->forget_process();  // as if there had been none to be had
  kill(child, SIGKILL);
  for (const int64_t end = now_ns() + 10 * kSecond; !far.peer->ended() && now_ns() < end;) {
    a.expect(1, 1, 60 * kSecond)->wait(kSecond / 50);
  }
  CHECK(far.peer->ended());
  CHECK(a.engine->peer_failure(*far.peer).message.find("its process has ended") != std::string::npos);
  const auto revoke = std::make_shared<RevokeOperation>(a.engine, region, true, kSecond);
  a.engine->submit(revoke);
  REQUIRE(revoke->wait(5 * kSecond));
  CHECK(revoke->state() == State::kDone);
  waitpid(child, nullptr, 0);
}
