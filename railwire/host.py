"""Who and where this process is: what two engines compare to know whether shared memory connects them."""

from __future__ import annotations

import os
import resource
import uuid
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def host_id() -> str:
    """Equal for two processes exactly if they see the same kernel, the same process numbers and the same network (in
    which the unix sockets of the shm NIC have their names)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"unknown/{uuid.uuid4()}"  # equal to nobody's: no shared memory then


def process_start(pid: int) -> int:
    """Clock ticks after boot at which the process began (field 22 of /proc/PID/stat); 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


SPARE_FILES = 24
"""Descriptors that must be to spare before a connection is made: what a few connections take at most."""


def files_problem(name: str) -> str:
    """Why engine ``name`` of this process takes no further connection: the limit of open files is near. Empty if it is
    not. Beyond it nothing works any more, accepting and being told of a peer's death included."""
    held: list[int] = []
    try:
        for _ in range(SPARE_FILES):
            held.append(os.eventfd(0) if hasattr(os, "eventfd") else os.open("/dev/null", os.O_RDONLY))
    except OSError:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"{name} is at the limit of open files of its process ({soft}): it takes no further connection before "
            "others have closed. Raise it there: ulimit -n, LimitNOFILE= in systemd, docker run --ulimit nofile="
        )
    finally:
        for fd in held:
            os.close(fd)
    return ""
