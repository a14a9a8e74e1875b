#include "cuda/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>

namespace railwire::cuda {
namespace {

struct Found {
  std::unique_ptr<Driver> driver;
  std::string why;
};

Found look() {
  Found found;
  const char* named = std::getenv("RAILWIRE_LIBCUDA");
  const char* path = named && *named ? named : "libcuda.so.1";
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    found.why = std::string("no CUDA driver: ") + dlerror();
    return found;
  }
  auto driver = std::make_unique<Driver>();
#define RAILWIRE_CUDA_LOAD(name, symbol, parameters)                                     \
  driver->name = reinterpret_cast<Result(*) parameters>(dlsym(library, #symbol));        \
  if (!driver->name) {                                                                   \
    found.why = std::string(path) + " has no " #symbol ": CUDA 12.0 or later is needed"; \
    return found;                                                                        \
  }
  RAILWIRE_CUDA_FUNCTIONS(RAILWIRE_CUDA_LOAD)
#undef RAILWIRE_CUDA_LOAD
  if (const Result code = driver->init(0); code != kSuccess) {
    found.why = "the CUDA driver does not start: " + driver->describe(code);
    return found;
  }
  found.driver = std::move(driver);
  return found;
}

const Found& found() {
  static const Found once = look();
  return once;
}

}  // namespace

void Driver::fail(Result code, const char* what) const {
  throw CudaError(code, std::string(what) + ": " + describe(code));
}

std::string Driver::describe(Result code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  error_name(code, &name);
  error_text(code, &text);
  return std::string(name ? name : "unknown CUDA error") + " (" + std::to_string(code) + ")" +
         (text ? std::string(": ") + text : std::string());
}

const Driver* find_driver(std::string* why) {
  if (why) *why = found().why;
  return found().driver.get();
}

const Driver& driver() {
  if (!found().driver) throw CudaError(-1, found().why);
  return *found().driver;
}

}  // namespace railwire::cuda
