// Reading the kernel's small files. Without iostreams: they need a locale, which crashes where two C++ libraries are
// loaded.
#pragma once

#include <string>

namespace railwire {

// The file's first line, without its end; empty if there is none, or no such file.
std::string first_line(const std::string& path);

}  // namespace railwire
