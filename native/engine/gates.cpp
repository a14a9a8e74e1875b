// Transfers whose source a CUDA stream has yet to write: they are held until the stream raises a word.
//
//   held --word raised--> started as any other
//     \____ cancelled, a peer of it lost or closed, the engine closing: started too, and stopped there at once ____/
//
// So there is one way in, and whatever ends a transfer ends a held one by the same code.
#include <algorithm>
#include <utility>

#include "cuda/stream_words.h"
#include "engine/engine.h"

namespace railwire {
namespace {

bool held_no_longer(const Transfer& transfer) {
  return transfer.after->reached() || transfer.cancelled ||
         std::any_of(transfer.lanes.begin(), transfer.lanes.end(),
                     [](const Lane& lane) { return !lane.peer->connected(); });
}

}  // namespace

// True: it is kept. False: it may start.
bool Engine::hold(std::shared_ptr<Transfer>& transfer) {
  if (held_no_longer(*transfer)) return false;
  held_.push_back(std::move(transfer));
  return true;
}

// Starts those that need not be held any more; true if there were any.
bool Engine::let_in() {
  std::vector<std::shared_ptr<Transfer>> ready;
  std::erase_if(held_, [&ready](std::shared_ptr<Transfer>& transfer) {
    if (!held_no_longer(*transfer)) return false;
    ready.push_back(std::move(transfer));
    return true;
  });
  for (auto& transfer : ready) {
    transfer->after.reset();
    start_transfer(std::move(transfer));
  }
  return !ready.empty();
}

}  // namespace railwire
