"""Runs the demo of weight updates: starts the processes, gives them their orders, checks what they answer."""

from __future__ import annotations

import importlib.resources
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from railwire.errors import RailwireError
from railwire.weights.rendezvous import tcp_store

TRAINERS, RECEIVERS = 4, 2
_PATIENCE = 240.0
HOST = "127.0.0.1"


class Failed(RailwireError):
    """The demo did not show what it is to show."""


@dataclass
class Act:
    """One update, as the trainers told it. ``spans``: by rank, [stage, name, begin, end]."""

    version: int
    seconds: float
    nbytes: dict[int, dict[str, int]]
    spans: dict[int, list[tuple[str, str, float, float]]]


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)
    texts: list[tuple[int, str]] = field(default_factory=list)
    high_water: int = 0
    killed: str = ""


class _Process:
    """A child that takes lines and answers in JSON."""

    def __init__(self, name: str, module: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, **environment}, text=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Failed(f"{self.name} has ended: {self.last_words()}") from error

    def last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-600:]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.put(json.loads(line))
        self.events.put({"event": "ended"})


class Demo:
    """Args:
    note: is called with a line for people, and with the progress of an update (0 to 1; -1: none).
    """

    def __init__(
        self, model: str, nics: tuple[str, ...], max_tokens: int, note: Callable[[str, float], object]
    ) -> None:
        self._note = note
        self._folder = tempfile.TemporaryDirectory(prefix="railwire-demo-")
        self._secret = secrets.token_hex(16)
        self._store = tcp_store(HOST, 0, server=True)
        text = importlib.resources.files("railwire.demo").joinpath("prompts.txt").read_text(encoding="utf-8")
        (self._at / "text").write_text(text, encoding="utf-8")
        self._environment = {
            "RAILWIRE_DEMO_HOST": HOST, "RAILWIRE_DEMO_PORT": str(self._store.port),
            "RAILWIRE_DEMO_SECRET": self._secret, "RAILWIRE_DEMO_MODEL": model,
            "RAILWIRE_DEMO_NICS": ",".join(nics or ("tcp://127.0.0.1",)), "RAILWIRE_DEMO_TOKENS": str(max_tokens),
            "RAILWIRE_DEMO_TEXT": str(self._at / "text"), "OMP_NUM_THREADS": "1", "MASTER_ADDR": HOST,
            "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        self._trainers: list[_Process] = []
        self._receivers: list[_Process] = []
        self.result = Result()

    @property
    def _at(self) -> Path:
        return Path(self._folder.name)

    def run(self) -> Result:
        try:
            self._play()
        finally:
            for process in [*self._trainers, *self._receivers]:
                process.end()
            self._folder.cleanup()
        return self.result

    def _play(self) -> None:
        self._note(f"starting {TRAINERS} trainers (FSDP2 x TP) and {RECEIVERS} inference ranks", -1)
        self._receivers = self._start("serving", RECEIVERS, {})
        self._trainers = self._start("training", TRAINERS, {})
        self._ready(self._trainers)
        self._ready(self._receivers)
        self._train()
        self._all(self._trainers, f"await {RECEIVERS}", "joined")
        self._update(1)
        self._compare(1)
        self._train()
        self._kill_one(2)
        self._note("the trainers start again from what they had saved, as torchrun would have them", -1)
        for process in self._trainers:
            process.end()
        self._trainers = self._start("training", TRAINERS, {"RAILWIRE_DEMO_SAVED": str(self._at / "v1.pt")})
        self._ready(self._trainers)
        self._train()
        self._all(self._trainers, f"await {RECEIVERS}", "joined")
        self._update(3)
        self._compare(3)
        for process in [*self._trainers, *self._receivers]:
            process.tell("quit")

    # ---- acts --------------------------------------------------------------------------------------------------------
    def _train(self) -> None:
        answers = self._all(self._trainers, "train", "trained")
        loss = sum(float(answer["loss"]) for answer in answers) / len(answers)
        self.result.losses.append(loss)
        self._note(f"a step of training; the loss was {loss:.3f}", -1)

    def _update(self, version: int) -> None:
        self._tell(self._trainers, f"update {version}")
        shares = [0.0] * len(self._trainers)
        act = Act(version, 0.0, {}, {})
        for index, process in enumerate(self._trainers):
            while True:
                answer = self._next(process)
                if answer["event"] == "progress":
                    shares[index] = answer["done"] / max(1, answer["total"])
                    self._note(f"update {version}", sum(shares) / len(shares))
                elif answer["event"] == "updated":
                    break
                else:
                    raise Failed(f"{process.name}: {answer}")
            rank = int(answer["rank"])
            act.nbytes[rank] = answer["nbytes"]
            act.spans[rank] = [tuple(span) for span in answer["spans"]]
            act.seconds = max(act.seconds, float(answer["seconds"]))
            self.result.high_water = max(self.result.high_water, int(answer["high_water"]))
        for process in self._receivers:
            if self._expect(process, "published")["version"] != version:
                raise Failed(f"{process.name} published another version than {version}")
        self.result.acts.append(act)
        total = sum(sum(by.values()) for by in act.nbytes.values())
        self._note(f"version {version} is served: {total / 1e6:.0f} MB in {act.seconds:.2f} s", -1)

    def _compare(self, version: int) -> None:
        """What is generated now is what the trainers' full state dict generates."""
        path = self._at / f"v{version}.pt"
        self._all(self._trainers, f"save {path}", "saved")
        generated = self._all(self._receivers, "generate", "generated")
        compared = self._all(self._receivers, f"compare {path}", "compared")
        for mine, reference in zip(generated, compared, strict=True):
            if reference["different"]:
                raise Failed(f"version {version}: {reference['different'][:3]} differ from the trainers' state dict")
            if mine["version"] != version or mine["tokens"] != reference["tokens"]:
                raise Failed(f"version {version} generates {mine['tokens']}, the state dict {reference['tokens']}")
        self.result.texts.append((version, generated[0]["text"]))
        self._note(f"version {version} generates what the trainers' full state dict does: {generated[0]['text']!r}", -1)

    def _kill_one(self, version: int) -> None:
        """A trainer dies in the middle: the version is poisoned, and the old one goes on being served."""
        victim = self._trainers[2]
        self._tell(self._trainers, f"update {version}")
        while self._next(victim)["event"] != "progress":
            pass
        victim.process.send_signal(signal.SIGKILL)
        self.result.killed = victim.name
        self._note(f"{victim.name} is killed in the middle of update {version}", -1)
        problem = self._expect(self._trainers[0], "failed")["problem"]
        self._note(f"update {version} has failed on every rank: {problem}", -1)
        generated = self._all(self._receivers, "generate", "generated")
        before = dict(self.result.texts)[1]
        for answer in generated:
            if answer["version"] != 1 or answer["text"] != before:
                raise Failed(f"after the failure, version {answer['version']} is served: {answer['text']!r}")
        self._note("version 1 goes on being served, and generates what it did", -1)

    # ---- processes ---------------------------------------------------------------------------------------------------
    def _start(self, module: str, size: int, more: Mapping[str, str]) -> list[_Process]:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        return [
            _Process(
                f"{module} rank {rank}", f"railwire.demo.weights.{module}",
                {**self._environment, **more, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                 "MASTER_PORT": str(port)},
            )
            for rank in range(size)
        ]  # fmt: skip

    def _ready(self, processes: list[_Process]) -> None:
        for process in processes:
            self._expect(process, "ready")

    def _tell(self, processes: list[_Process], order: str) -> None:
        for process in processes:
            process.tell(order)

    def _all(self, processes: list[_Process], order: str, event: str) -> list[dict[str, Any]]:
        self._tell(processes, order)
        return [self._expect(process, event) for process in processes]

    def _expect(self, process: _Process, event: str) -> dict[str, Any]:
        while True:
            answer = self._next(process)
            if answer["event"] == event:
                return answer
            if answer["event"] == "failed":
                raise Failed(f"{process.name}: {answer['problem']}")

    def _next(self, process: _Process) -> dict[str, Any]:
        try:
            answer = process.events.get(timeout=_PATIENCE)
        except queue.Empty:
            raise Failed(f"{process.name} says nothing for {_PATIENCE:g} s") from None
        if answer["event"] == "ended":
            time.sleep(0.2)
            raise Failed(f"{process.name} has ended: {process.last_words()}")
        return answer
