// libfabric's entry points and owners for its objects. For the files of the libfabric NIC only.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <memory>
#include <string>

#include "nic/nic.h"

// Names that the headers of 1.17 do not have yet. They are used only on a library that is new enough.
#ifndef FI_MR_DMABUF  // 1.20
#define FI_MR_DMABUF (1ULL << 40)
#endif

namespace railwire {

// The functions that are really exported; everything else in libfabric's headers is inline and goes through tables.
struct LibfabricApi {
  decltype(&fi_getinfo) getinfo = nullptr;
  decltype(&fi_freeinfo) freeinfo = nullptr;
  decltype(&fi_dupinfo) dupinfo = nullptr;
  decltype(&fi_fabric) fabric = nullptr;
  decltype(&fi_strerror) strerror = nullptr;
  decltype(&fi_version) version_function = nullptr;
  uint32_t version = 0;
  std::string path;  // the file behind it

  std::string version_text() const {
    return std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
  }
};

// Opens the library at the first call. Throws NicError with every place that was tried.
const LibfabricApi& libfabric_api();

// libfabric's negative return codes as a phrase: "Address already in use (98)".
std::string libfabric_error(int64_t code);
// Throws NicError("WHAT: phrase") unless `code` is 0.
void libfabric_check(int64_t code, const std::string& what);

struct CloseFid {
  void operator()(auto* fid) const { fi_close(&fid->fid); }
};
template <class T>
using FidOwner = std::unique_ptr<T, CloseFid>;

struct FreeInfo {
  void operator()(fi_info* info) const { libfabric_api().freeinfo(info); }
};
using InfoOwner = std::unique_ptr<fi_info, FreeInfo>;

// Newer libraries may read or write a little more than the structures of our headers hold.
template <class T>
struct Padded {
  T value{};
  uint64_t newer[16]{};
};

}  // namespace railwire
