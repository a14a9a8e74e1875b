"""What a contender is, and what the user chose of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from railwire.bench.process import Launch


@dataclass(frozen=True)
class Setting:
    """What the user chose, and what Railwire's own processes have told about the NIC."""

    peer_python: str = sys.executable
    progress: str = "adaptive"
    receivers: int = 1  # engines in a target process; each owns a share of the buffer
    library: str = ""  # libfabric that Railwire uses
    link_depth: int = 0  # work requests that Railwire keeps in flight
    options: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, str] = ("cpu", "cpu")  # of initiator and target: "cpu" or "cuda:N"
    copy_sms: int | None = None  # multiprocessors that Railwire's copy kernel may use; None: its default
    memory: str = "registered"  # Railwire's: "registered" or "allocated" (with engine.allocate)
    two_hosts: bool = False  # the target is started by a listener there
    peer: str = ""  # the host of that listener

    @property
    def on_gpu(self) -> bool:
        return self.devices != ("cpu", "cpu")


@dataclass(frozen=True)
class Contender:
    """One engine. `launch` gives None for a NIC it has nothing for."""

    name: str
    launch: Callable[[str, Setting], Launch | None]
    missing: str
    ops: tuple[str, ...] = ("write", "pages", "read", "pingpong")


def kind(nic: str) -> str:
    return nic.partition(":")[0]
