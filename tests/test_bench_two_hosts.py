"""`railwire bench p2p --listen` and `--connect`: the same benchmark with the receiver on another host."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from railwire.bench.contender import Setting
from railwire.bench.measure import Plan, Result, run_plan
from railwire.bench.remote import DEFAULT_PORT, Host, Listener, check_reaches, kind_of
from railwire.bench.scenarios import Scenario

NIC = "tcp://127.0.0.1"
SECRET = "between us"

FI_RMA_BW = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *127.0.0.1) ;; *) sleep 0.2 ;; esac
echo "bytes   iters   total       time     MB/sec    usec/xfer   Mxfers/sec"
echo "64k     64      4m          0.00s   12500.00       5.24       0.19"
"""


@pytest.fixture
def listener() -> Iterator[Listener]:
    one = Listener("127.0.0.1", 0, secret=SECRET, nics=[NIC, "efa"])
    thread = threading.Thread(target=one.serve)
    thread.start()
    yield one
    one.close()
    thread.join(10)
    assert not thread.is_alive()


def measure(
    port: int, *scenarios: Scenario, contenders: tuple[str, ...] = ("railwire",), secret: str = SECRET, nic: str = NIC
) -> list[Result]:
    plan = Plan(nic, scenarios, contenders, 1, 0.02, (), 20.0, Host("127.0.0.1", port, secret))
    return run_plan(plan, Setting(two_hosts=True, peer="127.0.0.1"))


def test_every_byte_is_checked_and_figures_come_back(listener: Listener) -> None:
    found = measure(
        listener.port,
        Scenario("pages", 64 << 10, pages=64, window=2),
        Scenario("write", 1 << 20, window=4),
        Scenario("read", 1 << 20, window=4),
        Scenario("pingpong", 64),
    )
    for one in found:
        assert not one.note
        assert one.verified is True
        assert one.gbytes_per_s and one.us_p50


def test_what_is_in_the_way_is_said(listener: Listener) -> None:
    scenario = Scenario("write", 1 << 20)
    (wrong,) = measure(listener.port, scenario, secret="something else")
    assert "secrets differ" in wrong.note
    (other,) = measure(listener.port, scenario, nic="verbs:mlx5_0")
    assert "verbs" in other.note and NIC in other.note
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (nobody,) = measure(free.getsockname()[1], scenario)
    assert "--listen" in nobody.note
    # Strangers harm nobody.
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"version": 1}\n',
        b'{"version": 1, "secret": 5}\n',
        b"\xff" * 100_000,
    ):
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", listener.port)) as stranger:
            stranger.sendall(noise)
    (fine,) = measure(listener.port, scenario)
    assert fine.verified is True


def test_the_vendors_program_runs_on_both_hosts(
    listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fi_rma_bw"
    program.write_text(FI_RMA_BW)
    program.chmod(0o755)
    (tmp_path / "fi_info").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    _, found = measure(
        listener.port,
        Scenario("write", 64 << 10, window=4),
        contenders=("railwire", "fi_rma_bw"),
        nic="efa:rdmap0s6-rdm",
    )
    assert found.contender == "fi_rma_bw"
    assert found.gbytes_per_s == pytest.approx(12.5, rel=0.01)
    assert found.verified is None
    calls = (tmp_path / "calls").read_text().splitlines()
    assert any(call.endswith("127.0.0.1") and "-d rdmap0s6-rdm" in call for call in calls)
    assert any(not call.endswith("127.0.0.1") and "-d" not in call.split() for call in calls)


def test_names_of_hosts_and_nics() -> None:
    assert Host.parse("gpu7") == Host("gpu7", DEFAULT_PORT)
    assert Host.parse("10.0.0.2:99") == Host("10.0.0.2", 99)
    assert Host.parse("[fd00::2]:99") == Host("fd00::2", 99)
    assert Host.parse("[fd00::2]") == Host.parse("fd00::2") == Host("fd00::2", DEFAULT_PORT)
    with pytest.raises(ValueError, match="port"):
        Host.parse("gpu7:x")
    assert kind_of("libfabric:efa-direct:rdmap0s6-rdm") == "libfabric:efa-direct"
    assert kind_of("verbs:mlx5_0:1") == "verbs"
    with pytest.raises(ValueError, match="no other host"):
        check_reaches("shm")


def test_the_commands(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from railwire.cli import app; app()", "bench", "p2p"]
    log = tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--listen", f"127.0.0.1:{port}", "--nic", NIC], stderr=out)
    try:
        for _ in range(200):
            if "listening" in log.read_text() or server.poll() is not None:
                break
            threading.Event().wait(0.1)
        answer = subprocess.run(
            [*command, "--connect", f"127.0.0.1:{port}", "--nic", NIC, "--op", "write", "--page-bytes", "1048576",
             "--rounds", "4", "--repeats", "1", "--json"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        assert '"verified":true' in answer.stdout.replace(" ", "")
    finally:
        server.terminate()
        server.wait(10)
