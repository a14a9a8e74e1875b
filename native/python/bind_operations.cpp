// Operations and the event queues that tell Python of their end.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "engine/clock.h"
#include "engine/fork.h"
#include "engine/operation.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

constexpr int64_t kSignalCheck = 50'000'000;  // ns between looks at Ctrl-C while a thread waits

// Waits without the GIL, in slices, so that a signal handler gets its turn.
bool wait(Operation& operation, double seconds) {
  if (operation.done()) return operation.wait(0);
  const int64_t deadline = seconds > 1e9 ? INT64_MAX : now_ns() + static_cast<int64_t>(seconds * 1e9);
  while (true) {
    const int64_t slice = std::min(deadline - now_ns(), kSignalCheck);
    bool done;
    {
      nb::gil_scoped_release release;
      done = operation.wait(std::max<int64_t>(slice, 0));
    }
    if (done) return true;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (now_ns() >= deadline) return false;
  }
}

const char* kind_name(Event::Kind kind) {
  switch (kind) {
    case Event::kFinished:
      return "finished";
    case Event::kMessage:
      return "message";
    case Event::kHandshake:
      return "handshake";
    case Event::kPeerUp:
      return "peer_up";
    case Event::kPeerLost:
      return "peer_lost";
    case Event::kUnreached:
      return "unreached";
    case Event::kWatcher:
      return "watcher";
    case Event::kAction:
      return "action";
    case Event::kRelease:
      return "release";
    case Event::kStop:
      return "stop";
  }
  return "unknown";
}

nb::list pop(EventQueue& queue, double seconds, size_t most) {
  std::vector<Event> events;
  {
    nb::gil_scoped_release release;
    events = queue.pop(static_cast<int64_t>(seconds * 1e9), most);
  }
  nb::list out;
  for (const Event& event : events) {
    out.append(nb::make_tuple(kind_name(event.kind), event.engine, event.a,
                              nb::bytes(reinterpret_cast<const char*>(event.data.data()), event.data.size())));
  }
  return out;
}

}  // namespace

// Never destroyed: native threads may still push while the interpreter goes down. A child of fork() gets others: the
// lock of the old ones may be held by a thread that it does not have.
static auto* dispatcher_queue = new EventQueue;
static auto* handshake_queue = new EventQueue;
EventQueue& dispatcher_events() { return *dispatcher_queue; }
EventQueue& handshake_events() { return *handshake_queue; }

void bind_operations(nb::module_& m) {
  nb::class_<Operation>(m, "Operation", "Something that ends once; the native half of railwire.Future.")
      .def_prop_ro(
          "state", [](const Operation& op) { return static_cast<uint32_t>(op.state()); },
          "0 pending, 1 done, 2 failed, 3 cancelled")
      .def("done", &Operation::poll)
      .def("wait", &wait, "seconds"_a, "Blocks without the GIL until the end or the time-out; True if it has ended.")
      .def("notify", &Operation::notify, "token"_a,
           "Asks for a 'finished' event with this token; False if it has already ended (no event then).")
      .def("cancel", &Operation::cancel, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("may_still_land", &Operation::may_still_land)
      .def(
          "failure",
          [](const Operation& op) {
            const Failure& failure = op.failure();
            return std::make_tuple(std::string(to_string(failure.reason)), failure.peer, failure.nic, failure.message);
          },
          "(reason, peer id, nic, message); valid once it has ended");

  m.def(
      "next_events", [](double seconds, size_t most) { return pop(dispatcher_events(), seconds, most); }, "seconds"_a,
      "most"_a, "Events for the dispatcher: (kind, engine tag, value, data).");
  m.def(
      "next_handshakes", [](double seconds, size_t most) { return pop(handshake_events(), seconds, most); },
      "seconds"_a, "most"_a, "Handshake frames, in the same form.");
  m.def(
      "push_finished", [](uint64_t token) { dispatcher_events().push({Event::kFinished, 0, token, {}}); }, "token"_a,
      "Puts a 'finished' event into the dispatcher's own queue.");
  m.attr("MAX_MESSAGE_BYTES") = kMaxMessageBytes;
  m.attr("MESSAGE_OVERHEAD") = Peer::kMessageOverhead;  // what a message counts beside its bytes
  m.def("before_fork", &before_fork, nb::call_guard<nb::gil_scoped_release>(), "For os.register_at_fork.");
  m.def("after_fork_in_parent", &after_fork_in_parent, nb::call_guard<nb::gil_scoped_release>());
  m.def("after_fork_in_child", [] {
    nb::set_leak_warnings(false);  // what the parent's threads held is never let go of here
    dispatcher_queue = new EventQueue;
    handshake_queue = new EventQueue;
    after_fork_in_child();
  });
  m.def("stop_events", [] {
    dispatcher_events().push({Event::kStop, 0, 0, {}});
    handshake_events().push({Event::kStop, 0, 0, {}});
  });
}

}  // namespace railwire
