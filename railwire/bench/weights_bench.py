"""`railwire bench weights`: seconds until a version is visible at every receiver, by Railwire and by others."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

NEEDS_GPU = {
    "checkpoint-engine": "broadcasts over NCCL and CUDA IPC, and its P2PStore needs RDMA devices",
    "vllm": "its weight-transfer backends (nccl, ipc, sharded_rdt) need CUDA",
}
RUN_HERE = ("railwire", "engine", "gloo", "nixl")
_PATIENCE = 180.0


@dataclass(frozen=True)
class Figures:
    """Of one contender: seconds of each update, in the order measured; ``problem`` if there are none."""

    contender: str
    seconds: tuple[float, ...] = ()
    nbytes: int = 0
    right: bool | None = None
    problem: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def gbytes_per_s(self) -> float:
        return self.nbytes / self.median / 1e9


def measure(
    contenders: tuple[str, ...], *, nic: str, trainers: int, receivers: int, megabytes: int, rounds: int, turns: int,
    peer_python: str, step: Callable[[str], object],
) -> list[Figures]:  # fmt: skip
    """Contenders take turns, so that a machine whose speed changes is unfair to none."""
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name in contenders:
            step(name)
            if name in NEEDS_GPU:
                found[name].append(Figures(name, problem=f"not run: {NEEDS_GPU[name]}"))
                continue
            found[name].append(_run(name, nic, trainers, receivers, megabytes, rounds, peer_python))
    merged = []
    for name, parts in found.items():
        good = [part for part in parts if not part.problem]
        if not good:
            merged.append(parts[0])
            continue
        seconds = tuple(s for part in good for s in part.seconds)
        right = None if good[0].right is None else all(part.right for part in good)
        merged.append(Figures(name, seconds, good[0].nbytes, right))
    return merged


def predict(engine: Figures, *, trainers: int, receivers: int, megabytes: int) -> float:
    """Seconds that the simulator gives for Railwire's update, over NICs with the bandwidth that the bare engine had.

    Args:
        engine: measured in the same run with the same numbers of processes.
    """
    import torch

    from railwire.bench.weights_child import Live, shapes
    from railwire.weights import Box, compute, describe_boxes, record
    from railwire.weights.simulate import simulate

    model = shapes(megabytes)
    sources = []
    for rank in range(trainers):
        boxes = {}
        for name, (rows, columns) in model.items():
            part = rows // trainers
            boxes[name] = Box(torch.empty(part, columns, dtype=torch.bfloat16), (rows, columns), (rank * part, 0))
        sources.append(describe_boxes(f"trainer {rank}", boxes).table)
    destinations = []
    for rank in range(receivers):
        live = Live(model, rank, receivers)
        wanted = {name: (shape, torch.bfloat16) for name, shape in model.items()}
        destinations.append(record(f"receiver {rank}", live.load, wanted, live.tensors).table)
    # Both sides have one NIC a process: the fuller side is what the engine's seconds were spent on.
    share = engine.nbytes / min(trainers, receivers)
    plan = compute(sources, destinations)
    return simulate(plan, nic_gbps=share * 8e-9 / engine.median, step=engine.median / 1000).seconds


def _run(name: str, nic: str, trainers: int, receivers: int, megabytes: int, rounds: int, peer_python: str) -> Figures:
    from railwire.weights import tcp_store

    store = tcp_store("127.0.0.1", 0, server=True)
    common = {
        "contender": name, "nic": nic, "trainers": trainers, "receivers": receivers, "megabytes": megabytes,
        "rounds": rounds, "port": store.port,
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if name == "nixl":
        environment["UCX_TLS"] = "tcp" if nic.startswith("tcp") else "shm,tcp"
    python = peer_python if name == "nixl" else sys.executable
    processes = [
        subprocess.Popen(
            [python, "-m", "railwire.bench.weights_child", json.dumps({**common, "role": role, "rank": rank})],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for role, count in (("receiver", receivers), ("trainer", trainers))
        for rank in range(count)
    ]  # fmt: skip
    answers = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=_PATIENCE)
            lines = [line for line in out.splitlines() if line.startswith("{")]
            if process.returncode != 0 or not lines:
                said = [line for line in errors.splitlines() if "Error" in line] or errors.splitlines() or ["nothing"]
                return Figures(name, problem=f"failed: {said[-1][:160]}")
            answers.append(json.loads(lines[-1]))
    except subprocess.TimeoutExpired:
        return Figures(name, problem=f"did not end within {_PATIENCE:g} s")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    # A round lasts until the last of its processes has met the others.
    rounds_of = [max(values) for values in zip(*(answer["seconds"] for answer in answers), strict=True)]
    right = [answer["right"] for answer in answers if answer["right"] is not None]
    return Figures(name, tuple(rounds_of), answers[0]["bytes"], all(right) if right else None)
