"""GPU memory over tcp, through pinned memory of both sides: every byte, whichever side is a GPU's, and what happens
when the peer dies, frees its memory, or a copy fails. On the fake driver; `make test-gpu` runs it on GPUs."""

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


def run(device: str, other: str, what: str = "", nic: str = "tcp://127.0.0.1", **faults: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PAIR), "a", device, other, what, nic],
        env=fake_cuda_environment(**faults),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        facts.update(json.loads(line))
    if "+" in nic:
        facts["warned"] = done.stderr
    return facts


@pytest.mark.parametrize(
    ("device", "other"), [("cuda:0", "cuda:1"), ("cuda:0", "cpu"), ("cpu", "cuda:0")], ids=lambda value: value
)
def test_every_byte_arrives(device: str, other: str) -> None:
    assert run(device, other, DELAY_US=100) == {**MOVED, "child": 0, "end": True}


def test_what_shm_cannot_map_goes_over_tcp_and_that_is_said() -> None:
    facts = run("cuda:0", "cuda:1", nic="shm+tcp://127.0.0.1", NO_IPC=1, NO_VMM=1)
    assert {name: facts[name] for name in MOVED} == MOVED
    (shm, _, _), (tcp, carries, why) = facts["path"]
    assert (shm, tcp, carries) == ("shm", "tcp", "host memory and memory of cuda:0")
    assert "PID and IPC namespace" in why and facts["warned"].count("not reached over its best NIC") == 1, facts


def test_a_peer_that_dies_ends_every_transfer() -> None:
    assert run("cuda:0", "cuda:1", "kill", DELAY_US=500) == {**MOVED, "ended": 50, "again": True, "end": True}


def test_memory_that_is_closed_is_fenced_gets_an_error_and_may_be_registered_again() -> None:
    facts = run("cuda:0", "cuda:0", "free", DELAY_US=300)
    assert facts == {**MOVED, "closed": True, "after": "RevokedError", "anew": True, "child": 0, "end": True}


def test_a_copy_that_fails_is_an_error_in_the_drivers_words() -> None:
    facts = run("cuda:0", "cuda:1", FAIL_AT=2)
    assert set(facts) == {"error"} and "an illegal memory access was encountered" in facts["error"], facts


ORDER = """
import sys
import numpy as np
from railwire import TransferEngine
from railwire.cuda import GpuMemory

seed = int(sys.argv[1])
print("seed", seed)
rng = np.random.default_rng(seed)
nbytes = 3 << 20
tcp = ["tcp://127.0.0.1"]
a, b = TransferEngine("cuda:0", nics=tcp), TransferEngine("cuda:1", nics=tcp)
memory, host = GpuMemory(nbytes, 1), np.zeros(nbytes, np.uint8)
memory.fill(host)
far, far_host = b.register(memory), b.register(host)
source = GpuMemory(nbytes, 0)
data = rng.integers(0, 256, nbytes, dtype=np.uint8)
source.fill(data)
near, near_host = a.register(source), a.register(data)
a.connect(b.address)
b.connect(a.address)
expected, got = np.zeros((2, nbytes), np.uint8), np.zeros(nbytes, np.uint8)
# Both kinds of memory in turn, in both directions at once, of every length; each is counted once, after its bytes.
back = np.zeros(nbytes, np.uint8)
answers = GpuMemory(nbytes, 0)
answers.fill(back)
from_b = a.register(answers)
for turn in range(40):
    transfers, at = [], 0
    while at < nbytes:
        length = int(rng.choice([0, 1, 63, 4096, 70_000, 300_000]))
        length = min(length + int(rng.integers(0, 9)), nbytes - at)
        if rng.integers(0, 40) == 0:
            at = nbytes
            continue
        kind = int(rng.integers(0, 2))
        begin = int(rng.integers(0, nbytes - length + 1))
        own = near if rng.integers(0, 2) else near_host
        to = (far, far_host)[kind]
        transfers.append(a.write(own[begin : begin + length], to.descriptor[at : at + length], imm=5))
        expected[kind, at : at + length] = data[begin : begin + length]
        at += length + int(rng.integers(0, 100))
    arrived = b.counter(5).expect(len(transfers))
    length = int(rng.integers(1, nbytes))
    reply = b.write(far_host[:length], from_b.descriptor[:length], imm=6)
    arrived.wait(30)
    memory.read_into(got)
    assert (got == expected[0]).all() and (host == expected[1]).all(), turn
    a.counter(6).expect(1).wait(30)
    for transfer in [*transfers, reply]:
        transfer.wait(30)
    begin, length = int(rng.integers(0, 1000)), int(rng.integers(0, nbytes - 1000))
    a.read(far.descriptor[begin : begin + length], from_b[: length]).wait(30)
    answers.read_into(back)
    assert (back[:length] == expected[0, begin : begin + length]).all(), turn
a.close()
b.close()
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_host_and_gpu_memory_in_turn_are_counted_in_order(seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDER, str(seed)],
        env=fake_cuda_environment(DELAY_US=30),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
