"""Who is measured, over which NICs, and how their processes are started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from railwire.bench.process import PACKAGE, Launch

RAW_TOOL = "_raw_libfabric.so"
PLAIN_TOOL = "_plain_loops.so"


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


def _kind(nic: str) -> str:
    return nic.partition(":")[0]


def _railwire(nic: str, setting: Setting) -> Launch | None:
    options = {"progress": setting.progress, "receivers": str(setting.receivers), "memory": setting.memory}
    if setting.copy_sms is not None:
        options["copy_sms"] = str(setting.copy_sms)
    if _kind(nic) == "sim":
        options["receivers"] = "1"  # a simulated NIC's name is one engine's
        return Launch("railwire.bench.solo_runner", isolated=False, solo=True, options=options)
    return Launch("railwire.bench.railwire_runner", isolated=False, options=options, devices=setting.devices)


def raw_tool() -> Path | None:
    """The bare loop that was built with the package; RAILWIRE_RAW_LOOP names another."""
    explicit = os.environ.get("RAILWIRE_RAW_LOOP")
    return Path(explicit) if explicit else _built(RAW_TOOL)


def _built(tool: str) -> Path | None:
    directories = [PACKAGE]
    native = sys.modules.get("railwire._native")
    if native is not None and native.__file__:
        directories.append(Path(native.__file__).parent)  # an editable install keeps what was built elsewhere
    for directory in directories:
        if (directory / "bench" / tool).exists():
            return directory / "bench" / tool
    return None


def _plain(nic: str, setting: Setting) -> Launch | None:
    if _kind(nic) not in ("tcp", "shm") or setting.on_gpu:
        return None
    return Launch("railwire.bench.plain_runner", options={"tool": str(_built(PLAIN_TOOL) or "")})


def _raw(nic: str, setting: Setting) -> Launch | None:
    if _kind(nic) not in ("tcp", "shm", "efa", "libfabric") or setting.on_gpu:
        return None
    tool = raw_tool()
    options = {
        "tool": str(tool) if tool else "",
        "libfabric": setting.library or os.environ.get("RAILWIRE_LIBFABRIC", "libfabric.so.1"),
        "wr_window": str(setting.link_depth),
    }
    return Launch("railwire.bench.raw_runner", options=options)


def _raw_landed(nic: str, setting: Setting) -> Launch | None:
    launch = _raw(nic, setting)
    return launch and replace(launch, options={**launch.options, "landed": "yes"})


def _perftest(nic: str, setting: Setting) -> Launch | None:
    if _kind(nic) != "verbs" or setting.on_gpu:
        return None
    # On one host its two programs are started beside each other, and take their cores from the kernel.
    options = {"wr_window": str(setting.link_depth or 128), "host": setting.peer}
    return Launch("railwire.bench.perftest_runner", isolated=False, solo=not setting.two_hosts, options=options)


def _fi_rma_bw(nic: str, setting: Setting) -> Launch | None:
    if not setting.two_hosts or not (_kind(nic) == "efa" or nic.startswith("libfabric:")):
        return None
    options = {"wr_window": str(setting.link_depth or 64), "host": setting.peer}
    return Launch("railwire.bench.fabtests_runner", isolated=False, options=options, devices=setting.devices)


def _nixl(nic: str, setting: Setting) -> Launch | None:
    # UCX insists on a transport with failure handling beside shared memory; the data still goes by CMA.
    transports = {"tcp": "tcp", "shm": "shm,tcp"}.get(_kind(nic))
    if transports is None:
        return None
    env = {"UCX_TLS": transports, "NIXL_LOG_LEVEL": "WARN"}
    if setting.on_gpu:
        # Its list option is off by default, and twice as fast or more. On one host UCX finds the way by itself.
        env["NIXL_UCX_SGL_ENABLE"] = "y"
        env["UCX_TLS"] = "tcp,cuda_copy,self" if _kind(nic) == "tcp" else "all"
    return Launch("railwire.bench.nixl_runner", python=setting.peer_python, env=env, devices=setting.devices)


def _mooncake(nic: str, setting: Setting) -> Launch | None:
    if _kind(nic) != "tcp" or setting.on_gpu:
        return None
    env = {"MC_FORCE_TCP": "1", "GLOG_minloglevel": "2"}
    return Launch("railwire.bench.mooncake_runner", python=setting.peer_python, env=env)


_NO_RAW_LOOP = "this build of railwire has no bare libfabric loop (libfabric's headers were missing)"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "railwire",
            _railwire,
            "railwire cannot be imported",
            ops=("write", "pages", "scatter", "read", "send", "pingpong"),
        ),
        Contender("plain", _plain, "this build of railwire has no plain loops", ops=("write", "pages", "pingpong")),
        Contender("raw", _raw, _NO_RAW_LOOP),
        Contender("raw-landed", _raw_landed, _NO_RAW_LOOP, ops=("write",)),
        Contender("perftest", _perftest, "not installed: apt-get install perftest", ops=("write", "pages", "pingpong")),
        Contender(
            "fi_rma_bw", _fi_rma_bw, "not installed: fabtests (the EFA installer has them)", ops=("write", "pages")
        ),
        Contender("nixl", _nixl, "not installed: pip install --no-deps nixl nixl-cu12"),
        Contender("mooncake", _mooncake, "not installed: pip install mooncake-transfer-engine-non-cuda"),
    )
}
