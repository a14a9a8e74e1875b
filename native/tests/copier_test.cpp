// The copier: every byte of every piece, whatever its length and alignment, each batch told once and in order.
#include "cuda/copier.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <thread>

#include "gpu_memory.h"

using namespace railwire::cuda;

namespace {

// Batches one behind the other until all pieces are copied, or the copier says why not.
void copy_all(Copier& copier, std::span<const Piece> pieces) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!pieces.empty() && copier.failure().empty()) {
    pieces = pieces.subspan(copier.submit(pieces));
    REQUIRE(std::chrono::steady_clock::now() < deadline);
  }
  while (copier.finished() < copier.submitted() && copier.failure().empty()) {
    std::this_thread::yield();
    REQUIRE(std::chrono::steady_clock::now() < deadline);
  }
}

}  // namespace

TEST_CASE("copier: pieces of any length and alignment") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  const uint64_t seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  constexpr size_t kBytes = 8 << 20;
  GpuBytes source(device, kBytes), target(device, kBytes);
  std::vector<unsigned char> from(kBytes), expected(kBytes, 0);
  for (auto& byte : from) byte = static_cast<unsigned char>(random());
  source.fill(from);
  target.fill(expected);
  Copier copier(device);
  std::vector<Piece> pieces;
  size_t at = 0;
  while (true) {  // side by side in the target, with gaps that must stay as they are
    const uint64_t kind = random() % 4;
    const size_t length = kind == 0   ? random() % 40
                          : kind == 1 ? random() % 5000
                          : kind == 2 ? 4096
                                      : random() % 200000;
    at += random() % 20;
    if (at + length > kBytes) break;
    const size_t offset = random() % (kBytes - length);
    pieces.push_back({source.address() + offset, target.address() + at, length});
    std::copy_n(from.begin() + static_cast<ptrdiff_t>(offset), length, expected.begin() + static_cast<ptrdiff_t>(at));
    at += length;
  }
  copy_all(copier, pieces);
  CHECK(copier.failure() == "");
  CHECK(target.read() == expected);
}

TEST_CASE("copier: long pieces go through the copy engines, and more batches than there is room for") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  constexpr size_t kBytes = 12 << 20;
  GpuBytes source(device, kBytes), target(device, kBytes);
  std::vector<unsigned char> from(kBytes);
  for (size_t i = 0; i < kBytes; ++i) from[i] = static_cast<unsigned char>(i * 31 >> 3);
  source.fill(from);
  Copier copier(device, {.engine_bytes = 4 << 20});
  std::vector<Piece> pieces{{source.address(), target.address(), 5 << 20}};
  for (size_t at = 5 << 20; at < 7 << 20; at += 4096)
    pieces.push_back({source.address() + at, target.address() + at, 4096});
  pieces.push_back({source.address() + (7 << 20), target.address() + (7 << 20), 5 << 20});
  copy_all(copier, pieces);
  CHECK(target.read() == from);
  for (int round = 0; round < 100; ++round) {
    const Piece one{source.address(), target.address(), 64};
    const uint64_t before = copier.submitted();
    while (copier.submit({&one, 1}) == 0) std::this_thread::yield();
    CHECK(copier.submitted() == before + 1);
  }
  copy_all(copier, {});
  CHECK(copier.finished() == copier.submitted());
}

TEST_CASE("copier: to and from pinned host memory") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  constexpr size_t kBytes = 1 << 20;
  GpuBytes gpu(device, kBytes);
  PinnedMemory pinned(device, 2 * kBytes);
  for (size_t i = 0; i < kBytes; ++i) pinned.data()[i] = static_cast<std::byte>(i * 7);
  Copier copier(device);
  std::vector<Piece> there, back;
  for (size_t at = 0; at < kBytes; at += 1000) {
    const size_t length = std::min<size_t>(1000, kBytes - at);
    there.push_back({pinned.on_device(at), gpu.address() + at, length});
    back.push_back({gpu.address() + at, pinned.on_device(kBytes + at), length});
  }
  copy_all(copier, there);
  copy_all(copier, back);
  CHECK(std::equal(pinned.data(), pinned.data() + kBytes, pinned.data() + kBytes));
}

TEST_CASE("sharing: a range over several chunks is mapped whole, and offsets are right") {
  const auto device = gpu_or_skip(0);
  if (!device || !device->posix_handles) return;
  constexpr size_t kChunk = 2 << 20;
  ChunkedGpuBytes owned(device, {kChunk, kChunk, 2 * kChunk});
  const size_t begin = kChunk - 3000, length = 2 * kChunk + 5000;  // from the first chunk into the third
  std::vector<unsigned char> bytes(length);
  for (size_t i = 0; i < length; ++i) bytes[i] = static_cast<unsigned char>(i * 13 >> 2);
  owned.fill(begin, bytes);
  Exported exported = export_range(device, owned.address() + begin, length);
  CHECK(exported.range.kind == ShareKind::kDescriptors);
  CHECK(exported.descriptors.size() == 3);
  const std::vector<std::byte> wire = encode(exported.range);
  SharedRange told = decode(wire.data(), wire.size());
  told.chunks = exported.range.chunks;
  const auto mapped = map_range(device, told, std::move(exported.descriptors), "owner");
  CHECK(mapped->address() != owned.address() + begin);
  CHECK(read_gpu(device, mapped->address(), length) == bytes);
}

TEST_CASE("sharing: what cannot be right is refused") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  GpuBytes memory(device, 1 << 20);
  Exported exported = export_range(device, memory.address() + 512, 1000);
  CHECK(exported.range.offset == 512);
  CHECK_THROWS_AS(export_range(device, memory.address() + 512, 64 << 20), CudaError);
  const std::vector<std::byte> wire = encode(exported.range);
  for (size_t size = 0; size < wire.size(); ++size) CHECK_THROWS_AS(decode(wire.data(), size), CudaError);
  std::vector<std::byte> other = wire;
  other[0] = std::byte{9};
  CHECK_THROWS_AS(decode(other.data(), other.size()), CudaError);
  other = wire;
  other[1] = std::byte{7};
  CHECK_THROWS_AS(decode(other.data(), other.size()), CudaError);
  if (!device->posix_handles) return;
  ChunkedGpuBytes owned(device, {2 << 20});
  Exported chunks = export_range(device, owned.address(), 2 << 20);
  SharedRange liar = chunks.range;
  liar.length = 3 << 20;
  CHECK_THROWS_AS(map_range(device, liar, std::move(chunks.descriptors), "liar"), CudaError);
  CHECK_THROWS_AS(map_range(device, chunks.range, {}, "none"), CudaError);
}

TEST_CASE("device: pointers are told from host memory, GPUs by their UUID") {
  const auto device = gpu_or_skip(0);
  if (!device) return;
  GpuBytes memory(device, 4096);
  int on_stack = 0;
  CHECK(device_of(reinterpret_cast<void*>(memory.address() + 100)) == 0);
  CHECK(device_of(&on_stack) == -1);
  CHECK(device_of(nullptr) == -1);
  CHECK(ordinal_of(device->uuid) == 0);
  CHECK(ordinal_of(Uuid{}) == -1);
  CHECK(to_string(device->uuid).size() == 40);
  CHECK_THROWS_AS(Device::open(1000), CudaError);
  Context now = nullptr;
  CHECK(driver().pop(&now) != kSuccess);  // nobody's context has been left behind in this thread
}
