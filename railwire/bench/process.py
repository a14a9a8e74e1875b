"""Starting the measured processes, and talking to them: one pair (target, initiator) per contender and NIC."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from railwire.bench.work import Work

PACKAGE = Path(__file__).resolve().parent.parent

# Runs a module of railwire.bench without importing railwire itself, whose native part belongs to one interpreter and
# one environment: argv is the package's directory, the module, and the module's own arguments.
_BOOTSTRAP = """
import runpy, sys, types
package = types.ModuleType("railwire")
package.__path__ = [sys.argv[1]]
sys.modules["railwire"] = package
module = sys.argv[2]
sys.argv[:3] = [module]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def built_tool(name: str) -> Path | None:
    """A library of C loops that was built with the package (``native/bench``)."""
    directories = [PACKAGE]
    native = sys.modules.get("railwire._native")
    if native is not None and native.__file__:
        directories.append(Path(native.__file__).parent)  # an editable install keeps what was built elsewhere
    for directory in directories:
        if (directory / "bench" / name).exists():
            return directory / "bench" / name
    return None


class RunnerError(Exception):
    """A measured process failed or fell silent; the message carries the end of what it printed."""


class MissingContender(RunnerError):
    """The contender is not installed in the interpreter that should run it."""


def answered(fields: dict[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """An answer as it came. Raises MissingContender or RunnerError if it says so."""
    if "missing" in fields:
        raise MissingContender(f"{where}{fields['missing']}")
    if "error" in fields:
        raise RunnerError(f"{name}: {fields['error']}")
    return fields


@dataclass(frozen=True)
class Launch:
    """How to start the processes of one contender."""

    module: str
    python: str = sys.executable
    isolated: bool = True  # without railwire's own __init__
    solo: bool = False  # both ends in one process
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, str] = ("cpu", "cpu")  # where the memory of initiator and target lies

    def command(self, config: str) -> list[str]:
        if self.isolated:
            return [self.python, "-c", _BOOTSTRAP, str(PACKAGE), self.module, config]
        return [self.python, "-m", self.module, config]


class RunnerProcess:
    """One measured process."""

    def __init__(
        self, launch: Launch, role: str, nic: str, cpus: Sequence[int], buffer_bytes: int, timeout_s: float
    ) -> None:
        config = {
            "role": role,
            "nic": nic,
            "cpus": list(cpus),
            "buffer_bytes": buffer_bytes,
            "timeout_s": timeout_s,
            "options": dict(launch.options),
            "device": launch.devices[role == "target"],
        }
        self.name = f"{launch.module.rpartition('.')[2]} {role}"
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            launch.command(json.dumps(config)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **launch.env},
        )
        self._pending = b""
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def tell(self, do: str, **fields: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise RunnerError(f"{self.name} has ended: {self.log_tail()}") from None

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RunnerError if the process failed, ended or was silent for too long."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout_s + 10.0  # the runner's own time-outs come first
        while b"\n" not in self._pending:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise RunnerError(f"{self.name} did not answer in time: {self.log_tail()}")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self._process.wait()
                raise RunnerError(f"{self.name} ended with {self._process.returncode}: {self.log_tail()}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        fields: dict[str, Any] = json.loads(line)
        return answered(fields, self.name)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        self.tell(do, **fields)
        return self.answer()

    def log_tail(self, nbytes: int = 600) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - nbytes))
        return self._log.read().decode(errors="replace").strip() or "(it printed nothing)"

    def close(self) -> None:
        with contextlib.suppress(RunnerError):
            self.tell("quit")
        self._selector.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def kill(self) -> None:
        self._process.kill()


@dataclass(frozen=True)
class Run:
    """One measured run. `seconds`: from the first submission until the receiver had seen everything (or, where the
    contender cannot tell the receiver, until the initiator's last completion)."""

    seconds: float
    us_p50: float
    us_p99: float
    verified: bool | None
    """None: the contender cannot tell."""
    seen_by_receiver: bool

    @classmethod
    def of(cls, work: Work, laps: Mapping[str, Any], served: Mapping[str, Any], verified: bool | None) -> Run:
        """From the answers of initiator and target."""
        seen = served["end_ns"] != 0
        return cls(
            seconds=((served if seen else laps)["end_ns"] - laps["start_ns"]) / 1e9,
            us_p50=laps["us_p50"],
            us_p99=laps["us_p99"],
            verified=verified,
            seen_by_receiver=seen or work.op == "pingpong",
        )


