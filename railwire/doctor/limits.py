"""What this process is allowed: locked memory, reading a neighbour's memory (CMA), /dev/shm, huge pages."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

from railwire.topology import sysfs

_ANSWER_S = 5.0
_LENGTH = 8
_MISMATCH = 255


@dataclass(frozen=True)
class CrossMemory:
    """Cross Memory Attach: whether one process may copy from another one's memory, as shm does for large writes."""

    ptrace_scope: int | None
    """/proc/sys/kernel/yama/ptrace_scope; None where the kernel has no Yama."""
    parent_reads_child: bool
    child_reads_parent: bool
    """The harder of the two: what unrelated processes of one user may do."""
    error: str
    """Why one of them failed; empty if both worked."""

    @property
    def works(self) -> bool:
        """In both directions."""
        return self.parent_reads_child and self.child_reads_parent


@dataclass(frozen=True)
class SharedMemory:
    """/dev/shm, which libfabric:shm needs; our own shm NIC does not."""

    total_bytes: int
    free_bytes: int
    writable: bool


@dataclass(frozen=True)
class HugePages:
    """What ``engine.allocate`` can get."""

    transparent: str
    """``always``, ``madvise`` or ``never``; empty if the kernel has none. Either of the first two is enough."""
    reserved: int
    """Pages of /proc/sys/vm/nr_hugepages; Railwire does not need them."""


@dataclass(frozen=True)
class Limits:
    """What this process is allowed."""

    memlock_bytes: int | None
    """Soft limit of locked memory; None: unlimited. RDMA NICs lock what is registered, tcp and shm do not."""
    cross_memory: CrossMemory
    shared_memory: SharedMemory
    huge_pages: HugePages
    container: bool
    """This seems to be a container."""
    open_files: int | None = None
    """Soft limit of open files; None: unlimited. A connection takes some at both ends."""


def examine(root: Path = sysfs.ROOT) -> Limits:
    """Looks, and tries. Forks a child for a moment."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        cross_memory=cross_memory(root),
        shared_memory=shared_memory(root / "dev/shm"),
        huge_pages=huge_pages(root),
        container=any((root / name).exists() for name in (".dockerenv", "run/.containerenv")),
        open_files=None if files == resource.RLIM_INFINITY else files,
    )


def shared_memory(folder: Path) -> SharedMemory:
    """Size of the file system behind a folder; all zero if there is none."""
    try:
        facts = os.statvfs(folder)
    except OSError:
        return SharedMemory(0, 0, False)
    return SharedMemory(
        facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize, os.access(folder, os.W_OK | os.X_OK)
    )


def huge_pages(root: Path) -> HugePages:
    """The setting in brackets of ``always [madvise] never``."""
    words = sysfs.read_text(root / "sys/kernel/mm/transparent_hugepage/enabled").split()
    chosen = [word.strip("[]") for word in words if word.startswith("[")]
    return HugePages(chosen[0] if chosen else "", sysfs.read_number(root / "proc/sys/vm/nr_hugepages", 0))


def cross_memory(root: Path = sysfs.ROOT) -> CrossMemory:
    """Tries process_vm_readv between this process and a child, in both directions."""
    scope = sysfs.read_number(root / "proc/sys/kernel/yama/ptrace_scope", -1)
    buffer = ctypes.create_string_buffer(b"before", _LENGTH)  # lies at the same address in the child
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks beside threads: the child only makes system calls
        child = os.fork()
    if child == 0:
        try:
            buffer.value = b"child"
            os.close(to_child)
            os.read(from_parent, 1)
            code = _read_from(os.getppid(), buffer, b"parent")
            os.write(to_parent, bytes([min(code, _MISMATCH)]))
            os.read(from_parent, 1)  # until the parent is done
        finally:
            os._exit(0)
    try:
        os.close(to_parent)
        os.close(from_parent)
        buffer.value = b"parent"
        os.write(to_child, b"g")
        ready, _, _ = select.select([from_child], [], [], _ANSWER_S)
        answer = os.read(from_child, 1) if ready else b""
        upwards = answer[0] if answer else errno.ETIMEDOUT
        downwards = _read_from(child, buffer, b"child")
    finally:
        os.close(to_child)
        os.close(from_child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    failed = upwards or downwards
    return CrossMemory(
        ptrace_scope=None if scope < 0 else scope,
        parent_reads_child=downwards == 0,
        child_reads_parent=upwards == 0,
        error="" if not failed else "other bytes came" if failed == _MISMATCH else os.strerror(failed),
    )


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _read_from(pid: int, there: ctypes.Array[ctypes.c_char], expected: bytes) -> int:
    """Reads the other process's copy of ``there``. Returns 0, an errno, or _MISMATCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return errno.ENOSYS
    here = ctypes.create_string_buffer(_LENGTH)
    local, remote = _IoVec(ctypes.addressof(here), _LENGTH), _IoVec(ctypes.addressof(there), _LENGTH)
    read = libc.process_vm_readv
    read.restype = ctypes.c_ssize_t
    count = read(
        ctypes.c_int(pid),
        ctypes.byref(local),
        ctypes.c_ulong(1),
        ctypes.byref(remote),
        ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )
    if count != _LENGTH:
        return ctypes.get_errno() or errno.EIO
    return 0 if here.value == expected else _MISMATCH
