"""`railwire doctor` tries which GPUs reach each other: on the fake driver."""

from __future__ import annotations

import subprocess
import sys

import pytest
from beds import fake_cuda_environment

SCRIPT = """
from railwire.doctor import gpu_paths
for row in gpu_paths.try_all([0, 1]):
    print(row.source, row.target, row.works, row.why)
"""


@pytest.mark.parametrize(("no_ipc", "works"), [(0, "True"), (1, "False")])
def test_every_pair_is_tried(no_ipc: int, works: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=fake_cuda_environment(NO_IPC=no_ipc),
        capture_output=True,
        text=True,
        timeout=100,
    )
    rows = [line.split(" ", 3) for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[f"cuda:{i}", f"cuda:{j}"] for i in (0, 1) for j in (0, 1)], done.stderr
    assert {row[2] for row in rows} == {works}, rows
    assert all("CUDA" in row[3] for row in rows) or works == "True", rows
