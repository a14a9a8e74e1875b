"""Other people's engines as contenders of `railwire bench p2p --against`: not in the wheel, see ../README.md.

``railwire.bench.contenders`` imports this where it can. The runners are started in processes of their own, by an
interpreter that has the engine (requirements.txt) and numpy.
"""

from __future__ import annotations

import os
from pathlib import Path

from railwire.bench.contender import Contender, Setting, kind
from railwire.bench.process import Launch


def _path() -> dict[str, str]:
    """With which the measured processes find this package."""
    here = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


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


CONTENDERS = (
    Contender("nixl", _nixl, "not installed: pip install --no-deps nixl nixl-cu12"),
    Contender("mooncake", _mooncake, "not installed: pip install mooncake-transfer-engine-non-cuda"),
)
