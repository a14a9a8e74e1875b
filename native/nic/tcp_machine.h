// One half of a tcp link without its socket: work requests in and completions out on one side, bytes on the other.
//
//   open --we refuse the peer--> refusing --that is said--> failed
//     \____ the peer refuses us, garbage, the connection breaks, close() ____/
//
// It does no input and output, knows no clock and never waits: whoever holds it asks for output() and tells what was
// sent, asks for room() and tells what was received. All that comes from the peer is checked here.
//
// Writes land in the order in which they were posted; what is not done at the end comes back unfinished, and
// immediates_landed() says exactly how far the peer had come. A refusal ends the link, as it does an RC queue pair.
//
// Where a side is a GPU's memory, bytes are sent from and received into blocks (tcp_gpu.h), and count as landed when
// they have been copied: settle() looks at how far the copies are (tcp_gpu_machine.cpp).
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "nic/nic.h"
#include "nic/tcp_gpu.h"
#include "nic/tcp_regions.h"
#include "nic/tcp_wire.h"

namespace railwire {

class TcpMachine {
 public:
  enum class State : uint8_t { kOpen, kRefusing, kFailed };

  // `gpu`: null where no memory is a GPU's. Outlives the machine.
  TcpMachine(const TcpRegions& regions, uint32_t depth, TcpGpu* gpu = nullptr);

  State state() const { return state_.load(std::memory_order_relaxed); }

  // ---- our work requests -------------------------------------------------------------------------------------------
  // Takes no more while kMostUnsent bytes wait, so that what is posted next does not wait for longer than they do.
  size_t post(std::span<const WorkRequest> batch);
  size_t outstanding() const { return posted_ - handed_; }
  // What output() would put into one frame, at most: is there enough for a whole one?
  bool fills_frame() const { return posted_ - next_ >= kTcpMostEntries || unsent_ >= kTcpLongestFrame / 2; }
  // hand_out() has something. What a GPU still copies cannot be taken back: it keeps what was given up.
  bool has_ended() const { return handed_ < done_ && (state() != State::kFailed || quiet()); }
  size_t hand_out(std::span<Completion> out, Link* link);
  uint64_t immediates_landed() const { return immediates_landed_; }
  uint64_t immediates_completed() const { return immediates_completed_; }
  bool worked() const { return worked_; }  // see Link
  // What is unfinished comes back: the first with this, all others flushed.
  void fail(Status status, int error);

  // ---- what goes out -----------------------------------------------------------------------------------------------
  bool has_output() const {
    return first_out_ < out_.size() || next_ < posted_ || !answers_.empty() || state() == State::kRefusing;
  }
  // The next bytes to send; empty: nothing. `landed_too`: a frame of its own tells what has landed, if no other does.
  std::span<iovec> output(bool landed_too);
  void sent(size_t bytes);
  uint64_t untold() const { return landed_ - told_; }  // work requests of the peer's that have landed

  // ---- what comes in -----------------------------------------------------------------------------------------------
  static constexpr size_t kMostPlaces = kTcpMostEntries + 1;
  // Where the next bytes go, in order: the destinations of what is known to come, and a buffer for what follows it.
  // Fills a prefix of `places`, which has at least kMostPlaces; returns how long it is. 0: there is no room before a
  // GPU's copies have gone on. received() or nothing_received() follows.
  size_t room(std::span<iovec> places);
  // So many bytes have been put there. Appends the immediates that have come with them.
  void received(size_t bytes, std::vector<uint32_t>& immediates);
  void nothing_received() {
    if (in_) in_->finish();
  }
  void region_gone(uint64_t rkey);
  bool stalled() const { return stalled_; }  // bytes wait for room on their way to a GPU: settle() takes them

  // ---- a GPU's copies ----------------------------------------------------------------------------------------------
  // Takes over what the GPU has done since. Appends the immediates of what has landed.
  void settle(std::vector<uint32_t>& immediates);
  bool waits_for_gpu() const {
    if (!gpu_ || state() == State::kFailed) return !quiet();
    return last_copy_ > gpu_->copied() || !landings_.empty() || !read_landings_.empty() || stalled_;
  }
  uint64_t last_copy() const { return last_copy_; }
  // No copy of this link is under way.
  bool quiet() const { return !gpu_ || last_copy_ <= gpu_->copied() || gpu_->failed(); }

  // ---- memory that is not there any more: unmapped, or of a file that was cut --------------------------------------
  // The first byte of output() cannot be read. A work request of ours fails, and the link with it: its bytes are
  // promised. Of an answer to the peer's read, the key that it reads by is returned, and the link is to be broken.
  std::optional<uint64_t> output_gone();
  // The first byte of room() cannot be written: what it belongs to is refused, or fails.
  void room_gone();

