// Prepared scatters and the words that post them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/stream_words.h"
#include "engine/arrival_words.h"
#include "engine/prepared.h"
#include "engine/watched_words.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

// (peer, keys or None, offset, length) of a target's window
using Window = std::tuple<std::shared_ptr<Peer>, std::shared_ptr<RemoteKeys>, uint64_t, uint64_t>;

std::shared_ptr<PreparedScatter> prepare(EngineHandle& self, std::shared_ptr<Region> region, uint64_t offset,
                                         uint64_t length, const std::vector<Window>& windows, size_t depth) {
  if (region->closed.load()) throw NicError("the region is closed");
  check_range("source", offset, length, region->memory.length);
  std::vector<PreparedScatter::Target> targets;
  for (const auto& [peer, remote, start, bytes] : windows) {
    if (remote) {
      check_range("destination", start, bytes, remote->length);
      targets.push_back({peer, reach(self, peer, *remote, true), start, bytes});
    } else {
      targets.push_back({peer, nullptr, 0, 0});
    }
  }
  return std::make_shared<PreparedScatter>(self.engine, std::move(region), offset, length, std::move(targets), depth);
}

std::shared_ptr<Transfer> post(PreparedScatter& self, size_t slot, std::shared_ptr<cuda::StreamWord> after) {
  if (slot >= self.depth()) {
    throw nb::index_error(("slot " + std::to_string(slot) + " of a table of " + std::to_string(self.depth())).c_str());
  }
  nb::gil_scoped_release release;
  const auto engine = self.engine().lock();
  if (!engine) throw NicError("the engine is closed");
  if (self.region()->closed.load()) throw NicError("the region is closed");
  auto made = self.make(slot);
  if (!made.problem.empty()) throw nb::index_error(made.problem.c_str());
  made.transfer->after = std::move(after);
  made.transfer->submitted_ns = engine->submission_time();
  engine->submit(made.transfer);
  return std::move(made.transfer);
}

}  // namespace

void bind_prepared(nb::module_& m) {
  nb::class_<PreparedScatter>(m, "PreparedScatter", "A scatter that is posted again and again.")
      .def_prop_ro("targets", &PreparedScatter::targets)
      .def_prop_ro("depth", &PreparedScatter::depth)
      .def_prop_ro(
          "table", [](const PreparedScatter& self) { return reinterpret_cast<uintptr_t>(self.slot(0)); },
          "Address of `depth` slots of `targets` rows of four 64-bit words.")
      .def("post", &post, "slot"_a, "after"_a = nb::none());
  nb::class_<ArrivalWords>(m, "ArrivalWords", "Words that follow counters.")
      .def_prop_ro("address", [](const ArrivalWords& self) { return reinterpret_cast<uintptr_t>(self.words()); })
      .def("__len__", &ArrivalWords::size);
  m.def(
      "follow",
      [](EngineHandle& self, uint32_t first, std::vector<uint64_t> writers) {
        auto words = std::make_shared<ArrivalWords>(first, std::move(writers));
        if (!self.engine->follow(words)) throw NicError("one of these counters is followed already");
        return words;
      },
      "engine"_a, "first"_a, "writers"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Words with the arrivals of immediates `first` and following, each written by one peer.");
  m.def(
      "unfollow", [](EngineHandle& self, const ArrivalWords& words) { self.engine->unfollow(words); }, "engine"_a,
      "words"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("expect_gpu_words", &WatchedWords::expect_gpu, "A GPU writes to watched words of this process.");
  m.def("prepare_scatter", &prepare, "engine"_a, "region"_a, "offset"_a, "length"_a, "windows"_a, "depth"_a,
        "windows: (peer, keys or None, offset, length) of each target.");
}

}  // namespace railwire
