// What the native core tells Python: a queue that the driver fills without ever waiting and that a Python thread
// drains.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

namespace railwire {

struct Event {
  enum Kind : uint8_t {
    kFinished,   // a: token of Operation::notify
    kMessage,    // a: peer id; data: the message
    kHandshake,  // a: index of the NIC it came by; data: a handshake frame, to be answered by Python
    kPeerUp,     // a: peer id; before everything else of this peer
    kPeerLost,   // a: peer id; after everything else
    kUnreached,  // a: peer id; data: why some of its memory is not reached over a better kind of NIC
    kWatcher,    // a: watcher id; Watcher::take() has the values
    kAction,     // a: watcher id; WordAction::take_ended() has what has ended
    kRelease,    // a: owner token; nothing native uses the owner's memory any more
    kStop,       // ends the thread that drains the queue
  };
  Kind kind;
  uint64_t engine = 0;
  uint64_t a = 0;
  std::vector<std::byte> data;
};

class WatchedWords;

class EventQueue {
 public:
  EventQueue();
  ~EventQueue();
  void push(Event event);
  // Not if there are so many already; false then.
  bool push_if_room(Event event, size_t most);
  // Words whose movement is an event, too. After add() whoever drains the queue looks at them.
  WatchedWords& words() { return *words_; }
  void words_added();
  // Waits up to `timeout_ns` for at least one event; takes at most `most`.
  std::vector<Event> pop(int64_t timeout_ns, size_t most);

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Event> events_;
  std::unique_ptr<WatchedWords> words_;
};

}  // namespace railwire
