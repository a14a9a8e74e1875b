// Notices a store to a page while a thread sleeps: the page is write-protected for as long (userfaultfd), and who
// writes to it waits a moment for the sleeper to wake. So a word that is hardly ever written costs nothing and is seen
// at once all the same.
//
// Only what goes through this process's page tables is noticed: the store of a thread, a system call, or a process that
// writes here through the kernel. A GPU or a NIC writes past them, and has to be looked for. Where the kernel does not
// let us (no privilege, a container's seccomp filter), available() is false. The user-mode-only kind that it always
// grants is no use: a system call that writes to such a page would fail.
#pragma once

#include <cstddef>
#include <vector>

namespace railwire {

class WordGuard {
 public:
  WordGuard();
  ~WordGuard();
  WordGuard(const WordGuard&) = delete;
  WordGuard& operator=(const WordGuard&) = delete;

  bool available() const { return fd_ >= 0; }
  int fd() const { return fd_; }  // readable: somebody waits
  void add(void* page);
  void remove(void* page);
  // Between the two a writer waits: what lies between must take no lock, and be nothing but looking and sleeping.
  // False, and nothing is protected, if it is not possible.
  bool protect();
  void release();

 private:
  bool set(void* page, bool on);

  int fd_ = -1;
  std::vector<void*> pages_;
};

}  // namespace railwire
