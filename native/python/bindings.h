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

void bind_operations(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_submissions(nanobind::module_& m);
void bind_gpu(nanobind::module_& m);
void bind_nics(nanobind::module_& m);
void bind_simulated(nanobind::module_& m);

}  // namespace railwire
