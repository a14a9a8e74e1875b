"""Who is measured, over which NICs, and how their processes are started."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

from railwire.bench.contender import Contender, Setting, kind
from railwire.bench.process import PACKAGE, Launch

RAW_TOOL = "_raw_libfabric.so"
PLAIN_TOOL = "_plain_loops.so"


def _railwire(nic: str, setting: Setting) -> Launch | None:
    options = {"progress": setting.progress, "receivers": str(setting.receivers), "memory": setting.memory}
    if setting.copy_sms is not None:
        options["copy_sms"] = str(setting.copy_sms)
    if kind(nic) == "sim":
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
    if kind(nic) not in ("tcp", "shm") or setting.on_gpu:
        return None
    return Launch("railwire.bench.plain_runner", options={"tool": str(_built(PLAIN_TOOL) or "")})


def _raw(nic: str, setting: Setting) -> Launch | None:
    if kind(nic) not in ("tcp", "shm", "efa", "libfabric") or setting.on_gpu:
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
    if kind(nic) != "verbs" or setting.on_gpu:
        return None
    # On one host its two programs are started beside each other, and take their cores from the kernel.
    options = {"wr_window": str(setting.link_depth or 128), "host": setting.peer}
    return Launch("railwire.bench.perftest_runner", isolated=False, solo=not setting.two_hosts, options=options)


def _fi_rma_bw(nic: str, setting: Setting) -> Launch | None:
    if not setting.two_hosts or not (kind(nic) == "efa" or nic.startswith("libfabric:")):
        return None
    options = {"wr_window": str(setting.link_depth or 64), "host": setting.peer}
    return Launch("railwire.bench.fabtests_runner", isolated=False, options=options, devices=setting.devices)


_NO_RAW_LOOP = "this build of railwire has no bare libfabric loop (libfabric's headers were missing)"

RIVALS = ("nixl", "mooncake")
"""Other people's engines: who measures them is in ``bench/rivals`` of the repository, and not in the wheel."""
WHERE_RIVALS_ARE = "is measured from a checkout of Railwire only: set PYTHONPATH to its bench/ folder"


def _rivals() -> tuple[Contender, ...]:
    """Those that can be measured here: beside an editable install, or where ``rivals`` can be imported."""
    beside = PACKAGE.parent / "bench"
    if (beside / "rivals" / "__init__.py").exists() and str(beside) not in sys.path:
        sys.path.append(str(beside))
    try:
        found: tuple[Contender, ...] = importlib.import_module("rivals").CONTENDERS
    except ModuleNotFoundError as error:
        if error.name != "rivals":
            raise
        return ()
    return found


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
        *_rivals(),
    )
}
