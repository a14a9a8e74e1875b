// What the copier gives on this machine's GPUs: random pages within 1 GiB, on one GPU and from one to the next, by page
// size and number of multiprocessors, beside one large copy; and how long one small copy takes until the host knows.
//
//   gpu_copies [seconds per cell, default 0.2]      needs a GPU; with two it measures between them, too
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/copier.h"

using namespace railwire::cuda;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr size_t kArea = size_t{1} << 30;

struct Area {
  Area(std::shared_ptr<Device> device) : device(std::move(device)) {
    const Device::Current current(*this->device);
    driver().check(driver().alloc(&address, kArea), "alloc");
  }
  ~Area() {
    const Device::Current current(*device);
    driver().free(address);
  }
  std::shared_ptr<Device> device;
  DevicePointer address = 0;
};

void run(Copier& copier, std::span<const Piece> pieces) {
  while (!pieces.empty()) {
    pieces = pieces.subspan(copier.submit(pieces));
    if (!copier.failure().empty()) {
      std::printf("failed: %s\n", copier.failure().c_str());
      std::exit(1);
    }
  }
  while (copier.finished() < copier.submitted()) {
  }
}

double gigabytes_a_second(const CopierOptions& options, const Area& from, const Area& to, size_t page, size_t bytes,
                          double seconds) {
  std::mt19937_64 random(1);
  std::vector<size_t> sources(kArea / page), targets(kArea / page);
  std::iota(sources.begin(), sources.end(), 0);
  std::iota(targets.begin(), targets.end(), 0);
  std::shuffle(sources.begin(), sources.end(), random);
  std::shuffle(targets.begin(), targets.end(), random);
  std::vector<Piece> pieces;
  for (size_t i = 0; i < std::min(bytes / page, sources.size()); ++i) {
    pieces.push_back({from.address + sources[i] * page, to.address + targets[i] * page, page});
  }
  Copier copier(from.device, options);
  run(copier, pieces);
  std::vector<double> rates;
  const double end = now() + seconds;
  while (now() < end || rates.size() < 5) {
    const double began = now();
    run(copier, pieces);
    rates.push_back(static_cast<double>(pieces.size() * page) / (now() - began) * 1e-9);
  }
  std::nth_element(rates.begin(), rates.begin() + static_cast<long>(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

void table(const char* title, const Area& from, const Area& to, double seconds) {
  std::printf("%s (GB/s)\n%10s", title, "page");
  const int multiprocessors[] = {4, 8, 16, 32, 64};
  for (const int count : multiprocessors) std::printf("%8d SM", count);
  std::printf("%11s\n", "engines");
  for (const size_t page :
       {size_t{1} << 10, size_t{4} << 10, size_t{32} << 10, size_t{128} << 10, size_t{1} << 20, size_t{16} << 20}) {
    std::printf("%9zuK", page >> 10);
    const size_t bytes = page < 4096 ? 32 << 20 : 128 << 20;
    for (const int count : multiprocessors) {
      std::printf("%11.1f", gigabytes_a_second({.multiprocessors = count, .engine_bytes = UINT64_MAX}, from, to, page,
                                               bytes, seconds));
      std::fflush(stdout);
    }
    const bool few = page >= size_t{128} << 10;
    if (few) std::printf("%11.1f", gigabytes_a_second({.engine_bytes = 1}, from, to, page, bytes, seconds));
    std::printf("\n");
  }
  for (const uint64_t chunk : {4ull << 10, 8ull << 10, 16ull << 10, 64ull << 10}) {
    std::printf(
        "  chunks of %lluK, 16 SM: 32 KiB %.1f, 1 MiB %.1f\n", static_cast<unsigned long long>(chunk >> 10),
        gigabytes_a_second({.engine_bytes = UINT64_MAX, .chunk_bytes = chunk}, from, to, 32 << 10, 128 << 20, seconds),
        gigabytes_a_second({.engine_bytes = UINT64_MAX, .chunk_bytes = chunk}, from, to, 1 << 20, 128 << 20, seconds));
  }
}

void latency(const Area& from, const Area& to, double pause) {
  for (const size_t bytes : {size_t{64}, size_t{4096}, size_t{65536}}) {
    Copier copier(from.device);
    const Piece piece{from.address, to.address, bytes};
    std::vector<double> times;
    for (int i = 0; i < 2000; ++i) {
      for (const double until = now() + pause; now() < until;) {
      }
      const double began = now();
      run(copier, {&piece, 1});
      times.push_back((now() - began) * 1e6);
    }
    std::sort(times.begin(), times.end());
    std::printf("  one copy of %zu B until the host knows: p50 %.1f us, p99 %.1f us\n", bytes, times[1000],
                times[1980]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.2;
  std::string why;
  if (!find_driver(&why)) {
    std::printf("%s\n", why.c_str());
    return 1;
  }
  int count = 0;
  driver().device_count(&count);
  const Area first(Device::open(0)), second(Device::open(0));
  std::printf("%s, %d GPUs\n", first.device->name.c_str(), count);
  table("on one GPU, random pages", first, second, seconds);
  for (const double pause : {0.0, 100e-6, 500e-6}) latency(first, second, pause);
  if (count < 2) return 0;
  const Area far(Device::open(1));
  int can = 0;
  driver().can_access_peer(&can, first.device->handle, far.device->handle);
  if (!can) {
    std::printf("no peer access from GPU 0 to GPU 1\n");
    return 0;
  }
  {
    const Device::Current theirs(*far.device);
    Context context = nullptr;
    driver().pop(&context);
    driver().push(context);
    const Device::Current ours(*first.device);
    driver().check(driver().enable_peer_access(context, 0), "enabling peer access");
  }
  table("from GPU 0 to GPU 1, random pages", first, far, seconds);
  for (const double pause : {0.0, 100e-6, 500e-6}) latency(first, far, pause);
  return 0;
}
