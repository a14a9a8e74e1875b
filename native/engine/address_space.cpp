// The kernel's list of mappings: asked about one address where it can be (PROCMAP_QUERY, Linux 6.11), else read whole.
#include "engine/address_space.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <optional>
#include <string_view>
#include <vector>

namespace railwire {
namespace {

struct Mapping {
  uint64_t begin = 0, end = 0;
  bool readable = false, writable = false, of_file = false;
};

// struct procmap_query of linux/fs.h, which older headers lack.
struct MapQuery {
  uint64_t size = sizeof(MapQuery);
  uint64_t flags = 0;
  uint64_t address = 0;
  uint64_t begin = 0, end = 0;
  uint64_t rights = 0;
  uint64_t page_size = 0;
  uint64_t offset = 0;
  uint64_t inode = 0;
  uint32_t major = 0, minor = 0;
  uint32_t name_size = 0, build_id_size = 0;
  uint64_t name_address = 0, build_id_address = 0;
};
constexpr unsigned long kMapQuery = _IOWR('f', 17, MapQuery);
constexpr uint64_t kReadable = 1, kWritable = 2;
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ of Linux 5.14, which older headers lack

class Mappings {
 public:
  explicit Mappings(bool whole) : fd_(open("/proc/self/maps", O_RDONLY | O_CLOEXEC)) {
    if (fd_ >= 0 && whole) read_all();
  }
  ~Mappings() {
    if (fd_ >= 0) close(fd_);
  }
  Mappings(const Mappings&) = delete;
  Mappings& operator=(const Mappings&) = delete;

  // False: nobody says what is mapped (no /proc, no descriptor to spare).
  bool known() const { return fd_ >= 0; }

  std::optional<Mapping> at(uint64_t address) {
    if (!all_) {
      MapQuery query;
      query.address = address;
      if (ioctl(fd_, kMapQuery, &query) == 0) {
        return Mapping{query.begin, query.end, (query.rights & kReadable) != 0, (query.rights & kWritable) != 0,
                       query.inode != 0};
      }
      if (errno == ENOENT) return std::nullopt;
      read_all();
    }
    const auto after = std::upper_bound(all_->begin(), all_->end(), address,
                                        [](uint64_t a, const Mapping& mapping) { return a < mapping.begin; });
    if (after == all_->begin() || address >= std::prev(after)->end) return std::nullopt;
    return *std::prev(after);
  }

 private:
  // begin-end rights offset device inode [path], one a line, in the order of addresses.
  void read_all() {
    all_.emplace();
    std::string text;
    std::vector<char> some(1 << 16);
    for (ssize_t n; (n = read(fd_, some.data(), some.size())) > 0;) text.append(some.data(), static_cast<size_t>(n));
    std::string_view rest = text;
    while (!rest.empty()) {
      const std::string line(rest.substr(0, rest.find('\n')));
      rest.remove_prefix(std::min(line.size() + 1, rest.size()));
      unsigned long long begin = 0, end = 0, inode = 0;
      char rights[5] = {};
      if (std::sscanf(line.c_str(), "%llx-%llx %4s %*s %*s %llu", &begin, &end, rights, &inode) == 4) {
        all_->push_back({begin, end, rights[0] == 'r', rights[1] == 'w', inode != 0});
      }
    }
  }

  const int fd_;
  std::optional<std::vector<Mapping>> all_;
};

std::string hex(uint64_t value) {
  char text[17];
  const auto end = std::to_chars(text, text + sizeof text, value, 16).ptr;
  return "0x" + std::string(text, end);
}

std::string refuse_range(Mappings& mappings, const AddressRange& range, bool writable) {
  if (range.address > UINT64_MAX - range.length) return "the memory ends beyond the address space";
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE)), end = range.address + range.length;
  for (uint64_t at = range.address; at < end;) {
    const auto mapping = mappings.at(at);
    const auto here = [&] {
      return "the memory from byte " + std::to_string(at - range.address) + " on (address " + hex(at) + ") ";
    };
    if (!mapping) return here() + "is not mapped in this process";
    if (!mapping->readable) return here() + "cannot be read by this process";
    if (writable && !mapping->writable) {
      return here() + "is read-only: with readable_only=True it can be registered as a source";
    }
    const uint64_t next = std::min(mapping->end, end);
    if (mapping->of_file) {
      const uint64_t last = (next - 1) / page * page;
      if (madvise(reinterpret_cast<void*>(last), page, kPopulateRead) != 0 && errno == EFAULT) {
        return here() + "maps a file that ends before byte " + std::to_string(next - range.address);
      }
    }
    at = next;
  }
  return {};
}

}  // namespace

std::string refuse_ranges(std::span<const AddressRange> ranges, bool writable, bool read_all) {
  Mappings mappings(read_all);
  if (!mappings.known()) return {};
  for (const auto& range : ranges) {
    if (auto why = refuse_range(mappings, range, writable); !why.empty()) return why;
  }
  return {};
}

}  // namespace railwire
