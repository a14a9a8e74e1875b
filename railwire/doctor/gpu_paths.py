"""Which GPUs of this host reach each other's memory: really tried, by two processes and a write over shm.

Each GPU gets a process that offers a region and one that writes to the others', so that the process that asks makes no
context on any GPU. ``python -m railwire.doctor.gpu_paths target|writer ORDINAL`` are their programs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from railwire.doctor.report import GpuPath

_NBYTES = 4096
_SECONDS = 40.0  # for a process to open its GPU and do its part
_MOST_GPUS = 16


def try_all(ordinals: Sequence[int], seconds: float = _SECONDS) -> tuple[GpuPath, ...]:
    """One row for each ordered pair, also of a GPU with itself (two processes that share it).

    Args:
        ordinals: of the GPUs as this process numbers them; the first 16 are tried.
        seconds: limit for each of the two steps.
    """
    chosen = list(ordinals)[:_MOST_GPUS]
    targets = [_start("target", ordinal) for ordinal in chosen]
    try:
        offers: list[dict[str, str]] = []
        for ordinal, process in zip(chosen, targets, strict=True):
            offers.append({"to": f"cuda:{ordinal}", **_answer(process, seconds)})
        writers = [_start("writer", ordinal) for ordinal in chosen]
        rows: list[GpuPath] = []
        for ordinal, process in zip(chosen, writers, strict=True):
            answer = _answer(process, seconds, json.dumps(offers))
            for offer in offers:
                why = offer.get("error") or answer.get("error") or answer.get(offer["to"], "no answer")
                rows.append(GpuPath(f"cuda:{ordinal}", offer["to"], not why, why))
        return tuple(rows)
    finally:
        for process in targets:
            process.kill()
            process.wait()


def _start(role: str, ordinal: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "railwire.doctor.gpu_paths", role, str(ordinal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ),
    )


def _answer(process: subprocess.Popen[str], seconds: float, question: str = "") -> dict[str, str]:
    """The process's one line; ``{"error": ...}`` if there is none in time."""
    assert process.stdin is not None and process.stdout is not None
    alarm = threading.Timer(seconds, process.kill)
    alarm.start()
    try:
        if question:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        answer: dict[str, str] = json.loads(line) if line else {"error": f"no answer within {seconds:g} s"}
        return answer
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    finally:
        alarm.cancel()


def _target(device: str) -> None:
    from railwire.engine import TransferEngine

    engine = TransferEngine(device, nics=["shm"])
    region = engine.allocate(_NBYTES, device=device)
    print(json.dumps({"address": bytes(engine.address).hex(), "region": bytes(region.descriptor).hex()}), flush=True)
    sys.stdin.readline()  # until it is killed


def _writer(device: str) -> None:
    from railwire.engine import TransferEngine
    from railwire.errors import RailwireError
    from railwire.memory import RemoteRegion
    from railwire.peer import EngineAddress

    engine = TransferEngine(device, nics=["shm"])
    region = engine.allocate(_NBYTES, device=device)
    results: dict[str, str] = {}
    for offer in json.loads(sys.stdin.readline()):
        if "error" in offer:
            continue
        try:
            engine.connect(EngineAddress.from_bytes(bytes.fromhex(offer["address"])))
            engine.write(region, RemoteRegion.from_bytes(bytes.fromhex(offer["region"]))).wait(10)
            results[offer["to"]] = ""
        except (RailwireError, ValueError, TimeoutError) as error:
            results[offer["to"]] = str(error)
    print(json.dumps(results), flush=True)


def main() -> None:
    """The program of one process."""
    role, ordinal = sys.argv[1:3]
    try:
        {"target": _target, "writer": _writer}[role](f"cuda:{ordinal}")
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
