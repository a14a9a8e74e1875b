// The far end of a connection, worked by hand over simulated NICs: it answers what a test lets it answer, and does
// nothing else. For peers that are alive and do not do their part.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/frames.h"
#include "engines.h"

namespace railwire::testing {

class FarEnd {
 public:
  // With one link over each of `count` NICs, which go to those of the engine. It is the acceptor of the connection.
  FarEnd(const TestFabric& fabric, TestEngine& engine, size_t count, const std::string& name = "far",
         bool listens = true)
      : name(name) {
    static std::atomic<uint64_t> next{uint64_t{1} << 43};
    connection_ = next++;
    std::vector<LinkPlan> plan;
    for (size_t i = 0; i < count; ++i) {
      nics_.push_back(make_simulated_nic("sim://" + fabric.name + "/" + name + std::to_string(i)));
      links_.push_back(nics_.back()->create_link());
      const auto nic = static_cast<uint32_t>(i % engine.engine->nics().size());
      plan.push_back({nic, static_cast<uint32_t>(i), nics_.back()->address()});
      to_engine_.push_back(nics_.back()->resolve(engine.engine->nics()[nic]->address()));
    }
    peer = engine.engine->create_peer(connection_, true, name, plan);
    const auto halves = engine.engine->link_halves(*peer);
    std::vector<Engine::LinkHalf> own;
    for (size_t i = 0; i < count; ++i) {
      links_[i]->connect(halves.at(i).address);
      own.push_back({links_[i]->address(), plain_blob(0, 0)});
    }
    if (listens) thread_ = std::thread([this] { listen(); });
    engine.engine->activate_peer(*peer, own, 0, 0);
  }
  ~FarEnd() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
    for (auto& [nic, registration] : registrations_) nics_[nic]->deregister(registration);
  }
  // Memory of the far end, which it lends to the engine; goes with it.
  std::shared_ptr<RemoteKeys> lend(std::vector<std::byte>& memory) {
    std::vector<std::vector<std::byte>> blobs;
    for (size_t i = 0; i < nics_.size(); ++i) {
      auto made = nics_[i]->register_memory({.address = memory.data(), .length = memory.size(), .key_hint = i + 1});
      blobs.push_back(made.blob);
      registrations_.emplace_back(i, std::move(made));
    }
    return std::make_shared<RemoteKeys>(1, memory.size(), std::move(blobs));
  }
  const std::string name;
  std::shared_ptr<Peer> peer;  // as the engine sees it
  std::atomic<bool> answers_pings{true}, acknowledges{true};
  std::atomic<int> links_reported_down{0};

 private:
  void listen() {
    while (!stop_) {
      for (size_t i = 0; i < nics_.size(); ++i) {
        Completion out[16];
        const size_t n = nics_[i]->poll(out);
        for (size_t k = 0; k < n; ++k) {
          if (out[k].kind == Completion::kMessage) take(i, out[k].data);
        }
      }
      std::this_thread::yield();
    }
  }
  void take(size_t nic, std::span<const std::byte> data) {
    const auto frame = parse_frame(data);
    if (!frame) return;
    FrameHeader answer{.type = FrameType::kPong, .to_initiator = true, .connection = connection_};
    answer.link = static_cast<uint16_t>(nic);
    if (const auto record = frame->header.type == FrameType::kRecord ? parse_record(frame->payload) : std::nullopt) {
      links_reported_down += record->type == RecordType::kLinkDown && record->sequence > taken_;
      if (record->sequence == taken_ + 1) ++taken_;
      answer.type = FrameType::kAck;
      if (!acknowledges) return;
    } else if (frame->header.type != FrameType::kPing || !answers_pings) {
      return;
    }
    if (acknowledges) answer.ack = taken_;
    nics_[nic]->send(to_engine_[nic], FrameWriter(answer).put<uint64_t>(0).take(), nullptr);
  }

  std::vector<std::unique_ptr<Nic>> nics_;
  std::vector<std::unique_ptr<Link>> links_;
  std::vector<std::pair<size_t, Registration>> registrations_;
  std::vector<uint64_t> to_engine_;
  uint64_t connection_ = 0, taken_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace railwire::testing
