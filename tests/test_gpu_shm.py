"""GPU memory between two processes of one host: every byte, however it was allocated, and what happens when the peer
dies, frees its memory, or cannot share it. On the fake driver; `make test-gpu` runs it on the GPUs of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from beds import fake_cuda_environment

PAIR = Path(__file__).parent / "gpu_pair.py"
MOVED = {"pages": True, "whole": True, "read": True}


def run(device: str, other: str, what: str = "", **faults: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PAIR), "a", device, other, what, "shm"],
        env=fake_cuda_environment(**faults),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        facts.update(json.loads(line))
    return facts


@pytest.mark.parametrize(
    ("device", "other"), [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:0", "cpu")], ids=lambda value: value
)
@pytest.mark.parametrize("legacy", [False, True], ids=["descriptors", "ipc"])
def test_every_byte_arrives(device: str, other: str, legacy: bool) -> None:
    facts = run(device, other, NO_VMM=int(legacy), DELAY_US=100)
    assert facts == {**MOVED, "child": 0, "end": True}


HOST_TO_GPU = """
import numpy as np
from railwire import TransferEngine
from railwire.cuda import GpuMemory

nbytes = 5 << 20
a, b = TransferEngine("cuda:0", nics=["shm"]), TransferEngine("cuda:1", nics=["shm"])
source = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
memory = GpuMemory(nbytes, 1)
memory.fill(np.zeros(nbytes, np.uint8))
near, far = a.register(source), b.register(memory)
a.connect(b.address)
a.write(near[3 : nbytes - 5], far.descriptor[3 : nbytes - 5], imm=1).wait(20)
b.counter(1).expect(1).wait(20)
got, expected = np.zeros(nbytes, np.uint8), source.copy()
memory.read_into(got)
expected[:3] = expected[nbytes - 5 :] = 0
assert (got == expected).all()
a.close()
b.close()
"""


def test_host_memory_arrives_in_gpu_memory_of_an_engine_in_the_same_process() -> None:
    environment = fake_cuda_environment(DELAY_US=100)
    done = subprocess.run(
        [sys.executable, "-c", HOST_TO_GPU], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_peer_that_dies_ends_every_transfer() -> None:
    facts = run("cuda:0", "cuda:1", "kill", DELAY_US=500)
    assert facts == {**MOVED, "ended": 50, "again": True, "end": True}


def test_memory_that_is_closed_is_fenced_gets_an_error_and_may_be_registered_again() -> None:
    facts = run("cuda:0", "cuda:0", "free", DELAY_US=300)
    assert facts == {**MOVED, "closed": True, "after": "RevokedError", "anew": True, "child": 0, "end": True}


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"NO_IPC": 1}, "CUDA"),
        ({"NO_IPC": 1, "NO_VMM": 1}, "PID and IPC namespace"),
        ({"NO_PEER": 1, "NO_VMM": 1}, "peer"),
        ({"FAIL_AT": 1}, "an illegal memory access was encountered"),
    ],
    ids=["no descriptors", "no ipc", "no peer access", "a copy fails"],
)
def test_what_cannot_be_is_an_error_in_the_drivers_words(faults: dict[str, object], words: str) -> None:
    facts = run("cuda:0", "cuda:1", **faults)
    assert set(facts) == {"error"} and words in facts["error"], facts
