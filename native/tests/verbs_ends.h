// One end of a test of the verbs NIC: a NIC, one link, one stretch of memory, and what poll() has brought.
#pragma once

#include <doctest/doctest.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "nic/verbs_internal.h"
#include "nic/verbs_nic.h"
#include "two_processes.h"

namespace railwire::testing {

using Options = std::map<std::string, std::string>;

struct End {
  explicit End(const std::string& spec, const Options& options = {}, size_t bytes = 1 << 20)
      : memory(bytes), nic(make_verbs_nic(spec, options)) {
    region = nic->register_memory({.address = memory.data(), .length = memory.size()});
    link = nic->create_link();
  }
  ~End() {
    link.reset();
    nic->deregister(region);
  }
  void poll() {
    Completion out[64];
    const size_t n = nic->poll(out);
    for (size_t i = 0; i < n; ++i) {
      if (out[i].kind == Completion::kImmediate) immediates.push_back(out[i].immediate);
      if (out[i].kind == Completion::kWorkRequest) {
        ended.push_back(out[i]);
        failed += out[i].status != Status::kOk;
        if (out[i].request) unfinished.push_back(*out[i].request);
      }
      if (out[i].kind == Completion::kMessage) messages.emplace_back(out[i].data.begin(), out[i].data.end());
      if (out[i].kind == Completion::kSend) ++sent;
    }
  }
  WorkRequest write(End& to, uint64_t from, uint64_t at, uint64_t length, uint32_t immediate,
                    uint32_t flags = WorkRequest::kImmediate) {
    return {.local = memory.data() + from,
            .local_key = region.local,
            .remote = nic->import_memory(to.region.blob).base + at,
            .rkey = nic->import_memory(to.region.blob).rkey,
            .length = length,
            .flags = flags,
            .immediate = immediate,
            .context = reinterpret_cast<void*>(uintptr_t{immediate} + 1)};
  }

  std::vector<std::byte> memory;
  std::unique_ptr<Nic> nic;
  Registration region;
  std::unique_ptr<Link> link;
  std::vector<uint32_t> immediates;
  std::vector<Completion> ended;
  std::vector<WorkRequest> unfinished;
  std::vector<std::vector<std::byte>> messages;
  size_t failed = 0, sent = 0;
};

inline void join(End& a, End& b) {
  a.link->connect(b.link->address());
  b.link->connect(a.link->address());
}

// As Link::close(), and polls until the link is shut: its count of what has landed is final then.
inline void shut(End& end) {
  end.link->close();
  for (const int64_t limit = now_ms() + 20'000; !end.link->shut() && now_ms() < limit;) end.poll();
  REQUIRE(end.link->shut());
}

inline bool until(End& a, End& b, auto&& done, int64_t within_ms = 20'000) {
  for (const int64_t end = now_ms() + within_ms; !done();) {
    if (now_ms() > end) return false;
    a.poll();
    b.poll();
  }
  return true;
}

inline std::string why(auto&& call) {
  try {
    call();
  } catch (const NicError& error) {
    return error.what();
  }
  return "";
}

inline bool has(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) MESSAGE("\"" << text << "\" lacks \"" << part << "\"");
  return found;
}

}  // namespace railwire::testing
