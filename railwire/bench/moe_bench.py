"""Starts the ranks of `railwire bench moe` and takes medians: of each round the slowest rank, of the rounds the
middle."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BenchFailed(Exception):
    """A rank failed; the text is what it said."""


@dataclass(frozen=True)
class Measured:
    """Seconds of dispatch and of combine by contender; bytes that one rank sent in a round."""

    seconds: dict[str, tuple[float, float]]
    equal: bool
    sent: int
    registered: int


def run(*, ranks: int, rounds: int, warmup: int = 3, timeout: float = 300.0, **shape: Any) -> Measured:
    """Raises BenchFailed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            order = {"rank": rank, "ranks": ranks, "rounds": rounds, "warmup": warmup,
                     "store": str(Path(folder) / "store"), **shape}  # fmt: skip
            command = [sys.executable, "-m", "railwire.bench.moe_rank", json.dumps(order)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        said = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=timeout)
                if process.returncode:
                    raise BenchFailed(err.strip()[-2000:])
                said.append(json.loads(out.strip().splitlines()[-1]))
        except subprocess.TimeoutExpired:
            raise BenchFailed(f"the ranks have not ended within {timeout:g} s") from None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
    seconds = {}
    for name in said[0]["seconds"]:
        parts = []
        for which in (0, 1):
            per_round = list(zip(*(rank["seconds"][name][which] for rank in said), strict=True))
            if per_round:
                parts.append(statistics.median(max(round_) for round_ in per_round))
        if len(parts) == 2:
            seconds[name] = (parts[0], parts[1])
    total = rounds + warmup
    return Measured(seconds, all(rank["equal"] for rank in said), said[0]["sent"] // total, said[0]["registered"])
