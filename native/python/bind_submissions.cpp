// Everything that is submitted: transfers, expectations, messages, fences. Arguments are checked here, at the call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/stream_words.h"
#include "engine/clock.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace railwire {
namespace {

using After = std::shared_ptr<cuda::StreamWord>;  // null: at once
using Indices = nb::ndarray<nb::ndim<1>, nb::device::cpu>;
__extension__ using u128 = unsigned __int128;

int64_t to_ns(double seconds) {
  return seconds > 9e9 ? std::numeric_limits<int64_t>::max() / 2 : static_cast<int64_t>(seconds * 1e9);
}

void check_open(const Region& region) {
  if (region.closed.load()) throw NicError("the region is closed");
}

void check_immediate(int64_t id) {
  if (id < -1 || id >= int64_t{kImmediateIds}) {
    throw nb::value_error(
        ("an immediate is 0.." + std::to_string(kImmediateIds - 1) + ", not " + std::to_string(id)).c_str());
  }
}

template <class T>
void copy_indices(const T* data, size_t count, int64_t step, PageSide& side, const char* what) {
  T low = count ? data[0] : 0, high = low;
  uint32_t* out = side.indices.data();
  if (step == 1) {
    for (size_t i = 0; i < count; ++i) {
      const T v = data[i];
      low = std::min(low, v);
      high = std::max(high, v);
      out[i] = static_cast<uint32_t>(v);
    }
  } else {
    for (size_t i = 0; i < count; ++i) {
      const T v = data[static_cast<int64_t>(i) * step];
      low = std::min(low, v);
      high = std::max(high, v);
      out[i] = static_cast<uint32_t>(v);
    }
  }
  bool wrong = static_cast<uint64_t>(high) > std::numeric_limits<uint32_t>::max();
  if constexpr (std::is_signed_v<T>) wrong |= low < 0;
  if (count && wrong) {
    throw nb::index_error((std::string(what) + ": page indices must be 0.." +
                           std::to_string(std::numeric_limits<uint32_t>::max()) + ", found " + std::to_string(low) +
                           " and " + std::to_string(high))
                              .c_str());
  }
}

// Copies the indices and proves that no page leaves [0, size).
PageSide page_side(const char* what, const Indices& indices, uint64_t offset, uint64_t stride, uint64_t runs,
                   uint64_t run_stride, uint64_t page_bytes, uint64_t size) {
  PageSide side{.indices = {}, .offset = offset, .stride = stride, .runs = runs, .run_stride = run_stride};
  const size_t count = indices.shape(0);
  side.indices.resize(count);
  const auto type = indices.dtype();
  const int64_t step = count > 1 ? indices.stride(0) : 1;
  {
    nb::gil_scoped_release release;
    if (type == nb::dtype<int64_t>()) {
      copy_indices(static_cast<const int64_t*>(indices.data()), count, step, side, what);
    } else if (type == nb::dtype<int32_t>()) {
      copy_indices(static_cast<const int32_t*>(indices.data()), count, step, side, what);
    } else if (type == nb::dtype<uint32_t>()) {
      copy_indices(static_cast<const uint32_t*>(indices.data()), count, step, side, what);
    } else if (type == nb::dtype<uint64_t>()) {
      copy_indices(static_cast<const uint64_t*>(indices.data()), count, step, side, what);
    } else {
      throw nb::type_error((std::string(what) + ": page indices must be int32, int64, uint32 or uint64").c_str());
    }
  }
  if (runs == 0 || page_bytes % runs != 0) {
    throw nb::value_error((std::string(what) + ": a page of " + std::to_string(page_bytes) +
                           " bytes cannot consist of " + std::to_string(runs) + " equal runs")
                              .c_str());
  }
  if (count) {
    const uint64_t last = *std::max_element(side.indices.begin(), side.indices.end());
    const u128 extent = u128{runs - 1} * run_stride + page_bytes / runs;
    const u128 end = u128{offset} + u128{last} * stride + extent;
    if (end > size) {
      throw nb::index_error((std::string(what) + ": page " + std::to_string(last) + " (offset " +
                             std::to_string(offset) + ", stride " + std::to_string(stride) + ", " +
                             std::to_string(page_bytes) + " bytes) ends outside a region of " + std::to_string(size) +
                             " bytes")
                                .c_str());
    }
  }
  return side;
}

template <class T>
std::shared_ptr<T> submit(EngineHandle& self, std::shared_ptr<T> operation) {
  nb::gil_scoped_release release;
  self.engine->submit(operation);
  return operation;
}

std::shared_ptr<Transfer> new_transfer(EngineHandle& self, Transfer::Kind kind, int64_t imm, After after) {
  auto transfer = std::make_shared<Transfer>(self.engine, kind, imm);
  transfer->after = std::move(after);
  transfer->submitted_ns = self.engine->submission_time();
  return transfer;
}

std::shared_ptr<Transfer> copy(EngineHandle& self, bool read, std::shared_ptr<Region> region, uint64_t local_offset,
                               std::shared_ptr<Peer> peer, std::shared_ptr<RemoteKeys> remote, uint64_t remote_offset,
                               uint64_t length, int64_t imm, After after) {
  check_open(*region);
  if (read && !region->memory.writable) {
    throw nb::value_error("the destination of this read is registered readable_only");
  }
  check_immediate(imm);
  check_range(read ? "destination" : "source", local_offset, length, region->memory.length);
  check_range(read ? "source" : "destination", remote_offset, length, remote->length);
  auto access = reach(self, peer, *remote, !read);
  const uint32_t set = self.engine->choose_rails(*peer, region.get(), access.get());
  auto transfer = new_transfer(self, read ? Transfer::Kind::kRead : Transfer::Kind::kWrite, imm, std::move(after));
  Piece piece{local_offset, std::move(access), remote_offset, length};
  const SplitLimits& limits = peer->sets[set].limits;
  transfer->add_lane<PieceSource>(std::move(peer), std::move(region), std::move(piece), read, imm, limits).set = set;
  return submit(self, std::move(transfer));
}

using Runs = std::pair<uint64_t, uint64_t>;

std::shared_ptr<Transfer> write_pages(EngineHandle& self, std::shared_ptr<Region> region, const Indices& src_indices,
                                      std::tuple<uint64_t, uint64_t, uint64_t, uint64_t> src,
                                      std::shared_ptr<Peer> peer, std::shared_ptr<RemoteKeys> remote,
                                      const Indices& dst_indices,
                                      std::tuple<uint64_t, uint64_t, uint64_t, uint64_t> dst, uint64_t local_size,
                                      uint64_t remote_size, uint64_t page_bytes, int64_t imm, After after) {
  check_open(*region);
  check_immediate(imm);
  auto access = reach(self, peer, *remote, true);
  const uint32_t set = self.engine->choose_rails(*peer, region.get(), access.get());
  if (src_indices.shape(0) != dst_indices.shape(0)) {
    throw nb::value_error((std::to_string(src_indices.shape(0)) + " source pages but " +
                           std::to_string(dst_indices.shape(0)) + " destination pages")
                              .c_str());
  }
  auto transfer = new_transfer(self, Transfer::Kind::kWrite, imm, std::move(after));
  const auto& [src_offset, src_stride, src_runs, src_run_stride] = src;
  const auto& [dst_offset, dst_stride, dst_runs, dst_run_stride] = dst;
  auto from = page_side("source pages", src_indices, src_offset, src_stride, src_runs, src_run_stride, page_bytes,
                        std::min(local_size, region->memory.length));
  auto to = page_side("destination pages", dst_indices, dst_offset, dst_stride, dst_runs, dst_run_stride, page_bytes,
                      std::min(remote_size, remote->length));
  const SplitLimits& limits = peer->sets[set].limits;
  Lane& lane = transfer->add_lane<PageSource>(std::move(peer), std::move(region), std::move(from), std::move(access),
                                              std::move(to), page_bytes, imm, limits);
  lane.set = set;
  return submit(self, std::move(transfer));
}

using Target = std::tuple<size_t, std::shared_ptr<RemoteKeys>, uint64_t, uint64_t, uint64_t>;

// targets: (index into peers, keys, local offset, remote offset, length)
std::shared_ptr<Transfer> scatter(EngineHandle& self, std::shared_ptr<Region> region,
                                  const std::vector<std::shared_ptr<Peer>>& peers, const std::vector<Target>& targets,
                                  int64_t imm, After after) {
  check_open(*region);
  check_immediate(imm);
  std::map<std::pair<size_t, uint32_t>, std::vector<Piece>> pieces;  // by peer and set of rails
  for (const auto& [index, remote, local_offset, remote_offset, length] : targets) {
    if (index >= peers.size()) throw nb::index_error("scatter: no such peer in the group");
    check_range("source", local_offset, length, region->memory.length);
    check_range("destination", remote_offset, length, remote->length);
    auto access = reach(self, peers[index], *remote, true);
    const uint32_t set = self.engine->choose_rails(*peers[index], region.get(), access.get());
    pieces[{index, set}].push_back({local_offset, std::move(access), remote_offset, length});
  }
  auto transfer = new_transfer(self, Transfer::Kind::kWrite, imm, std::move(after));
  for (auto& [to, some] : pieces) {
    const auto& [index, set] = to;
    const SplitLimits& limits = peers[index]->sets[set].limits;
    transfer->add_lane<PieceSource>(peers[index], region, std::move(some), false, imm, limits).set = set;
  }
  return submit(self, std::move(transfer));
}

std::shared_ptr<Transfer> barrier(EngineHandle& self, const std::vector<std::shared_ptr<Peer>>& peers, int64_t imm,
                                  After after) {
  check_immediate(imm);
  if (imm < 0) throw nb::value_error("a barrier needs an immediate");
  auto transfer = new_transfer(self, Transfer::Kind::kWrite, imm, std::move(after));
  for (const auto& peer : peers) {
    const uint32_t set = self.engine->choose_rails(*peer, nullptr, nullptr);
    transfer->add_lane<PieceSource>(peer, nullptr, Piece{}, false, imm, peer->sets[set].limits).set = set;
  }
  return submit(self, std::move(transfer));
}

}  // namespace

