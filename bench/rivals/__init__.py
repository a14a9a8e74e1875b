"""What others provide, as contenders of `railwire bench p2p --against`: other projects' engines, the vendors' programs
and a bare libfabric loop. Not in the wheel, see ../README.md.

``railwire.bench.contenders`` imports this where it can. The runners are started in processes of their own; those of
other engines by an interpreter that has the engine (requirements.txt) and numpy.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from railwire.bench.contender import Contender, Setting, kind
from railwire.bench.process import Launch, built_tool

RAW_TOOL = "_raw_libfabric.so"


def _path() -> dict[str, str]:
    """With which the measured processes find this package."""
    here = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


def raw_tool() -> Path | None:
    """The bare loop that an editable install has built; RAILWIRE_RAW_LOOP names another."""
    explicit = os.environ.get("RAILWIRE_RAW_LOOP")
    return Path(explicit) if explicit else built_tool(RAW_TOOL)


def _raw(nic: str, setting: Setting) -> Launch | None:
    if kind(nic) not in ("tcp", "shm", "efa", "libfabric") or setting.on_gpu:
        return None
    options = {
        "tool": str(raw_tool() or ""),
        "libfabric": setting.library or os.environ.get("RAILWIRE_LIBFABRIC", "libfabric.so.1"),
        "wr_window": str(setting.link_depth),
    }
    return Launch("rivals.raw_runner", env=_path(), options=options)


def _raw_landed(nic: str, setting: Setting) -> Launch | None:
    launch = _raw(nic, setting)
    return launch and replace(launch, options={**launch.options, "landed": "yes"})


def _perftest(nic: str, setting: Setting) -> Launch | None:
    if kind(nic) != "verbs" or setting.on_gpu:
        return None
    # On one host its two programs are started beside each other, and take their cores from the kernel.
    options = {"wr_window": str(setting.link_depth or 128), "host": setting.peer}
    solo = not setting.two_hosts
    return Launch("rivals.perftest_runner", isolated=False, solo=solo, env=_path(), options=options)


def _fi_rma_bw(nic: str, setting: Setting) -> Launch | None:
    if not setting.two_hosts or not (kind(nic) == "efa" or nic.startswith("libfabric:")):
        return None
    options = {"wr_window": str(setting.link_depth or 64), "host": setting.peer}
    return Launch("rivals.fabtests_runner", isolated=False, env=_path(), options=options, devices=setting.devices)


def _nixl(nic: str, setting: Setting) -> Launch | None:
    # UCX insists on a transport with failure handling beside shared memory; the data still goes by CMA.
    transports = {"tcp": "tcp", "shm": "shm,tcp"}.get(kind(nic))
    if transports is None:
        return None
    env = {**_path(), "UCX_TLS": transports, "NIXL_LOG_LEVEL": "WARN"}
    if setting.on_gpu:
        # Its list option is off by default, and twice as fast or more. On one host UCX finds the way by itself.
        env["NIXL_UCX_SGL_ENABLE"] = "y"
        env["UCX_TLS"] = "tcp,cuda_copy,self" if kind(nic) == "tcp" else "all"
    return Launch("rivals.nixl_runner", python=setting.peer_python, env=env, devices=setting.devices)


def _mooncake(nic: str, setting: Setting) -> Launch | None:
    if kind(nic) != "tcp" or setting.on_gpu:
        return None
    env = {**_path(), "MC_FORCE_TCP": "1", "GLOG_minloglevel": "2"}
    return Launch("rivals.mooncake_runner", python=setting.peer_python, env=env)


_NO_RAW_LOOP = "no bare loop: pip install --editable a checkout, where libfabric's headers are (apt-get: libfabric-dev)"

CONTENDERS = (
    Contender("raw", _raw, _NO_RAW_LOOP),
    Contender("raw-landed", _raw_landed, _NO_RAW_LOOP, ops=("write",)),
    Contender("perftest", _perftest, "not installed: apt-get install perftest", ops=("write", "pages", "pingpong")),
    Contender("fi_rma_bw", _fi_rma_bw, "not installed: fabtests (the EFA installer has them)", ops=("write", "pages")),
    Contender("nixl", _nixl, "not installed: pip install --no-deps nixl nixl-cu12"),
    Contender("mooncake", _mooncake, "not installed: pip install mooncake-transfer-engine-non-cuda"),
)
