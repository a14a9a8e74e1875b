// Set-up and tear-down that take their time: while a NIC makes a link, connects it or takes one back, the engine serves
// everybody else.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "engines.h"

using namespace railwire;
using namespace railwire::testing;

namespace {

// Whoever comes waits while it is shut.
class Gate {
 public:
  void shut(bool is_shut) {
    std::lock_guard lock(mutex_);
    shut_ = is_shut;
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.wait(lock, [this] { return !shut_; });
    --waiting_;
  }
  int waiting() {
    std::lock_guard lock(mutex_);
    return waiting_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool shut_ = false;
  int waiting_ = 0;
};

struct Gates {
  Gate create, connect, destroy;
};

class GatedLink final : public Link {
 public:
  GatedLink(std::unique_ptr<Link> inner, Gates& gates) : inner_(std::move(inner)), gates_(gates) {}
  ~GatedLink() override { gates_.destroy.pass(); }
  std::vector<std::byte> address() const override { return inner_->address(); }
  void connect(std::span<const std::byte> remote) override {
    gates_.connect.pass();
    inner_->connect(remote);
  }
  size_t post(std::span<const WorkRequest> batch) override { return inner_->post(batch); }
  size_t outstanding() const override { return inner_->outstanding(); }
  bool broken() const override { return inner_->broken(); }
  void close() override { inner_->close(); }
  bool closed() const override { return inner_->closed(); }
  uint64_t immediates_landed() const override { return inner_->immediates_landed(); }
  uint64_t immediates_completed() const override { return inner_->immediates_completed(); }

 private:
  std::unique_ptr<Link> inner_;
  Gates& gates_;
};

class GatedNic final : public Nic {
 public:
  GatedNic(std::unique_ptr<Nic> inner, Gates& gates) : inner_(std::move(inner)), gates_(gates) {}
  const NicInfo& info() const override { return inner_->info(); }
  std::vector<std::byte> address() const override { return inner_->address(); }
  uint64_t resolve(std::span<const std::byte> address) override { return inner_->resolve(address); }
  void forget(uint64_t peer) override { inner_->forget(peer); }
  bool send(uint64_t peer, std::span<const std::byte> message, void* context) override {
    return inner_->send(peer, message, context);
  }
  Registration register_memory(const MemorySpec& memory) override { return inner_->register_memory(memory); }
  void deregister(Registration& registration) override { inner_->deregister(registration); }
  std::unique_ptr<Link> create_link() override {
    gates_.create.pass();
    return std::make_unique<GatedLink>(inner_->create_link(), gates_);
  }
  size_t poll(std::span<Completion> out) override { return inner_->poll(out); }
  int wait_fd() const override { return inner_->wait_fd(); }
  bool arm() override { return inner_->arm(); }
  void disarm() override { inner_->disarm(); }
  std::string describe(int32_t error) const override { return inner_->describe(error); }

 private:
  std::unique_ptr<Nic> inner_;
  Gates& gates_;
};

bool soon(auto&& condition) {
  for (const int64_t end = now_ns() + 20 * kSecond; now_ns() < end;) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

SimulatedSettings resumable() {
  SimulatedSettings settings;
  settings.resumable = true;
  return settings;
}

}  // namespace

TEST_CASE("set-up: while a new half of a link is made, connected or freed, other peers are written to") {
  // a is the initiator towards b, or the acceptor; only one of them connects on its own.
  for (const bool initiator : {true, false}) {
    for (Gate Gates::* which : {&Gates::create, &Gates::connect, &Gates::destroy}) {
      CAPTURE(initiator);
      CAPTURE(which == &Gates::create);
      CAPTURE(which == &Gates::connect);
      TestFabric fabric(resumable());
      Gates gates;
      TestEngine a(fabric.name, "a", 1, 60 * kSecond, true,
                   [&](std::unique_ptr<Nic> nic) { return std::make_unique<GatedNic>(std::move(nic), gates); });
      TestEngine b(fabric.name, "b", 1, 60 * kSecond), c(fabric.name, "c", 1, 60 * kSecond);
      const auto to_b = initiator ? join(a, b).first : join(b, a).second;
      const auto to_c = join(a, c).first;
      std::vector<std::byte> source(4096, std::byte{1}), at_b(4096), at_c(4096);
      const auto from = a.memory(source), into_b = b.memory(at_b), into_c = c.memory(at_c);
      const auto keys_b = b.keys(*into_b), keys_c = c.keys(*into_c);
      Gate& gate = gates.*which;
      gate.shut(true);
      fabric.fabric->break_links("b0");
      REQUIRE(soon([&] { return gate.waiting() > 0; }));
      for (int i = 0; i < 20; ++i) {
        const auto other = a.write(to_c, from, 0, keys_c, 0, source.size(), 7);
        REQUIRE(other->wait(10 * kSecond));
        CHECK(other->state() == State::kDone);
      }
      const auto to_follow = a.write(to_b, from, 0, keys_b, 0, source.size(), 7);
      if (which != &Gates::destroy) CHECK_FALSE(to_follow->wait(kSecond / 50));  // there is no link yet
      gate.shut(false);
      REQUIRE(to_follow->wait(20 * kSecond));
      INFO(to_follow->failure().message);
      CHECK(to_follow->state() == State::kDone);
    }
  }
}

TEST_CASE("set-up: an engine that is closed while a half is being made ends, and so do the peers of one") {
  for (Gate Gates::* which : {&Gates::create, &Gates::connect}) {
    for (const bool engine : {false, true}) {
      CAPTURE(which == &Gates::create);
      CAPTURE(engine);
      TestFabric fabric(resumable());
      Gates gates;
      TestEngine a(fabric.name, "a", 1, 60 * kSecond, true,
                   [&](std::unique_ptr<Nic> nic) { return std::make_unique<GatedNic>(std::move(nic), gates); });
      TestEngine b(fabric.name, "b", 1, 60 * kSecond);
      const auto to_b = join(a, b).first;
      std::vector<std::byte> source(4096), target(4096);
      const auto from = a.memory(source), into = b.memory(target);
      Gate& gate = gates.*which;
      gate.shut(true);
      fabric.fabric->break_links("b0");
      REQUIRE(soon([&] { return gate.waiting() > 0; }));
      const auto waits = a.write(to_b, from, 0, b.keys(*into), 0, source.size(), -1);
      if (engine) {
        std::thread opens([&] {
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
          gate.shut(false);
        });
        a.engine->close(0);
        opens.join();
      } else {
        const auto close = std::make_shared<CloseOperation>(a.engine, to_b, kSecond / 10);
        a.engine->submit(close);
        REQUIRE(soon([&] { return to_b->ended(); }));
        gate.shut(false);
        REQUIRE(close->wait(10 * kSecond));  // b cannot confirm over a link that is not there, or does
        CHECK(soon([&] { return a.engine->stats().peers.empty(); }));
      }
      REQUIRE(waits->wait(10 * kSecond));
      CHECK(waits->state() != State::kDone);
      for (const auto& link : to_b->links) CHECK_FALSE(link->link);
    }
  }
}
