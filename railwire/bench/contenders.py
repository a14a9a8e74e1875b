"""Who is measured, over which NICs, and how their processes are started."""

from __future__ import annotations

import importlib
import sys

from railwire.bench.contender import Contender, Setting, kind
from railwire.bench.process import PACKAGE, Launch, built_tool

PLAIN_TOOL = "_plain_loops.so"


def _railwire(nic: str, setting: Setting) -> Launch | None:
    options = {"progress": setting.progress, "receivers": str(setting.receivers), "memory": setting.memory}
    if setting.copy_sms is not None:
        options["copy_sms"] = str(setting.copy_sms)
    if kind(nic) == "sim":
        options["receivers"] = "1"  # a simulated NIC's name is one engine's
        return Launch("railwire.bench.solo_runner", isolated=False, solo=True, options=options)
    return Launch("railwire.bench.railwire_runner", isolated=False, options=options, devices=setting.devices)


def _plain(nic: str, setting: Setting) -> Launch | None:
    if kind(nic) not in ("tcp", "shm") or setting.on_gpu:
        return None
    return Launch("railwire.bench.plain_runner", options={"tool": str(built_tool(PLAIN_TOOL) or "")})


RIVALS = ("raw", "raw-landed", "perftest", "fi_rma_bw", "nixl", "mooncake")
"""What others provide: ``bench/rivals`` of the repository measures them, and is not in the wheel."""
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
        *_rivals(),
    )
}
