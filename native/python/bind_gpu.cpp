// What Python asks of the CUDA driver: whose memory an address is, and words on which streams and operations meet.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#include "cuda/sharing.h"
#include "cuda/stream_words.h"
#include "engine/operation.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {

void bind_gpu(nb::module_& m) {
  nb::exception<cuda::CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def(
      "gpu_driver",
      [] {
        std::string why;
        cuda::find_driver(&why);
        return why;
      },
      "Why there is no CUDA driver; empty: there is one.");
  m.def(
      "gpu_of", [](uintptr_t address) { return cuda::device_of(reinterpret_cast<const void*>(address)); }, "address"_a,
      "Ordinal of the GPU whose memory an address is, however it was allocated; -1: of none.");
  m.def("gpu_uuid", [](int ordinal) { return cuda::to_string(cuda::Device::open(ordinal)->uuid); }, "ordinal"_a);
  nb::class_<cuda::SharableMemory>(m, "GpuMemory", "Memory of a GPU that other processes can map.")
      .def(
          "__init__",
          [](cuda::SharableMemory* self, uint64_t bytes, int ordinal) {
            nb::gil_scoped_release release;
            new (self) cuda::SharableMemory(cuda::Device::open(ordinal), bytes);
          },
          "bytes"_a, "ordinal"_a)
      .def_prop_ro("address", &cuda::SharableMemory::address);
  m.def(
      "gpu_dmabuf",
      [](int ordinal, uintptr_t address, size_t bytes) {
        std::string why;
        const int fd = cuda::export_dmabuf(*cuda::Device::open(ordinal), address, bytes, &why);
        return std::make_pair(fd, why);
      },
      "ordinal"_a, "address"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
      "A dma-buf of whole pages, or (-1, why there is none).");
  m.def(
      "gpu_copy",
      [](int ordinal, uintptr_t to, uintptr_t from, size_t bytes) {
        cuda::copy_now(*cuda::Device::open(ordinal), to, from, bytes);
      },
      "ordinal"_a, "target"_a, "source"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Copies and waits. Either address may be host memory.");
  nb::class_<cuda::StreamWord>(m, "StreamWord", "Raised when a CUDA stream has come so far.")
      .def_prop_ro("reached", &cuda::StreamWord::reached);
  m.def(
      "mark_stream",
      [](int ordinal, uintptr_t stream) {
        return cuda::StreamWords::of(ordinal)->mark_in(reinterpret_cast<cuda::Stream>(stream));
      },
      "ordinal"_a, "stream"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Reached when the stream has done what it has been given before this.");
  m.def(
      "mark_event",
      [](int ordinal, uintptr_t event) {
        return cuda::StreamWords::of(ordinal)->mark_after(reinterpret_cast<cuda::Event>(event));
      },
      "ordinal"_a, "event"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "let_stream_wait",
      [](Operation& operation, int ordinal, uintptr_t stream) {
        operation.raise_at_end(cuda::StreamWords::of(ordinal)->wait_in(reinterpret_cast<cuda::Stream>(stream)));
      },
      "operation"_a, "ordinal"_a, "stream"_a, nb::call_guard<nb::gil_scoped_release>(),
      "What the stream is given after this runs when the operation has ended.");
}

}  // namespace railwire
