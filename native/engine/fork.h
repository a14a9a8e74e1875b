// What becomes of engines when their process forks. The child gets a copy of their memory and none of their threads,
// and shares their sockets, doorbells and mapped memory with the parent: whatever it did with them, the parent's peers
// would see. So in the child an inherited engine is never driven, closed or destroyed again, and every call to it is
// refused; it is simply left lying there. Engines that the child makes are its own.
//
// Python calls these (os.register_at_fork); a fork() that Python does not see is one whose child runs no Python.
#pragma once

#include <cstdint>

namespace railwire {

class Engine;

// For Engine's constructor and destructor.
void note_engine(Engine& engine);
void forget_engine(Engine& engine);

// Holds every engine still, so that no thread is within a NIC's library when its memory is copied; for at most a
// second.
void before_fork();
void after_fork_in_parent();
void after_fork_in_child();

}  // namespace railwire
