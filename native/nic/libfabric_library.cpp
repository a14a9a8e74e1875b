// Opens libfabric with dlopen, and remembers what was tried.
#include "nic/libfabric_library.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <cstdlib>
#include <mutex>
#include <set>
#include <tuple>

#include "nic/libfabric_api.h"
#include "nic/process_lock.h"

namespace railwire {
namespace {

constexpr uint32_t kOldest = FI_VERSION(1, 14);

struct Loader {
  ProcessLock mutex;
  std::vector<std::string> search;
  std::vector<LibraryAttempt> attempts;
  LibfabricApi api;
  bool open = false;
};

// Never destroyed: NICs may outlive static destructors.
Loader& loader() {
  static Loader* the_loader = new Loader;
  return *the_loader;
}

std::vector<std::string> default_search() {
  if (const char* path = std::getenv("RAILWIRE_LIBFABRIC"); path && *path) return {path};
  return {"/opt/amazon/efa/lib/libfabric.so.1", "/opt/amazon/efa/lib64/libfabric.so.1", "libfabric.so.1"};
}

// Some builds (the one in the mpich wheel) keep providers as plug-ins in a folder beside the library, but look for
// them where they were built.
void point_to_providers(const std::string& library) {
  const size_t slash = library.rfind('/');
  if (slash == std::string::npos) return;
  const std::string folder = library.substr(0, slash) + "/libfabric";
  struct stat found;
  if (stat(folder.c_str(), &found) == 0 && S_ISDIR(found.st_mode)) setenv("FI_PROVIDER_PATH", folder.c_str(), 0);
}

template <class F>
bool resolve(void* handle, const char* name, F& function, std::string& missing) {
  function = reinterpret_cast<F>(dlsym(handle, name));
  if (!function) missing = name;
  return function != nullptr;
}

bool try_open(const std::string& path, LibfabricApi& api, LibraryAttempt& attempt) {
  attempt.path = path;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* why = dlerror();
    attempt.error = why ? why : "dlopen failed";
    return false;
  }
  std::string missing;
  const bool complete =
      resolve(handle, "fi_getinfo", api.getinfo, missing) && resolve(handle, "fi_freeinfo", api.freeinfo, missing) &&
      resolve(handle, "fi_dupinfo", api.dupinfo, missing) && resolve(handle, "fi_fabric", api.fabric, missing) &&
      resolve(handle, "fi_strerror", api.strerror, missing) &&
      resolve(handle, "fi_version", api.version_function, missing);
  if (!complete) {
    attempt.error = "not a libfabric: it has no " + missing;
    dlclose(handle);
    return false;
  }
  api.version = api.version_function();
  attempt.version = api.version_text();
  if (FI_VERSION_LT(api.version, kOldest)) {
    attempt.error = "libfabric " + attempt.version + " is too old: 1.14 is the oldest that works";
    dlclose(handle);
    return false;
  }
  Dl_info where;
  api.path = dladdr(reinterpret_cast<void*>(api.getinfo), &where) && where.dli_fname ? where.dli_fname : path;
  attempt.found = true;
  return true;
}

// With the lock held.
bool open_library(Loader& state) {
  if (state.open) return true;
  if (state.search.empty()) state.search = default_search();
  state.attempts.clear();
  for (const std::string& path : state.search) {
    LibraryAttempt attempt;
    LibfabricApi api;
    state.open = try_open(path, api, attempt);
    state.attempts.push_back(std::move(attempt));
    if (state.open) {
      point_to_providers(api.path);  // read by the library at the first fi_getinfo
      state.api = std::move(api);
      return true;
    }
  }
  return false;
}

std::string no_library(const Loader& state) {
  std::string text =
      "no libfabric could be opened; install libfabric1 (Debian, Ubuntu), libfabric (Fedora) or the mpich "
      "wheel, or name the file in RAILWIRE_LIBFABRIC. Tried:";
  for (const auto& attempt : state.attempts) text += " " + attempt.path + " (" + attempt.error + ");";
  return text;
}

}  // namespace

void set_libfabric_search(std::vector<std::string> paths) {
  Loader& state = loader();
  std::lock_guard lock(state.mutex);
  state.search = std::move(paths);
}

const LibfabricApi& libfabric_api() {
  Loader& state = loader();
  std::lock_guard lock(state.mutex);
  if (!open_library(state)) throw NicError(no_library(state));
  return state.api;
}

std::string libfabric_error(int64_t code) {
  const int number = static_cast<int>(code < 0 ? -code : code);
  return std::string(libfabric_api().strerror(number)) + " (" + std::to_string(number) + ")";
}

void libfabric_check(int64_t code, const std::string& what) {
  if (code != 0) throw NicError(what + ": " + libfabric_error(code));
}

LibfabricProbe libfabric_probe() {
  LibfabricProbe probe;
  {
    Loader& state = loader();
    std::lock_guard lock(state.mutex);
    const bool open = open_library(state);
    probe.attempts = state.attempts;
    if (!open) {
      probe.error = no_library(state);
      return probe;
    }
    probe.library = state.api.path;
    probe.version = state.api.version_text();
  }
  const LibfabricApi& api = libfabric_api();
  InfoOwner hints(api.dupinfo(nullptr));
  hints->caps = FI_MSG | FI_RMA;
  hints->ep_attr->type = FI_EP_RDM;
  hints->mode = ~0ULL;
  hints->domain_attr->mode = ~0ULL;
  hints->domain_attr->mr_mode = static_cast<int>(~(FI_MR_BASIC | FI_MR_SCALABLE));
  fi_info* found = nullptr;
  const int code = api.getinfo(FI_VERSION(1, 17), nullptr, nullptr, 0, hints.get(), &found);
  if (code != 0) {
    probe.error = "libfabric offers no provider with reliable datagrams, messages and RMA: " + libfabric_error(code);
    return probe;
  }
  const InfoOwner owner(found);
  const auto text = [](const char* s) { return std::string(s ? s : ""); };
  std::set<std::tuple<std::string, std::string, std::string>> seen;  // one device comes once per protocol and mode
  for (const fi_info* info = found; info; info = info->next) {
    ProviderFound provider{.name = text(info->fabric_attr->prov_name),
                           .domain = text(info->domain_attr->name),
                           .fabric = text(info->fabric_attr->name),
                           .version = std::to_string(FI_MAJOR(info->fabric_attr->prov_version)) + "." +
                                      std::to_string(FI_MINOR(info->fabric_attr->prov_version)),
                           .kind = {}};
    const std::string core = provider.name.substr(0, provider.name.find(';'));
    provider.kind = core == "efa" && provider.fabric == "efa-direct" ? "efa-direct" : core;
    if (seen.insert({provider.name, provider.domain, provider.fabric}).second) {
      probe.providers.push_back(std::move(provider));
    }
  }
  return probe;
}

}  // namespace railwire
