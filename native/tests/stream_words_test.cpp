// Streams wait for the engine's words, and the engine for theirs.
#include "cuda/stream_words.h"

#include <doctest/doctest.h>

#include <chrono>
#include <thread>

#include "engines.h"
#include "gpu_memory.h"

using namespace railwire;
using namespace railwire::cuda;

namespace {

struct TestStream {
  explicit TestStream(const std::shared_ptr<Device>& device) : device(device) {
    const Device::Current current(*device);
    driver().check(driver().stream_create(&stream, kStreamNonBlocking, 0), "stream");
  }
  ~TestStream() {
    const Device::Current current(*device);
    driver().stream_destroy(stream);
  }
  bool idle() {
    const Device::Current current(*device);
    return driver().stream_query(stream) == kSuccess;
  }
  std::shared_ptr<Device> device;
  Stream stream = nullptr;
};

template <class Condition>
bool settle(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition() && std::chrono::steady_clock::now() < end)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return condition();
}

}  // namespace

TEST_CASE("stream words: a stream stands until its word is raised, and words are used again") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  const auto words = StreamWords::of(0);
  for (int round = 0; round < 3; ++round) {
    TestStream stream(device);
    auto word = words->wait_in(stream.stream);
    auto after = words->mark_in(stream.stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!stream.idle());
    CHECK(!after->reached());
    word->raise();
    CHECK(settle([&] { return stream.idle() && after->reached(); }));
    word.reset();
    after.reset();
    CHECK(words->in_use() == 0);
  }
}

TEST_CASE("stream words: one that a stream has yet to raise is not given out again") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  const auto words = StreamWords::of(0);
  TestStream stream(device);
  auto gate = words->wait_in(stream.stream);
  words->mark_in(stream.stream).reset();  // nobody is interested any more
  CHECK(words->in_use() == 2);
  auto other = words->wait_in(stream.stream);
  CHECK(words->in_use() == 3);
  gate->raise();
  other->raise();
  CHECK(settle([&] { return stream.idle(); }));
  gate.reset();
  other.reset();
  TestStream next(device);
  auto last = words->wait_in(next.stream);  // takes back what has been reached meanwhile
  CHECK(words->in_use() == 1);
  last->raise();
}

TEST_CASE("stream words: events wait behind no other event") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  const auto words = StreamWords::of(0);
  TestStream slow(device), fast(device);
  cuda::Event slow_event = nullptr, fast_event = nullptr;
  auto gate = words->wait_in(slow.stream);
  {
    const Device::Current current(*device);
    driver().check(driver().event_create(&slow_event, kEventDisableTiming), "event");
    driver().check(driver().event_create(&fast_event, kEventDisableTiming), "event");
    driver().check(driver().event_record(slow_event, slow.stream), "record");
    driver().check(driver().event_record(fast_event, fast.stream), "record");
  }
  const auto late = words->mark_after(slow_event);
  const auto soon = words->mark_after(fast_event);
  CHECK(settle([&] { return soon->reached(); }));
  CHECK(!late->reached());
  gate->raise();
  CHECK(settle([&] { return late->reached(); }));
}

TEST_CASE("stream words: an expectation lets its stream go, reached or failed") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  const auto words = StreamWords::of(0);
  testing::TestFabric fabric;
  testing::TestEngine engine(fabric.name, "a", 1);
  for (const bool cancelled : {false, true}) {
    auto expectation =
        std::make_shared<Expectation>(engine.engine, 7u, uint64_t{16}, std::vector<uint64_t>{}, int64_t{50'000'000});
    engine.engine->submit(expectation);
    TestStream one(device), two(device);
    expectation->raise_at_end(words->wait_in(one.stream));
    expectation->raise_at_end(words->wait_in(two.stream));
    CHECK(!one.idle());
    if (cancelled) expectation->cancel();
    CHECK(settle([&] { return expectation->done(); }));  // its time is over, if it has not been cancelled
    CHECK(settle([&] { return one.idle() && two.idle(); }));
    TestStream late(device);
    expectation->raise_at_end(words->wait_in(late.stream));  // it has ended already
    CHECK(settle([&] { return late.idle(); }));
  }
}
