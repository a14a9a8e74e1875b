"""The far half of the first day on new hardware (``bench/first_day.py``): one process with one engine, which does what
lines of JSON on its standard input say. Standard input is the connection itself."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from railwire.bench import buffers
from railwire.bench.remote import kind_of
from railwire.cuda import GpuMemory
from railwire.engine import TransferEngine

PERIOD = 67_108_859  # of the bytes that are sent: a prime, so that no page looks like another of the same place
_MODULES = ("nvidia", "nvidia_peermem", "nv_peer_mem", "efa", "efa_nv_peermem", "gdrdrv", "mlx5_ib", "ib_core")


def payload(nbytes: int, seed: int) -> buffers.Bytes:
    """What a source of so many bytes holds."""
    return np.resize(buffers.pattern(min(nbytes, PERIOD), seed), nbytes)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def facts() -> dict[str, Any]:
    """What a report needs to be understood elsewhere. Only what /sys and /proc show to everybody."""
    devices = Path("/sys/class/infiniband")
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "modules": {name: _read(Path("/sys/module") / name / "version") or "loaded" for name in _MODULES
                    if (Path("/sys/module") / name).exists()},
        "rdma": {one.name: {"firmware": _read(one / "fw_ver"), "board": _read(one / "board_id"),
                            "type": _read(one / "hca_type")} for one in sorted(devices.glob("*"))},
        "nvidia_driver": _read(Path("/proc/driver/nvidia/version")).partition("\n")[0],
        "memlock": [soft, hard],
        "open_files": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
        "huge_pages": _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
    }  # fmt: skip


def doctor() -> dict[str, Any]:
    """`railwire doctor --json`."""
    answer = subprocess.run(
        [sys.executable, "-c", "from railwire.cli import app; app()", "doctor", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


class Memory:
    """Host or GPU memory with the same few operations; registered with an engine."""

    def __init__(self, engine: TransferEngine, device: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self._host = np.zeros(nbytes, dtype=np.uint8)
        self._gpu = None if device == "cpu" else GpuMemory(nbytes, int(device.partition(":")[2]))
        self.region = engine.register(self._host if self._gpu is None else (self._gpu.address, nbytes))
        if self._gpu is not None:
            self._gpu.fill(self._host)

    def write(self, data: buffers.Bytes) -> None:
        """To its beginning; the rest is cleared."""
        self._host[: len(data)] = data
        self._host[len(data) :] = 0
        if self._gpu is not None:
            self._gpu.fill(self._host)

    def read(self) -> buffers.Bytes:
        if self._gpu is not None:
            self._gpu.read_into(self._host)
        return self._host


class Agent:
    """Answers commands. ``die`` and ``quit`` end the process."""

    def __init__(self, nics: list[str]) -> None:
        self._nics = nics
        self._engine: TransferEngine | None = None
        self._memory: Memory | None = None

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        do = command["do"]
        if do == "facts":
            return facts()
        if do == "doctor":
            return doctor()
        if do == "open":
            own = [nic for nic in self._nics if kind_of(nic) == command["kind"]]
            nics: Any = own[: command["count"]] or [command["kind"]]
            self._engine = TransferEngine(command["device"], nics=nics, liveness=float(command["liveness"]))
            self._memory = Memory(self._engine, command["device"], int(command["nbytes"]))
            return {
                "address": bytes(self._engine.address).hex(),
                "descriptor": bytes(self._memory.region.descriptor).hex(),
                "nics": [[nic.name, nic.provider, nic.warning] for nic in self._engine.nics],
            }
        if do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._engine is None or self._memory is None:
            raise ValueError("open comes first")
        match do:
            case "expect":
                self._engine.counter(command["imm"]).expect(command["count"], timeout=command["timeout"]).wait()
                return {}
            case "answer":  # a bare immediate to everyone who has connected
                self._engine.barrier(self._engine.peer_group(self._engine.peers), command["imm"]).wait(20)
                return {}
            case "clear":
                self._memory.write(np.zeros(0, dtype=np.uint8))
                return {}
            case "right":
                nbytes, memory = command["nbytes"], self._memory.read()
                wanted = payload(nbytes, command["seed"])
                return {"right": bool(np.array_equal(memory[:nbytes], wanted) and not memory[nbytes:].any())}
            case "revoke":
                self._memory.region.revoke()
                return {
                    "crc": zlib.crc32(self._memory.read().data),
                    "descriptor": bytes(self._memory.region.descriptor).hex(),
                }
            case "crc":
                return {"crc": zlib.crc32(self._memory.read().data)}
            case other:
                raise ValueError(f"unknown command {other!r}")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def main() -> None:
    answers = os.fdopen(os.dup(0), "w", encoding="utf-8")  # the connection goes both ways
    os.dup2(2, 1)
    agent = Agent(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "quit":
            break
        try:
            answer = agent.handle(command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    agent.close()


if __name__ == "__main__":
    main()
