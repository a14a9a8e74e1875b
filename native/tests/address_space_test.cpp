// What is refused as memory to register, with kernels that can be asked about one address and with others.
#include "engine/address_space.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

using namespace railwire;

namespace {

constexpr uint64_t kPage = 4096;

struct Area {
  explicit Area(uint64_t pages, int rights = PROT_READ | PROT_WRITE, int fd = -1)
      : length(pages * kPage),
        at(static_cast<char*>(
            mmap(nullptr, length, rights, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0))) {}
  ~Area() { munmap(at, length); }
  void protect(uint64_t page, int rights) const { mprotect(at + page * kPage, kPage, rights); }
  AddressRange range(uint64_t begin = 0, uint64_t end = UINT64_MAX) const {
    return {reinterpret_cast<uint64_t>(at) + begin, std::min(end, length) - begin};
  }
  const uint64_t length;
  char* const at;
};

bool says(const AddressRange& range, bool writable, const std::string& text) {
  for (const bool read_all : {false, true}) {
    const std::string why = refuse_ranges({&range, 1}, writable, read_all);
    CAPTURE(why);
    if (text.empty() ? !why.empty() : why.find(text) == std::string::npos) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("memory that can be written is taken, however many mappings it lies in") {
  Area area(5);
  CHECK(says(area.range(), true, ""));
  CHECK(says(area.range(1, 2), true, ""));
  int on_the_stack = 0;
  CHECK(says({reinterpret_cast<uint64_t>(&on_the_stack), sizeof on_the_stack}, true, ""));
  std::vector<char> heap(1 << 20);
  CHECK(says({reinterpret_cast<uint64_t>(heap.data()), heap.size()}, true, ""));
  area.protect(2, PROT_READ | PROT_WRITE | PROT_EXEC);  // a mapping of its own
  CHECK(says(area.range(), true, ""));
}

TEST_CASE("a page that cannot be written, read or found is named") {
  Area area(5);
  area.protect(3, PROT_READ);
  CHECK(says(area.range(), true, "from byte 12288 on"));
  CHECK(says(area.range(), true, "read-only"));
  CHECK(says(area.range(), false, ""));
  CHECK(says(area.range(0, 3 * kPage), true, ""));
  area.protect(2, PROT_NONE);
  CHECK(says(area.range(), false, "from byte 8192 on"));
  CHECK(says(area.range(), false, "cannot be read"));
  munmap(area.at + 4 * kPage, kPage);
  CHECK(says(area.range(4 * kPage - 1), false, "byte 1 on"));
  CHECK(says(area.range(4 * kPage), false, "not mapped"));
  CHECK(says({0, 4096}, false, "not mapped"));
  CHECK(says({UINT64_MAX - 10, 4096}, false, "beyond the address space"));
}

TEST_CASE("a file that ends before its mapping does") {
  const int fd = memfd_create("short", MFD_CLOEXEC);
  REQUIRE(ftruncate(fd, 3 * kPage) == 0);
  Area area(3, PROT_READ | PROT_WRITE, fd);
  CHECK(says(area.range(), true, ""));
  REQUIRE(ftruncate(fd, kPage + 1) == 0);
  CHECK(says(area.range(), true, "maps a file that ends before byte 12288"));
  CHECK(says(area.range(0, 2 * kPage), true, ""));
  close(fd);
}

TEST_CASE("one bad range among many") {
  Area area(2), other(2, PROT_READ);
  const std::array<AddressRange, 3> ranges{area.range(), other.range(), area.range()};
  for (const bool read_all : {false, true}) {
    CHECK(refuse_ranges(ranges, true, read_all).find("read-only") != std::string::npos);
    CHECK(refuse_ranges(ranges, false, read_all).empty());
  }
}
