// The parts of the binding module and what they share.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "engine/engine.h"

namespace railwire {

// What Python holds: closing it (or dropping it) ends the engine's threads before the engine itself goes.
struct EngineHandle {
  std::shared_ptr<Engine> engine;
  ~EngineHandle() {
    if (!engine) return;
    nanobind::gil_scoped_release release;
    engine->close(0);
    engine.reset();
  }
};

EventQueue& dispatcher_events();
EventQueue& handshake_events();

// IndexError unless bytes offset .. offset + length lie in `size`.
void check_range(const char* what, uint64_t offset, uint64_t length, uint64_t size);
// A peer's memory over this connection, imported at first use; ValueError if it is to be written and may not be.
std::shared_ptr<const RemoteAccess> reach(EngineHandle& self, const std::shared_ptr<Peer>& peer, RemoteKeys& remote,
                                          bool write);

void bind_operations(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_submissions(nanobind::module_& m);
void bind_prepared(nanobind::module_& m);
void bind_regions(nanobind::module_& m);
void bind_gpu(nanobind::module_& m);
void bind_nics(nanobind::module_& m);
void bind_simulated(nanobind::module_& m);

}  // namespace railwire