class Ends(Protocol):
    """Both ends of one contender over one NIC, connected."""

    version: str
    details: dict[str, Any]

    def run(self, work: Work, verify: bool = True) -> Run:
        """One run, from cleared memory."""

    def close(self) -> None: ...

    def kill(self) -> None:
        """At once: after a failure there is nothing to be polite about."""


class Target(Protocol):
    """The target's process, on this host or another one."""

    def tell(self, do: str, **fields: Any) -> None: ...

    def answer(self) -> dict[str, Any]: ...

    def ask(self, do: str, **fields: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...

    def kill(self) -> None: ...


class FarTarget(Target, Protocol):
    """On another host: it has started, and its clock has been compared with ours."""

    @property
    def clock_offset_ns(self) -> int: ...


def start(
    launch: Launch, nic: str, cpus: Sequence[int], buffer_bytes: int, timeout_s: float = 60.0,
    far: Callable[[], FarTarget] | None = None,
) -> Ends:  # fmt: skip
    """Starts the processes of a contender; `far` the target on another host. Raises MissingContender, RunnerError."""
    if launch.solo:
        return Solo(launch, nic, cpus, buffer_bytes, timeout_s)
    return Pair(launch, nic, cpus, buffer_bytes, timeout_s, far)


class Solo:
    """Both ends in one process (bench/solo_runner.py)."""

    def __init__(
        self, launch: Launch, nic: str, cpus: Sequence[int], buffer_bytes: int, timeout_s: float = 60.0
    ) -> None:
        self._process = RunnerProcess(launch, "both", nic, cpus, buffer_bytes, timeout_s)
        try:
            self._process.answer()
            offer = self._process.ask("offer")
        except BaseException:
            self.kill()
            raise
        self.version: str = offer["version"]
        self.details: dict[str, Any] = offer["details"]

    def run(self, work: Work, verify: bool = True) -> Run:
        self._process.ask("prepare", work=work.to_dict())
        answer = self._process.ask("run")
        verified = verify and self._process.ask("verify")["verified"]
        return Run.of(work, answer["laps"], answer["served"], verified)

    def close(self) -> None:
        self._process.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.close()


class Pair:
    """Target and initiator of one contender over one NIC, connected. `cpus`: one core each, or empty."""

    def __init__(
        self, launch: Launch, nic: str, cpus: Sequence[int], buffer_bytes: int, timeout_s: float = 60.0,
        far: Callable[[], FarTarget] | None = None,
    ) -> None:  # fmt: skip
        cores = [list(cpus[i : i + 1]) for i in range(2)] if len(cpus) >= 2 else [list(cpus)] * 2
        processes: list[Target] = []
        self.target: Target
        self._clock_offset_ns = 0
        try:
            if far is not None:
                there = far()
                self._clock_offset_ns = there.clock_offset_ns
                self.target = there
            else:
                self.target = RunnerProcess(launch, "target", nic, cores[0], buffer_bytes, timeout_s)
            processes.append(self.target)
            self.initiator = RunnerProcess(launch, "initiator", nic, cores[1], buffer_bytes, timeout_s)
            processes.append(self.initiator)
            for process in processes[far is not None :]:
                process.answer()
            offers = [process.ask("offer") for process in processes]
            self.version: str = offers[0]["version"]
            self.details: dict[str, Any] = offers[1].get("details", {})
            self.target.tell("connect", offer=offers[1]["offer"])
            self.initiator.tell("connect", offer=offers[0]["offer"])
            for process in processes:
                process.answer()
        except BaseException:
            for process in processes:
                process.kill()
                process.close()
            raise

    def run(self, work: Work, verify: bool = True) -> Run:
        fields = work.to_dict()
        self.target.tell("prepare", work=fields)
        self.initiator.tell("prepare", work=fields)
        self.target.answer()
        self.initiator.answer()
        self.target.tell("serve")
        self.target.answer()
        laps = self.initiator.ask("go")
        served = self.target.answer()
        if served["end_ns"]:
            served["end_ns"] -= self._clock_offset_ns
        verified = verify and self._checker(work).ask("verify")["verified"]
        return Run.of(work, laps, served, verified)

    def _checker(self, work: Work) -> Target:
        return self.initiator if work.checked_at(initiator=True) else self.target

    def close(self) -> None:
        for process in (self.initiator, self.target):
            process.close()

    def kill(self) -> None:
        for process in (self.initiator, self.target):
            process.kill()
        self.close()
