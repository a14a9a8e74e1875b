// The way of work requests where a side is a GPU's memory, and the memory itself: registration, descriptors, imports.
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "nic/host_internal.h"

namespace railwire {
namespace {

constexpr size_t kMostPieces = 8192;    // of one batch
constexpr int kFetchPatience = 10'000;  // ms for a peer to hand out descriptors
constexpr size_t kMostChunks = 4096;
constexpr size_t kChunksAnAnswer = 64;

std::byte* plus(void* address, uint64_t offset) { return static_cast<std::byte*>(address) + offset; }

}  // namespace

void HostLink::choose_gpu_way(Work& work, bool remote_gpu, const RegionRange& range) {
  const WorkRequest& request = work.request;
  if (remote_gpu) {
    if (last_gpu_rkey_ != request.rkey || last_gpu_changes_ != nic_.gpu_.changes()) {
      last_gpu_changes_ = nic_.gpu_.changes();
      last_gpu_rkey_ = request.rkey;
      last_gpu_ = nic_.gpu_.mapped(request.rkey, peer_->name);
    }
    if (last_gpu_ == 0) {
      work.status = Status::kRemoteAccess;
      work.error = ENXIO;
      return;
    }
    work.gpu = last_gpu_ + (request.remote - range.base);
  }
  if (request.list) {
    if (!remote_gpu || !request.local_key || !list_allowed(request, range)) {
      work.status = Status::kRemoteAccess;
      work.error = EACCES;
      return;
    }
    work.pieces = request.list->pages * request.list->stretch_count;
  }
  work.way = remote_gpu && request.local_key ? Way::kGpu : Way::kBounce;
}

// Whether all pages lie within the peer's region.
bool HostLink::list_allowed(const WorkRequest& request, const RegionRange& range) const {
  const PageList& list = *request.list;
  const uint64_t room = range.length - (request.remote - range.base);
  uint64_t reach = 0;  // of a page, beyond where it begins
  for (uint32_t s = 0; s < list.stretch_count; ++s) {
    const PageList::Stretch& stretch = list.stretches[s];
    if (stretch.remote > room || stretch.length > room - stretch.remote) return false;
    reach = std::max(reach, stretch.remote + stretch.length);
  }
  const uint32_t last = *std::max_element(list.remote_pages, list.remote_pages + list.pages);
  uint64_t begin;
  return !__builtin_mul_overflow(uint64_t{last}, list.remote_stride, &begin) && begin <= room - reach;
}

// What the copier has not got yet of a work request. Neighbours that are contiguous on both sides become one piece.
void HostLink::add_pieces(const Work& work) {
  const WorkRequest& request = work.request;
  const auto local = reinterpret_cast<uint64_t>(request.local);
  const bool read = request.flags & WorkRequest::kRead;
  std::vector<cuda::Piece>& pieces = nic_.pieces_;
  std::vector<uint32_t>& entries = nic_.piece_entries_;
  const auto add = [&](uint64_t from, uint64_t to, uint64_t length) {
    pieces.push_back({read ? to : from, read ? from : to, length});
    entries.push_back(1);
  };
  if (!request.list) return add(local, work.gpu, request.length);
  const PageList& list = *request.list;
  const size_t first = pieces.size();
  for (uint32_t i = work.given; i < work.pieces; ++i) {
    const uint32_t page = list.stretch_count == 1 ? i : i / list.stretch_count;
    const PageList::Stretch& stretch = list.stretches[list.stretch_count == 1 ? 0 : i % list.stretch_count];
    const uint64_t from = local + list.local_pages[page] * list.local_stride + stretch.local;
    const uint64_t to = work.gpu + list.remote_pages[page] * list.remote_stride + stretch.remote;
    if (pieces.size() > first) {
      cuda::Piece& before = pieces.back();
      if (before.source + before.length == (read ? to : from) &&
          before.destination + before.length == (read ? from : to)) {
        before.length += stretch.length;
        ++entries.back();
        continue;
      }
    }
    add(from, to, stretch.length);
  }
}

// Gives the copier what can go in one batch. While it has enough to do, WRs gather here: many short ones then share a
// launch. False: nothing more can be started now.
bool HostLink::start_gpu() {
  HostGpu& gpu = nic_.gpu_;
  if (gpu.failed()) {
    at(next_).status = Status::kOther;
    at(next_).error = EREMOTEIO;
    return true;
  }
  gpu.finished();
  if (gpu.busy()) return false;
  if (out_.header().consumer_closed.load(std::memory_order_seq_cst)) {
    break_now(ECONNRESET);
    return false;
  }
  nic_.pieces_.clear();
  nic_.piece_entries_.clear();
  for (uint64_t i = next_; i != end_ && nic_.pieces_.size() < kMostPieces; ++i) {
    Work& work = at(i);
    if (work.way == Way::kUnknown && work.status == Status::kOk) choose_way(work);
    if (work.way != Way::kGpu || work.status != Status::kOk) break;
    add_pieces(work);
  }
  const size_t taken = gpu.copy(nic_.pieces_);
  for (size_t i = 0; i < taken; ++i) {
    Work& work = at(next_);
    work.batch = gpu.submitted();
    work.given += nic_.piece_entries_[i];
    if (work.given == work.pieces) ++next_;
  }
  if (taken) last_batch_ = gpu.submitted();
  return taken > 0 || gpu.failed();
}

// Whether the GPU has copied it (all batches up to `copied`), and its immediate is on its way.
bool HostLink::gpu_done(Work& work, uint64_t copied) {
  if (copied < work.batch) {
    if (!nic_.gpu_.failed()) return false;
    work.status = Status::kOther;
    work.error = EREMOTEIO;
    return true;
  }
  if (work.told || !(work.request.flags & WorkRequest::kImmediate)) return true;
  work.told = out_.add(RecordKind::kImmediate, 0, work.request.immediate) != nullptr;
  return work.told;
}

// One buffer full after the other: from the source to pinned memory and from there on. One of the two steps is the
// GPU's, which is waited for in later turns. True: a step has been made; false: not now.
bool HostLink::bounce(Work& work) {
  HostGpu& gpu = nic_.gpu_;
  const WorkRequest& request = work.request;
  const bool read = request.flags & WorkRequest::kRead;
  const bool source_gpu = read ? work.gpu != 0 : request.local_key != nullptr;
  const uint64_t length = std::min<uint64_t>(request.length - work.copied, HostGpu::kBounceBytes);
  const uint64_t on_gpu = (work.gpu ? work.gpu : reinterpret_cast<uint64_t>(request.local)) + work.copied;
  if (gpu.failed()) {
    work.status = Status::kOther;
    work.error = EREMOTEIO;
    return true;
  }
  if (work.batch) {
    if (gpu.finished() < work.batch) return false;
    if (source_gpu && !bounce_by_cpu(work, false, length)) return work.status != Status::kOk;
    work.copied += length;
    work.batch = 0;
    gpu.give_bounce(std::exchange(work.bounce, -1));
    return true;
  }
  if (work.bounce < 0) {
    work.bounce = gpu.take_bounce();
    if (work.bounce < 0) return false;
    if (!source_gpu && !bounce_by_cpu(work, true, length)) {
      gpu.give_bounce(std::exchange(work.bounce, -1));
      return work.status != Status::kOk;
    }
  }
  const uint64_t pinned = gpu.bounce_on_gpu(work.bounce);
  const cuda::Piece piece{source_gpu ? on_gpu : pinned, source_gpu ? pinned : on_gpu, length};
  if (gpu.copy({&piece, 1}) == 0) return false;
  work.batch = last_batch_ = gpu.submitted();
  return false;
}

// The other step. False: it did not work, and the WR's status says why, or the link has broken.
bool HostLink::bounce_by_cpu(Work& work, bool to_bounce, uint64_t length) {
  const WorkRequest& request = work.request;
  std::byte* pinned = nic_.gpu_.bounce(work.bounce);
  if (!request.local_key) {  // the host memory is ours
    std::byte* local = plus(request.local, work.copied);
    std::memcpy(to_bounce ? pinned : local, to_bounce ? local : pinned, length);
    return true;
  }
  CmaList& list = nic_.list_;
  for (uint64_t done = 0; done < length;) {
    list.clear();
    list.add(pinned + done, request.remote + work.copied + done, length - done);
    const int64_t moved = peer_lives() ? list.run(peer_->pid, to_bounce) : -ESRCH;
    if (moved <= 0) {
      if (moved == -EFAULT) {
        work.status = Status::kRemoteAccess;
        work.error = EFAULT;
      } else {
        break_now(static_cast<int32_t>(moved < 0 ? -moved : EIO));
      }
      return false;
    }
    done += static_cast<uint64_t>(moved);
  }
  return true;
}

// ---- imports
// -----------------------------------------------------------------------------------------------------------
RemoteMemory HostNic::import_memory(std::span<const std::byte> blob) {
  HostGpuBlob gpu;
  RemoteMemory memory;
  if (!decode_gpu_blob(blob, &gpu, &memory)) return parse_plain_blob(blob, "shm");
  HostToken name = gpu.owner;
  const bool same_process = name == name_ || gpu.pid == static_cast<uint64_t>(getpid());
  gpu_.map(memory.rkey, gpu, same_process, [&](std::vector<cuda::OwnedFd>* fds, std::vector<uint64_t>* sizes) {
    fetch_chunks(name, memory.rkey, fds, sizes);
  });
  memory.handle = reinterpret_cast<void*>(memory.rkey);
  memory.takes_lists = true;
  return memory;
}

void HostNic::release_memory(RemoteMemory& memory) {
  if (memory.handle) gpu_.unmap(memory.rkey);
  memory = {};
}

// Asks the NIC that has registered it for the descriptors of a region's chunks, on a socket of its own: some at a time,
// so that the answer fits into the socket.
void HostNic::fetch_chunks(const HostToken& owner, uint64_t key, std::vector<cuda::OwnedFd>* descriptors,
                           std::vector<uint64_t>* sizes) {
  HostSocket socket;
  const int error = HostSocket::dial("railwire-shm-" + to_hex(owner), 1000, &socket);
  if (error != 0)
    throw NicError(std::string("shm: the owner of GPU memory cannot be reached: ") + std::strerror(error));
  sizes->clear();
  HostFrame ask{.type = HostFrame::kWantGpuMemory, .from = name_, .to = owner, .rkey = key};
  if (socket.send(bytes_of(ask)) != HostSocket::Result::kDone) throw NicError("shm: the owner of GPU memory has ended");
  while (true) {
    pollfd ready{socket.fd(), POLLIN, 0};
    if (::poll(&ready, 1, kFetchPatience) <= 0) {
      throw NicError("shm: the owner of GPU memory does not hand out its descriptors: its process is stopped or busy");
    }
    std::byte buffer[kLongestPacket];
    size_t length = 0;
    std::vector<UniqueFd> received;
    HostFrame frame;
    if (socket.receive(buffer, &length, &received) != HostSocket::Result::kDone || length != sizeof frame) {
      throw NicError("shm: the owner of GPU memory has ended, or no longer has it registered");
    }
    std::memcpy(&frame, buffer, sizeof frame);
    if (frame.magic != kHostMagic || frame.type != HostFrame::kHaveGpuMemory || frame.rkey != key) {
      throw NicError("shm: the owner of GPU memory answers something else");
    }
    if (received.size() == 1 && sizes->size() < kMostChunks) {
      descriptors->emplace_back(fcntl(received.front().get(), F_DUPFD_CLOEXEC, 0));
      sizes->push_back(frame.length);
      continue;
    }
    if (!received.empty() || frame.length > kMostChunks) throw NicError("shm: too many chunks of GPU memory");
    // The end of this answer: so many are there in all.
    if (frame.length == sizes->size()) return;
    if (ask.offset == sizes->size()) throw NicError("shm: the owner of GPU memory hands out no more of its chunks");
    ask.offset = sizes->size();
    if (socket.send(bytes_of(ask)) != HostSocket::Result::kDone) {
      throw NicError("shm: the owner of GPU memory has ended");
    }
  }
}

// The owner's side. Any process of this user that knows the key may ask.
void HostNic::give_gpu_memory(Caller& caller, uint64_t rkey, uint64_t first) {
  std::vector<int> descriptors;
  std::vector<uint64_t> sizes;
  if (!gpu_.chunks(rkey, &descriptors, &sizes)) return;
  HostFrame frame{.type = HostFrame::kHaveGpuMemory, .from = name_, .rkey = rkey};
  for (size_t i = first; i < std::min(descriptors.size(), first + kChunksAnAnswer); ++i) {
    frame.length = sizes[i];
    if (caller.socket.send(bytes_of(frame), {&descriptors[i], 1}) != HostSocket::Result::kDone) break;
  }
  frame.length = sizes.size();
  (void)caller.socket.send(bytes_of(frame));
}

}  // namespace railwire
