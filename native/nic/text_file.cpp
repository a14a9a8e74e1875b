// Reading the kernel's small files.
#include "nic/text_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace railwire {

std::string first_line(const std::string& path) {
  std::string text;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return text;
  char piece[1024];
  while (text.find('\n') == std::string::npos) {
    const ssize_t got = read(fd, piece, sizeof piece);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    text.append(piece, static_cast<size_t>(got));
  }
  close(fd);
  return text.substr(0, text.find('\n'));
}

}  // namespace railwire
