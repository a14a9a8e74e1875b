// The engine, its regions, peers and watchers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/address_space.h"
#include "nic/make_nic.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

std::vector<std::byte> to_vector(const nb::bytes& data) {
  const auto* p = reinterpret_cast<const std::byte*>(data.c_str());
  return {p, p + data.size()};
}
nb::bytes to_bytes(const std::vector<std::byte>& data) {
  return nb::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

std::shared_ptr<Engine> make_engine(const std::vector<std::string>& nics, bool spin, int cpu, double liveness,
                                    uint64_t tag, const std::map<std::string, std::string>& options) {
  nb::gil_scoped_release release;
  std::vector<std::unique_ptr<Nic>> made;
  for (const auto& spec : nics) made.push_back(make_nic(spec, options));
  EngineOptions engine_options{.spin = spin,
                               .cpu = cpu,
                               .liveness_ns = static_cast<int64_t>(liveness * 1e9),
                               .event_tag = tag,
                               .events = &dispatcher_events(),
                               .handshakes = &handshake_events()};
  auto engine = std::make_shared<Engine>(engine_options, std::move(made));
  engine->run();
  return engine;
}

nb::dict nic_info(const NicInfo& info) {
  nb::dict d;
  d["name"] = info.name;
  d["kind"] = info.kind;
  d["provider"] = info.provider;
  d["library"] = info.library;
  d["same_host_only"] = info.same_host_only;
  d["completion_proves_landing"] = info.completion_proves_landing;
  d["closing_fences"] = info.closing_fences;
  d["closing_quiets"] = info.closing_quiets;
  d["takes_all_memory"] = info.takes_all_memory;
  d["links_per_pair"] = info.links_per_pair;
  d["max_write_bytes"] = info.max_write_bytes;
  d["link_depth"] = info.link_depth;
  d["max_message_bytes"] = info.max_message_bytes;
  d["link_gbps"] = info.link_gbps;
  d["warning"] = info.warning;
  return d;
}

nb::dict stats(EngineHandle& self) {
  Engine::Stats s;
  {
    nb::gil_scoped_release release;
    s = self.engine->stats();
  }
  nb::list nics;
  for (const auto& nic : s.nics) {
    nb::dict d;
    d["bytes_written"] = nic.bytes_written;
    d["bytes_read"] = nic.bytes_read;
    d["work_requests"] = nic.work_requests;
    d["completions"] = nic.completions;
    d["errors"] = nic.errors;
    d["immediates"] = nic.immediates;
    d["messages"] = nic.messages;
    nics.append(d);
  }
  nb::list peers;
  for (const auto& [peer, counts] : s.peers) {
    nb::dict d;
    d["id"] = peer->id;
    d["bytes_written"] = counts.bytes_written;
    d["bytes_read"] = counts.bytes_read;
    d["work_requests"] = counts.work_requests;
    d["errors"] = counts.errors;
    d["messages_sent"] = counts.messages_sent;
    d["messages_received"] = counts.messages_received;
    d["retransmissions"] = counts.retransmissions;
    d["links_rebuilt"] = counts.links_rebuilt;
    d["work_requests_resent"] = counts.work_requests_resent;
    peers.append(d);
  }
  nb::dict out;
  out["nics"] = nics;
  out["peers"] = peers;
  out["submitted"] = s.submitted;
  out["done"] = s.done;
  out["failed"] = s.failed;
  out["cancelled"] = s.cancelled;
  out["active"] = s.active;
  out["units"] = s.units;
  out["pending_expectations"] = s.pending_expectations;
  out["bad_frames"] = s.bad_frames;
  out["loops"] = s.loops;
  out["sleeps"] = s.sleeps;
  out["inline_drives"] = s.inline_drives;
  out["regions"] = s.regions;
  out["control_addresses"] = s.control_addresses;
  out["post_latency_ns"] = s.post_latency_ns;
  return out;
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::handle native_error = nb::exception<NicError>(m, "NativeError", PyExc_RuntimeError);
  nb::exception<BadKeys>(m, "BadKeysError", native_error.ptr());

  nb::class_<Region>(m, "Region", "Memory registered on every NIC of an engine.")
      .def_prop_ro("length", [](const Region& region) { return region.memory.length; })
      .def_prop_ro("address", [](const Region& region) { return reinterpret_cast<uintptr_t>(region.memory.address); })
      .def_prop_ro("closed", [](const Region& region) { return region.closed.load(); });

  nb::class_<RemoteKeys>(m, "RemoteKeys", "A peer's region, by the peer's NIC index.")
      .def(nb::new_([](uint64_t region_id, uint64_t length, const std::vector<nb::bytes>& keys, bool writable) {
             std::vector<std::vector<std::byte>> by_nic;
             for (const auto& blob : keys) by_nic.push_back(to_vector(blob));
             return std::make_shared<RemoteKeys>(region_id, length, std::move(by_nic), writable);
           }),
           "region_id"_a, "length"_a, "keys"_a, "writable"_a);

  nb::class_<Peer>(m, "Peer", "The other end of a connection.")
      .def_ro("id", &Peer::id)
      .def_ro("connection", &Peer::connection)
      .def_ro("initiator", &Peer::initiator)
      .def_ro("name", &Peer::name)
      .def_prop_ro(
          "state", [](const Peer& peer) { return static_cast<uint32_t>(peer.state.load()); },
          "0 connecting, 1 connected, 2 closing, 3 closed, 4 lost");

  nb::class_<Watcher>(m, "Watcher")
      .def_ro("id", &Watcher::id)
      .def_prop_ro("address", [](const Watcher& watcher) { return reinterpret_cast<uintptr_t>(watcher.word()); })
      .def("take", &Watcher::take, "(old, new) since the last call.")
      .def_prop_ro(
          "progress",
          [](const Watcher& watcher) {
            return watcher.action ? reinterpret_cast<uintptr_t>(watcher.action->progress()) : 0;
          },
          "Address of the page with the numbers of operations posted, ended and failed (words 0, 8, 16); 0: no action.")
      .def(
          "take_ended",
          [](Watcher& watcher) {
            std::vector<std::pair<uint64_t, std::shared_ptr<Transfer>>> out;
            if (!watcher.action) return out;
            for (auto& ended : watcher.action->take_ended()) out.emplace_back(ended.number, std::move(ended.transfer));
            return out;
          },
          "(number, transfer) of operations that have ended since the last call.");

  nb::class_<EngineHandle>(m, "Engine", "Owns NICs and everything that moves over them.")
      .def(
          "__init__",
          [](EngineHandle* self, const std::vector<std::string>& nics, bool spin, int cpu, double liveness,
             uint64_t tag, const std::map<std::string, std::string>& options) {
            new (self) EngineHandle{make_engine(nics, spin, cpu, liveness, tag, options)};
          },
          "nics"_a, "spin"_a, "cpu"_a, "liveness"_a, "tag"_a, "options"_a)
      .def("nic_infos",
           [](EngineHandle& self) {
             nb::list out;
             for (const auto& nic : self.engine->nics()) out.append(nic_info(nic->info()));
             return out;
           })
      .def("nic_addresses",
           [](EngineHandle& self) {
             nb::list out;
             for (const auto& nic : self.engine->nics()) out.append(to_bytes(nic->address()));
             return out;
           })
      .def(
          "register",
          [](EngineHandle& self, uintptr_t address, uint64_t length, int dmabuf_fd, uint64_t dmabuf_offset, int device,
             bool writable, uint64_t owner, int shared_fd) {
            nb::gil_scoped_release release;
            if (device < 0) {
              const AddressRange range{address, length};
              const std::string why = refuse_ranges({&range, 1}, writable);
              if (!why.empty()) throw nb::value_error(why.c_str());
            }
            return self.engine->register_memory({.address = reinterpret_cast<void*>(address),
                                                 .length = length,
                                                 .dmabuf_fd = dmabuf_fd,
                                                 .dmabuf_offset = dmabuf_offset,
                                                 .device = device,
                                                 .writable = writable,
                                                 .shared_fd = shared_fd},
                                                owner);
          },
          "address"_a, "length"_a, "dmabuf_fd"_a, "dmabuf_offset"_a, "device"_a, "writable"_a, "owner"_a,
          "shared_fd"_a = -1,
          "`shared_fd` >= 0: a memfd that begins with this memory, and that peers may map. `owner` comes back in a "
          "'release' event once nothing native uses the memory any more.")
      .def(
          "region_keys",
          [](EngineHandle& self, const Region& region) {
            uint64_t id;
            std::vector<std::vector<std::byte>> blobs;
            {
              nb::gil_scoped_release release;
              blobs = self.engine->region_keys(region, &id);
            }
            nb::typed<nb::list, nb::bytes> keys;
            for (const auto& blob : blobs) keys.append(to_bytes(blob));
            return std::make_pair(id, keys);
          },
          "region"_a, "(region id, [blob for peers, by NIC; empty where it is not registered])")
      .def(
          "create_peer",
          [](EngineHandle& self, uint64_t connection, bool initiator, std::string name,
             const std::vector<std::tuple<uint32_t, uint32_t, nb::bytes>>& pairs) {
            std::vector<LinkPlan> plan;
            for (const auto& [local, remote, control] : pairs) plan.push_back({local, remote, to_vector(control)});
            nb::gil_scoped_release release;
            return self.engine->create_peer(connection, initiator, std::move(name), plan);
          },
          "connection"_a, "initiator"_a, "name"_a, "pairs"_a)
      .def(
          "link_halves",
          [](EngineHandle& self, Peer& peer) {
            std::vector<Engine::LinkHalf> halves;
            {
              nb::gil_scoped_release release;
              halves = self.engine->link_halves(peer);
            }
            nb::list out;
            for (const auto& half : halves) {
              out.append(nb::make_tuple(to_bytes(half.address), to_bytes(half.pad)));
            }
            return out;
          },
          "peer"_a)
      .def(
          "activate_peer",
          [](EngineHandle& self, Peer& peer, const std::vector<std::pair<nb::bytes, nb::bytes>>& remote, int64_t pid,
             uint64_t pid_start_ticks) {
            std::vector<Engine::LinkHalf> halves;
            for (const auto& [address, pad] : remote) halves.push_back({to_vector(address), to_vector(pad)});
            nb::gil_scoped_release release;
            self.engine->activate_peer(peer, halves, pid, pid_start_ticks);
          },
          "peer"_a, "remote"_a, "pid"_a, "pid_start_ticks"_a)
      .def(
          "watch_process",
          [](EngineHandle& self, Peer& peer, int64_t pid, uint64_t pid_start_ticks) {
            nb::gil_scoped_release release;
            self.engine->watch_process(peer, pid, pid_start_ticks);
          },
          "peer"_a, "pid"_a, "pid_start_ticks"_a, "The peer is this process of this host: its end is the peer's.")
      .def(
          "abandon_peer",
          [](EngineHandle& self, Peer& peer, const std::string& why) {
            nb::gil_scoped_release release;
            self.engine->abandon_peer(peer, why);
          },
          "peer"_a, "why"_a)
      .def(
          "send_handshake",
          [](EngineHandle& self, uint32_t nic, const nb::bytes& address, const nb::bytes& payload) {
            if (nic >= self.engine->nics().size()) throw NicError("the engine is closed");
            const auto to = to_vector(address), data = to_vector(payload);
            nb::gil_scoped_release release;
            return self.engine->send_handshake(nic, to, data);
          },
          "nic"_a, "address"_a, "payload"_a, "False: not taken, try again soon.")
      .def(
          "peer_rails",
          [](EngineHandle& self, Peer& peer) {
            std::vector<std::tuple<std::string, bool, uint32_t, uint32_t>> rails;
            nb::gil_scoped_release release;
            self.engine->peer_rails(peer, rails);
            return rails;
          },
          "peer"_a, "Its sets of rails, best first: (kind, usable, links, links that are up).")
      .def(
          "region_nics", [](EngineHandle&, const Region& region) { return region.nics; }, "region"_a,
          "A bit for each NIC that it is registered with.")
      .def(
          "peer_failure",
          [](EngineHandle& self, Peer& peer) {
            Failure failure;
            {
              nb::gil_scoped_release release;
              failure = self.engine->peer_failure(peer);
            }
            return std::make_tuple(std::string(to_string(failure.reason)), failure.peer, failure.nic, failure.message);
          },
          "peer"_a)
      .def(
          "watch",
          [](EngineHandle& self, std::shared_ptr<PreparedScatter> plan, bool tell_all) {
            return self.engine->watch(std::move(plan), tell_all);
          },
          "plan"_a = nb::none(), "tell_all"_a = false, nb::call_guard<nb::gil_scoped_release>(),
          "A word; with a plan, the driver posts it whenever the word moves.")
      .def(
          "unwatch", [](EngineHandle& self, Watcher& watcher) { self.engine->unwatch(watcher); }, "watcher"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "counter_units", [](EngineHandle& self, uint32_t id) { return self.engine->counter_units(id); }, "id"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "find_unused_ids",
          [](EngineHandle& self, uint32_t first, uint32_t count) { return self.engine->find_unused_ids(first, count); },
          "first"_a, "count"_a, nb::call_guard<nb::gil_scoped_release>(),
          "The first of `count` consecutive ids, at or after `first`, whose counters are unused; None: there are none.")
      .def(
          "reset_counter", [](EngineHandle& self, uint32_t id) { self.engine->reset_counter(id); }, "id"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "message_taken",
          [](EngineHandle& self, Peer& peer, uint64_t bytes) { self.engine->message_taken(peer, bytes); }, "peer"_a,
          "bytes"_a, nb::call_guard<nb::gil_scoped_release>(), "The user has taken so much of this peer's messages.")
      .def("stats", &stats)
      .def(
          "close", [](EngineHandle& self, double seconds) { self.engine->close(static_cast<int64_t>(seconds * 1e9)); },
          "seconds"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("closed", [](EngineHandle& self) { return self.engine->closed(); });
}

}  // namespace railwire