 private:
  static constexpr size_t kHeader = sizeof(TcpFrame) + kTcpMostEntries * sizeof(TcpEntry);
  static constexpr size_t kBuffer = 32 << 10;
  static constexpr uint64_t kMostUnsent = 64 << 20;
  static constexpr size_t kFewestSlots = 64;
  static constexpr uint32_t kLongFrame = 32 << 10;  // of payload
  static constexpr size_t kFewestAhead = 256;       // bytes that are read behind a long frame
  static constexpr size_t kMostAnswers = 16384;     // reads of the peer's that wait: more than any link is deep
  static constexpr size_t kMostLandings = 65536;    // more than any link is deep, in pieces of a frame's length
  static_assert(kBuffer >= kHeader);

  struct Slot {
    WorkRequest request;
    Status status = Status::kOk;
    int32_t error = 0;
    bool answered = false;  // a read whose bytes are all there
  };
  struct Answer {
    uint64_t rkey, offset, left;
    uint64_t staged;  // of what is left: bytes on their way out of a GPU
  };

  void grow();
  Slot& slot(uint64_t number) { return slots_[number & (slots_.size() - 1)]; }
  void fail_at(uint64_t number, Status status, int error);
  void garbage();

  // tcp_sending.cpp
  bool make_work();
  bool make_answer();
  void make_plain(TcpFrame::Type type, uint8_t flags);
  void begin_frame(size_t entries);
  void add_bytes(void* bytes, size_t length);
  void finish_frame(TcpFrame frame);

  // tcp_receiving.cpp
  bool begin(const TcpFrame& frame, const std::byte* entries);
  bool check_entries(const TcpFrame& frame, const std::byte* entries);
  bool heard_landed(uint64_t landed);
  void peer_refuses(const TcpFrame& frame);
  void take(size_t bytes, const std::byte* from, std::vector<uint32_t>& immediates);
  void finish_entries(std::vector<uint32_t>& immediates);
  void received_some(size_t bytes, std::vector<uint32_t>& immediates);
  void parse(std::vector<uint32_t>& immediates);
  void refuse(bool of_read);
  void read_answered(uint64_t copy);

  // tcp_gpu_machine.cpp
  void stage();
  void stage_answers();
  void add_staged(TcpGpuOut& staged, size_t length);
  void landed_later(const TcpEntry& entry);
  void fail_with_gpu();
  void drop_gpu();

  const TcpRegions& regions_;
  const uint32_t depth_;
  std::atomic<State> state_{State::kOpen};

  // Work requests by number: handed_ <= done_ <= heard_ <= next_ <= posted_.
  std::vector<Slot> slots_;  // a ring; as long as it has had to be
  uint64_t posted_ = 0, next_ = 0, heard_ = 0, done_ = 0, handed_ = 0;
  uint64_t next_offset_ = 0;    // bytes of next_ that are in frames already
  uint64_t unsent_ = 0;         // bytes of writes that are in no frame yet
  std::deque<uint64_t> reads_;  // sent and not answered
  uint64_t read_received_ = 0;  // bytes of the first of them
  uint64_t immediates_completed_ = 0;

  // The frame that is being sent.
  std::vector<std::byte> head_;
  std::vector<iovec> out_;
  size_t first_out_ = 0;
  uint64_t frame_first_ = 0;           // the work request of its first entry
  std::optional<uint64_t> answering_;  // by this key, if it answers a read
  bool answer_turn_ = false;
  bool refusal_made_ = false, refused_read_ = false;
  bool worked_ = false;

  // The peer's.
  uint64_t landed_ = 0, told_ = 0, immediates_landed_ = 0;
  std::deque<Answer> answers_;

  // The frame that is being received.
  std::unique_ptr<std::byte[]> buffer_;
  size_t buffered_ = 0;
  size_t offered_ = 0;  // by room(): bytes that go to their destinations
  TcpFrame frame_;
  uint32_t frame_left_ = 0;  // of its payload
  struct Piece {
    TcpEntry entry;
    std::byte* place = nullptr;
    bool gpu = false;
  };
  std::vector<Piece> pieces_;
  size_t piece_ = 0;        // the one that comes now
  uint32_t piece_got_ = 0;  // bytes of it
  size_t refused_at_ = 0;   // this piece may not land; pieces_.size(): all may
  bool frame_gpu_ = false;  // some of its payload goes to a GPU

  // What goes through a GPU's copies.
  struct Landing {  // the peer's work requests that are here and not counted yet, in order
    uint64_t copy;
    uint32_t immediate;
    bool tells, counts;
  };
  struct ReadLanding {
    uint64_t number, copy;
  };
  TcpGpu* const gpu_;
  std::unique_ptr<TcpGpuOut> work_out_, answers_out_;
  std::unique_ptr<TcpGpuIn> in_;
  uint64_t stage_next_ = 0, stage_offset_ = 0;  // how far our writes have been staged
  std::deque<Landing> landings_;
  std::deque<ReadLanding> read_landings_;
  uint64_t piece_copy_ = 0, read_copy_ = 0;  // the last copy of the piece, of the read, that comes now; 0: none
  uint64_t last_copy_ = 0;
  bool stalled_ = false;
};

}  // namespace railwire
