// Many regions in one call, and what peers need of them by columns.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/address_space.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

using Words = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct RegionSet {
  std::vector<std::shared_ptr<Region>> regions;
};

// Fills in where plain host memory lies; returns the numbers of all others.
std::vector<size_t> plain_buffers(const nb::list& buffers, bool readable_only, Words addresses, Words lengths) {
  std::vector<size_t> others;
  const size_t count = buffers.size();
  if (addresses.shape(0) != count || lengths.shape(0) != count) throw nb::value_error("arrays of another length");
  for (size_t i = 0; i < count; ++i) {
    PyObject* buffer = nb::handle(buffers[i]).ptr();
    Py_buffer view;
    if (!PyObject_CheckBuffer(buffer) ||
        PyObject_GetBuffer(buffer, &view, readable_only ? PyBUF_SIMPLE : PyBUF_WRITABLE) != 0) {
      PyErr_Clear();
      others.push_back(i);
      continue;
    }
    addresses.data()[i] = reinterpret_cast<uintptr_t>(view.buf);
    lengths.data()[i] = static_cast<uint64_t>(view.len);
    PyBuffer_Release(&view);
  }
  return others;
}

RegionSet register_many(EngineHandle& self, const Words& addresses, const Words& lengths, const Words& ids,
                        std::unordered_map<size_t, std::shared_ptr<Region>> made, bool writable, uint64_t owner) {
  const size_t count = addresses.shape(0);
  if (lengths.shape(0) != count || ids.shape(0) != count) throw nb::value_error("arrays of another length");
  nb::gil_scoped_release release;
  std::vector<AddressRange> ranges;
  std::vector<uint64_t> range_ids;
  for (size_t i = 0; i < count; ++i) {
    if (made.contains(i)) continue;
    ranges.push_back({addresses.data()[i], lengths.data()[i]});
    range_ids.push_back(ids.data()[i]);
  }
  const std::string why = refuse_ranges(ranges, writable);
  if (!why.empty()) throw nb::value_error(why.c_str());
  RegionSet set;
  auto registered = self.engine->register_many(ranges, range_ids, writable, owner);
  set.regions.reserve(count);
  for (size_t i = 0, next = 0; i < count; ++i) {
    const auto known = made.find(i);
    set.regions.push_back(known == made.end() ? std::move(registered[next++]) : std::move(known->second));
  }
  return set;
}

nb::bytes words(const std::vector<uint64_t>& values) {
  return nb::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(uint64_t));
}

}  // namespace

void bind_regions(nb::module_& m) {
  nb::class_<RegionSet>(m, "RegionSet", "Regions that were registered together.")
      .def("__len__", [](const RegionSet& set) { return set.regions.size(); })
      .def(
          "at", [](const RegionSet& set, size_t index) { return set.regions.at(index); }, "index"_a)
      .def(
          "table",
          [](const RegionSet& set, EngineHandle& engine) {
            Engine::RegionColumns columns;
            {
              nb::gil_scoped_release release;
              columns = engine.engine->region_columns(set.regions);
            }
            nb::list keys;
            for (const auto& nic : columns.keys)
              keys.append(nb::make_tuple(words(nic.lengths), nb::bytes(nic.data.data(), nic.data.size())));
            return nb::make_tuple(words(columns.ids), words(columns.lengths), keys);
          },
          "engine"_a, "(ids, lengths, [(lengths of keys, keys) by NIC]): bytes of 64-bit words, and of keys.");
  m.def("plain_buffers", &plain_buffers, "buffers"_a, "readable_only"_a, "addresses"_a, "lengths"_a,
        "Fills in where plain host memory lies; returns the numbers of all other buffers.");
  m.def("register_many", &register_many, "engine"_a, "addresses"_a, "lengths"_a, "ids"_a, "made"_a, "writable"_a,
        "owner"_a,
        "`made`: regions that have been registered already, by their number. `owner` comes back as for register().");
}

}  // namespace railwire
