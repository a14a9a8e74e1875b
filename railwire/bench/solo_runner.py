"""Both ends in one process, for the simulated NIC: its fabric exists in one process only.

Answers the same commands as two runner processes do, with `run` in place of `serve` and `go`. Its figures say what
the engine and a memcpy cost, nothing of a transport.
"""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from railwire.bench import buffers
from railwire.bench.railwire_runner import RailwireRunner
from railwire.bench.runner import RunnerConfig, Session, serve_commands
from railwire.testing import SimulatedFabric


class SoloSession:
    """Target and initiator of one fabric, and the parent's commands to both."""

    hard_exit = False

    def __init__(self, config: RunnerConfig, buffer: buffers.Bytes) -> None:
        self._fabric = SimulatedFabric()
        self._threads = ThreadPoolExecutor(2)
        self._target, self._initiator = (
            Session(RailwireRunner(replace(config, role=role, nic=self._fabric.nic(role)), memory))
            for role, memory in (("target", buffer), ("initiator", buffers.allocate(config.buffer_bytes)))
        )
        offers = [base64.b64decode(end.handle({"do": "offer"})["offer"]) for end in (self._target, self._initiator)]
        connecting = self._threads.submit(self._target.runner.connect, offers[1])
        self._initiator.runner.connect(offers[0])
        connecting.result()

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "offer":
                return self._initiator.handle(command)
            case "prepare":
                self._target.handle(command)
                return self._initiator.handle(command)
            case "run":
                serving = self._threads.submit(self._target.handle, {"do": "serve"})
                laps = self._initiator.handle({"do": "go"})
                return {"laps": laps, "served": serving.result()}
            case "verify":
                work = self._target.work
                assert work is not None
                checker = self._initiator if work.checked_at(initiator=True) else self._target
                return checker.handle(command)
            case other:
                raise ValueError(f"unknown command {other!r}")

    def close(self) -> None:
        self._initiator.runner.close()
        self._target.runner.close()
        self._threads.shutdown()
        self._fabric.close()


if __name__ == "__main__":
    serve_commands(SoloSession)
