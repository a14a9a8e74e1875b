"""The measured process's side of a benchmark: a loop of JSON lines around one contender.

The parent sends one command a line on standard input and gets one answer a line on (what was) standard output:

    offer, connect, prepare, serve (target: until everything has arrived), go (initiator), verify, quit

Runs in the measured processes: standard library and numpy only.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from railwire.bench import buffers
from railwire.bench.work import Laps, Work


@dataclass(frozen=True)
class RunnerConfig:
    """How the parent wants a process set up.

    `nic` is a NIC specification as `TransferEngine` takes it; `cpus` the cores it may use (empty: any); `options` is
    for the one contender; `device` is where the memory under test lies.
    """

    role: str
    nic: str
    cpus: tuple[int, ...] = ()
    buffer_bytes: int = 64 << 20
    timeout_s: float = 60.0
    options: dict[str, str] | None = None
    device: str = "cpu"

    @property
    def initiator(self) -> bool:
        return self.role == "initiator"

    def option(self, name: str, default: str = "") -> str:
        return (self.options or {}).get(name, default)


class Runner(ABC):
    """One contender in one role. `buffer` is the memory under test: source or destination, by the work."""

    hard_exit: ClassVar[bool] = False  # end with os._exit: the contender crashes in its own clean-up

    def __init__(self, config: RunnerConfig, buffer: buffers.Bytes) -> None:
        self.config = config
        self.buffer = buffer

    def upload(self) -> None:  # noqa: B027 - most have nothing to do
        """With a `device` of a GPU: copies `buffer` to the memory under test."""

    def download(self) -> None:  # noqa: B027
        """With a `device` of a GPU: copies the memory under test to `buffer`."""

    @abstractmethod
    def version(self) -> str:
        """Name and version of what is measured, as it reports them."""

    def details(self) -> dict[str, Any]:
        """What the parent may want to give the other contenders too."""
        return {}

    @abstractmethod
    def offer(self) -> bytes:
        """What the other process needs to reach this one."""

    @abstractmethod
    def connect(self, offer: bytes) -> None: ...

    @abstractmethod
    def prepare(self, work: Work) -> None:
        """Sets up whatever a user of this contender would set up once; not measured."""

    @abstractmethod
    def initiate(self, work: Work) -> Laps:
        """The initiator's part of a run."""

    @abstractmethod
    def serve(self, work: Work) -> int:
        """The target's part: returns the monotonic time, ns, at which everything had arrived (0: it cannot know)."""

    @abstractmethod
    def close(self) -> None:
        """Orderly end."""

    def deadline(self) -> float:
        """Monotonic time, s, at which a wait gives up."""
        return time.monotonic() + self.config.timeout_s


class Handler(Protocol):
    """Answers the parent's commands."""

    @property
    def hard_exit(self) -> bool: ...

    def handle(self, command: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Session:
    """Answers the parent's commands with one runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.work: Work | None = None
        self.filled_from: int | None = None
        self.hard_exit = runner.hard_exit

    def close(self) -> None:
        self.runner.close()

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        runner = self.runner
        match command["do"]:
            case "offer":
                offer = base64.b64encode(runner.offer()).decode()
                return {"offer": offer, "version": runner.version(), "details": runner.details()}
            case "connect":
                runner.connect(base64.b64decode(command["offer"]))
                return {}
            case "prepare":
                self.prepare(Work.from_dict(command["work"]))
                return {"huge_page_bytes": buffers.huge_page_bytes(runner.buffer)}
            case "go":
                return runner.initiate(self._work()).summary()
            case "serve":
                return {"end_ns": runner.serve(self._work())}
            case "verify":
                runner.download()
                return {"verified": buffers.verify(self._work(), runner.buffer)}
            case other:
                raise ValueError(f"unknown command {other!r}")

    def _work(self) -> Work:
        if self.work is None:
            raise ValueError("no work was prepared")
        return self.work

    def prepare(self, work: Work) -> None:
        """Fills the source, clears the destination, and lets the contender prepare when the work is a new one."""
        buffer, initiator = self.runner.buffer, self.runner.config.initiator
        if work.op == "pingpong" or not work.source_at(initiator):
            buffer[:] = 0
            self.filled_from = None
            if work.source_at(initiator):
                buffer[: work.page_bytes] = buffers.pattern(work.page_bytes, work.seed)
        elif self.filled_from != work.seed:
            buffer[:] = buffers.pattern(len(buffer), work.seed)
            self.filled_from = work.seed
        self.runner.upload()
        if self.work is None or self.work.with_rounds(1) != work.with_rounds(1):
            self.runner.prepare(work)
        self.work = work


def main(make: Callable[[RunnerConfig, buffers.Bytes], Runner]) -> None:
    """Runs a runner process: its configuration is the last argument, as JSON."""
    serve_commands(lambda config, buffer: Session(make(config, buffer)))


def serve_commands(make: Callable[[RunnerConfig, buffers.Bytes], Handler]) -> None:
    """As main(), for any handler."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not get between the answers

    def answer(fields: dict[str, Any]) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    fields = json.loads(sys.argv[-1])
    config = RunnerConfig(**{**fields, "cpus": tuple(fields.get("cpus", ()))})
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    handler: Handler | None = None
    code = 0
    try:
        handler = make(config, buffers.allocate(config.buffer_bytes))
        answer({"ready": True})
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "quit":
                break
            if command["do"] == "serve":
                answer({"armed": True})
            answer(handler.handle(command))
        handler.close()
    except ImportError as error:
        traceback.print_exc()
        answer({"missing": str(error)})
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        code = 1
    if handler is not None and handler.hard_exit:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
