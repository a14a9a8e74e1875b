"""Starts the ranks, listens to them, and sums up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DemoFailed(Exception):
    """A rank did not do what it should; the text says which."""


@dataclass
class Played:
    """What the ranks have said, in the order of steps."""

    ranks: int
    victim: int
    kill_at: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, rank: int) -> list[dict[str, Any]]:
        return [step for step in self.steps if step["rank"] == rank]

    @property
    def equal(self) -> bool:
        """Every rank's logits were the single process's, bit for bit, in every step."""
        return bool(self.steps) and all(step["equal"] for step in self.steps)

    def traffic(self) -> list[list[int]]:
        """Bytes from each rank to each other one, over the whole run."""
        last = {step["rank"]: step["sent_to"] for step in self.steps}
        return [last.get(rank, [0] * self.ranks) for rank in range(self.ranks)]


def play(
    *, model: str = "olmoe", ranks: int = 4, steps: int = 12, seed: int = 1, nics: list[str], victim: int = 2,
    tell: Callable[[str], None] = lambda text: None, timeout: float = 180.0,
) -> Played:  # fmt: skip
    """Runs it. ``victim`` kills itself in the middle, -1: nobody does.

    Raises:
        DemoFailed: a rank ended by itself or went silent.
    """
    kill_at = steps // 2
    played = Played(ranks, victim, kill_at)
    lock = threading.Lock()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            order = {
                "rank": rank, "ranks": ranks, "seed": seed, "model": model, "steps": steps, "nics": nics,
                "victim": victim, "kill_at": kill_at, "store": str(Path(folder) / "store"),
            }  # fmt: skip
            command = [sys.executable, "-m", "railwire.demo.moe.worker", json.dumps(order)]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
            )
        errors: dict[int, str] = {}

        def listen(rank: int) -> None:
            stdout = processes[rank].stdout
            assert stdout is not None
            for line in stdout:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue
                with lock:
                    if "layers" in said:
                        tell(f"Rank {rank}: {said['layers']} layers, {said['prompts']} prompts")
                    elif "dies" in said:
                        tell(f"Rank {rank} kills itself before step {said['step']}")
                    elif "equal" in said:
                        played.steps.append(said)

        def complaints(rank: int) -> None:
            stderr = processes[rank].stderr
            assert stderr is not None
            errors[rank] = stderr.read()

        threads = [threading.Thread(target=f, args=(r,)) for r in range(ranks) for f in (listen, complaints)]
        for thread in threads:
            thread.start()
        try:
            for rank, process in enumerate(processes):
                left = max(1.0, timeout - (time.monotonic() - began))
                code = process.wait(left)
                if code != (-9 if rank == victim else 0):
                    raise DemoFailed(f"rank {rank} ended with {code}")
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the ranks have not ended within {timeout:g} s") from None
        except DemoFailed as error:
            time.sleep(0.2)
            raise DemoFailed(f"{error}: {errors.get(rank, '').strip()[-2000:]}") from None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for thread in threads:
                thread.join(5)
    played.steps.sort(key=lambda step: (step["step"], step["rank"]))
    played.seconds = time.monotonic() - began
    for rank in range(ranks):
        want = kill_at if rank == victim else steps
        if len(played.of(rank)) != want:
            raise DemoFailed(f"rank {rank} has made {len(played.of(rank))} steps of {want}")
    return played
