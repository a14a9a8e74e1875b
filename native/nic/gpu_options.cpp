#include "nic/gpu_options.h"

#include <charconv>

#include "nic/nic.h"

namespace railwire {
namespace {

int number(const std::map<std::string, std::string>& options, const char* name, int otherwise, int least) {
  const auto found = options.find(name);
  if (found == options.end()) return otherwise;
  const std::string& text = found->second;
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > 1024) {
    throw NicError(std::string("option ") + name + " is \"" + text + "\"; it must be a number from " +
                   std::to_string(least) + " to 1024");
  }
  return value;
}

}  // namespace

GpuOptions gpu_options(const std::map<std::string, std::string>& options) {
  GpuOptions made;
  made.ordinal = number(options, "gpu", -1, 0);
  made.multiprocessors = number(options, "copy_sms", made.multiprocessors, 1);
  return made;
}

}  // namespace railwire
