// The NIC named "shm": processes of one host, and engines of one process, through shared memory and Cross Memory
// Attach. Needs no library.
//
// The writer copies. Short writes, immediates and messages travel through rings that both processes map; long writes
// and all reads are copied by whoever posted them, straight from and into the other process's memory: with plain
// stores where that memory is a memfd which its owner has handed out (engine.allocate), with CMA otherwise.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "nic/nic.h"

namespace railwire {

// Throws NicError if this machine cannot do it.
std::unique_ptr<Nic> make_host_nic(const std::map<std::string, std::string>& options);

// Opens one and has it reach itself. Empty, or why there is no shm NIC on this machine.
std::string why_no_host_nic();

}  // namespace railwire
