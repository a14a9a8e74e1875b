// The CUDA driver, opened when it is first wanted. Without one everything else works, and whoever asks is told why.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/driver_api.h"

namespace railwire::cuda {

// What the driver said to a call of ours, in its own words and with what was tried.
class CudaError : public std::runtime_error {
 public:
  CudaError(Result code, const std::string& text) : std::runtime_error(text), code(code) {}
  const Result code;
};

class Driver {
 public:
#define RAILWIRE_CUDA_MEMBER(name, symbol, parameters) Result(*name) parameters = nullptr;
  RAILWIRE_CUDA_FUNCTIONS(RAILWIRE_CUDA_MEMBER)
#undef RAILWIRE_CUDA_MEMBER

  // Throws CudaError unless `code` is success; `what` is what was tried: "opening a peer's memory".
  void check(Result code, const char* what) const {
    if (code != kSuccess) fail(code, what);
  }
  [[noreturn]] void fail(Result code, const char* what) const;
  std::string describe(Result code) const;  // "CUDA_ERROR_INVALID_VALUE (1): invalid argument"
};

// The process's driver, or null; `why` then says what is missing. The library is RAILWIRE_LIBCUDA, or libcuda.so.1.
// Looked for once: a driver does not come later.
const Driver* find_driver(std::string* why = nullptr);
// The same, or CudaError.
const Driver& driver();

}  // namespace railwire::cuda