void check_range(const char* what, uint64_t offset, uint64_t length, uint64_t size) {
  if (offset > size || length > size - offset) {
    throw nb::index_error((std::string(what) + ": bytes " + std::to_string(offset) + ".." +
                           std::to_string(offset + length) + " lie outside a region of " + std::to_string(size) +
                           " bytes")
                              .c_str());
  }
}

// What is only to be read is not written; what is not imported yet is now.
std::shared_ptr<const RemoteAccess> reach(EngineHandle& self, const std::shared_ptr<Peer>& peer, RemoteKeys& remote,
                                          bool write) {
  if (write && !remote.writable) {
    throw nb::value_error(
        ("peer " + peer->name + " has registered this memory readable_only: it can be read, not written").c_str());
  }
  return self.engine->reach(peer, remote);
}

void bind_submissions(nb::module_& m) {
  nb::class_<Transfer, Operation>(m, "Transfer").def_ro("nbytes", &Transfer::bytes);
  nb::class_<Expectation, Operation>(m, "Expectation");
  nb::class_<SendOperation, Operation>(m, "SendOperation");
  nb::class_<CloseOperation, Operation>(m, "CloseOperation");
  nb::class_<RevokeOperation, Operation>(m, "RevokeOperation");

  m.def(
      "write",
      [](EngineHandle& self, std::shared_ptr<Region> region, uint64_t local_offset, std::shared_ptr<Peer> peer,
         std::shared_ptr<RemoteKeys> remote, uint64_t remote_offset, uint64_t length, int64_t imm, After after) {
        return copy(self, false, std::move(region), local_offset, std::move(peer), std::move(remote), remote_offset,
                    length, imm, std::move(after));
      },
      "engine"_a, "region"_a, "local_offset"_a, "peer"_a, "remote"_a, "remote_offset"_a, "length"_a, "imm"_a,
      "after"_a = nb::none());
  m.def(
      "read",
      [](EngineHandle& self, std::shared_ptr<Region> region, uint64_t local_offset, std::shared_ptr<Peer> peer,
         std::shared_ptr<RemoteKeys> remote, uint64_t remote_offset, uint64_t length, After after) {
        return copy(self, true, std::move(region), local_offset, std::move(peer), std::move(remote), remote_offset,
                    length, -1, std::move(after));
      },
      "engine"_a, "region"_a, "local_offset"_a, "peer"_a, "remote"_a, "remote_offset"_a, "length"_a,
      "after"_a = nb::none());
  m.def("write_pages", &write_pages, "engine"_a, "region"_a, "src_indices"_a, "src"_a, "peer"_a, "remote"_a,
        "dst_indices"_a, "dst"_a, "local_size"_a, "remote_size"_a, "page_bytes"_a, "imm"_a, "after"_a = nb::none(),
        "src and dst: (offset, stride, runs, run_stride) in bytes from the region's begin.");
  m.def("scatter", &scatter, "engine"_a, "region"_a, "peers"_a, "targets"_a, "imm"_a, "after"_a = nb::none());
  m.def("barrier", &barrier, "engine"_a, "peers"_a, "imm"_a, "after"_a = nb::none());
  m.def(
      "expect",
      [](EngineHandle& self, uint32_t id, uint64_t units, std::vector<uint64_t> peers, double seconds) {
        check_immediate(id);
        return submit(self, std::make_shared<Expectation>(self.engine, id, units, std::move(peers), to_ns(seconds)));
      },
      "engine"_a, "id"_a, "units"_a, "peers"_a, "seconds"_a);
  m.def(
      "send",
      [](EngineHandle& self, std::shared_ptr<Peer> peer, const nb::bytes& message) {
        const auto* p = reinterpret_cast<const std::byte*>(message.c_str());
        return submit(self, std::make_shared<SendOperation>(self.engine, std::move(peer),
                                                            std::vector<std::byte>(p, p + message.size())));
      },
      "engine"_a, "peer"_a, "message"_a);
  m.def(
      "close_peer",
      [](EngineHandle& self, std::shared_ptr<Peer> peer, double seconds) {
        return submit(self, std::make_shared<CloseOperation>(self.engine, std::move(peer), to_ns(seconds)));
      },
      "engine"_a, "peer"_a, "seconds"_a);
  m.def(
      "revoke",
      [](EngineHandle& self, std::shared_ptr<Region> region, bool reregister, double seconds) {
        return submit(self,
                      std::make_shared<RevokeOperation>(self.engine, std::move(region), reregister, to_ns(seconds)));
      },
      "engine"_a, "region"_a, "reregister"_a, "seconds"_a);
}

}  // namespace railwire
