// The simulated fabric, for railwire.testing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "nic/simulated_fabric.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

struct FabricHandle {
  std::string name;
  std::shared_ptr<SimulatedFabric> fabric;
};

Status status_named(const std::string& name) {
  if (name == "remote_access") return Status::kRemoteAccess;
  if (name == "unreachable") return Status::kUnreachable;
  if (name == "local") return Status::kLocal;
  if (name == "other") return Status::kOther;
  throw nb::value_error(("no such status: " + name).c_str());
}

}  // namespace

void bind_simulated(nb::module_& m) {
  nb::class_<SimulatedSettings>(m, "SimulatedSettings")
      .def(nb::init<>())
      .def_rw("seed", &SimulatedSettings::seed)
      .def_rw("reorder", &SimulatedSettings::reorder)
      .def_rw("max_delay_us", &SimulatedSettings::max_delay_us)
      .def_rw("write_failure_rate", &SimulatedSettings::write_failure_rate)
      .def_rw("link_break_rate", &SimulatedSettings::link_break_rate)
      .def_rw("message_loss_rate", &SimulatedSettings::message_loss_rate)
      .def_rw("completion_proves_landing", &SimulatedSettings::completion_proves_landing)
      .def_rw("closing_fences", &SimulatedSettings::closing_fences)
      .def_rw("closing_quiets", &SimulatedSettings::closing_quiets)
      .def_rw("kind", &SimulatedSettings::kind)
      .def_rw("refuse_above", &SimulatedSettings::refuse_above)
      .def_rw("links_per_pair", &SimulatedSettings::links_per_pair)
      .def_rw("resumable", &SimulatedSettings::resumable)
      .def_rw("discard", &SimulatedSettings::discard)
      .def_rw("max_write_bytes", &SimulatedSettings::max_write_bytes)
      .def_rw("link_depth", &SimulatedSettings::link_depth)
      .def_rw("max_message_bytes", &SimulatedSettings::max_message_bytes);

  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<FabricHandle>(m, "SimulatedFabric")
      .def(
          "__init__",
          [](FabricHandle* self, std::string name, const SimulatedSettings& settings) {
            auto fabric = SimulatedFabric::create(name, settings);
            new (self) FabricHandle{std::move(name), std::move(fabric)};
          },
          "name"_a, "settings"_a)
      .def("remove", [](FabricHandle& self) { SimulatedFabric::remove(self.name); })
      .def(
          "configure", [](FabricHandle& self, const SimulatedSettings& s) { self.fabric->configure(s); }, "settings"_a,
          nogil)
      .def(
          "kill", [](FabricHandle& self, const std::string& nic) { self.fabric->kill(nic); }, "nic"_a, nogil)
      .def(
          "break_links", [](FabricHandle& self, const std::string& nic) { self.fabric->break_links(nic); }, "nic"_a,
          nogil)
      .def(
          "freeze", [](FabricHandle& self, const std::string& nic, bool frozen) { self.fabric->freeze(nic, frozen); },
          "nic"_a, "frozen"_a, nogil)
      .def(
          "partition",
          [](FabricHandle& self, const std::string& a, const std::string& b, bool apart) {
            self.fabric->partition(a, b, apart);
          },
          "a"_a, "b"_a, "apart"_a, nogil)
      .def(
          "fail_next",
          [](FabricHandle& self, const std::string& nic, uint32_t count, const std::string& status) {
            self.fabric->fail_next(nic, count, status_named(status));
          },
          "nic"_a, "count"_a, "status"_a, nogil)
      .def(
          "hold", [](FabricHandle& self, bool held) { self.fabric->hold(held); }, "held"_a, nogil)
      .def(
          "deliver_one", [](FabricHandle& self) { return self.fabric->deliver_one(); }, nogil)
      .def("audit", [](FabricHandle& self) {
        const SimulatedAudit audit = self.fabric->audit();
        nb::typed<nb::dict, std::string, uint64_t> out;
        out["posted"] = audit.posted;
        out["landed"] = audit.landed;
        out["failed"] = audit.failed;
        out["messages"] = audit.messages;
        out["messages_lost"] = audit.messages_lost;
        out["refused_after_close"] = audit.refused_after_close;
        out["refused_access"] = audit.refused_access;
        out["dropped_in_flight"] = audit.dropped_in_flight;
        return out;
      });
}

}  // namespace railwire
