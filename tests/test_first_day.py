"""scripts/first-day.sh between two network namespaces, over tcp: all its steps that need no hardware."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/first-day.sh"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with two links: 10.79.0.1 and .2, 10.79.1.1 and .2."""
    names = f"fd{os.getpid()}a", f"fd{os.getpid()}b"
    try:
        for name in names:
            ip("netns", "add", name)
        for link in range(2):
            ip("link", "add", f"w{link}", "netns", names[0], "type", "veth", "peer", f"w{link}", "netns", names[1])
            for side, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.79.{link}.{side + 1}/24", "dev", f"w{link}")
                ip("-n", name, "link", "set", f"w{link}", "up")
        for name in names:
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(names)
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield names
    _remove(names)


def _remove(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


@pytest.mark.slow
def test_the_first_day(hosts: tuple[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    far = subprocess.Popen(
        ["ip", "netns", "exec", hosts[1], str(SCRIPT), "b", "--secret", "word", "--bind", "10.79.0.2",
         "--nic", "tcp://10.79.0.2", "--nic", "tcp://10.79.1.2"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert far.stdout is not None
        assert "waits" in far.stdout.readline()
        near = subprocess.run(
            ["ip", "netns", "exec", hosts[0], str(SCRIPT), "a", "--secret", "word", "--peer", "10.79.0.2",
             "--nic", "tcp://10.79.0.1", "--nic", "tcp://10.79.1.1", "--largest", "4M", "--pages", "20000",
             "--idle", "1", "--seconds", "0.2", "--report", str(report),
             "--down", "ip link set w1 down", "--up", "ip link set w1 up"],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    finally:
        far.terminate()
        far.wait(20)
        far.stdout.close()
    assert near.returncode == 0, near.stdout + near.stderr
    document = json.loads(report.read_text())
    assert document["a"]["facts"]["kernel"] and document["b"]["doctor"]
    (row,) = document["rows"]
    assert row["state"] == "verified"
    missing = {name for name, text in row["steps"].items() if not text.startswith("verified")}
    assert missing == {"vendor's baseline"}, row["steps"]
