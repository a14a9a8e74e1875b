"""perftest as a contender: ``ib_write_bw`` and ``ib_write_lat``, what everybody measures RDMA NICs with.

Server and client run on the same device, as Railwire's two processes do. perftest writes its own memory again and
again and checks nothing: its figures are not verified, and its "pages" are writes of that size.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from railwire import _native
from railwire.bench import buffers
from railwire.bench.runner import RunnerConfig, serve_commands
from railwire.bench.work import Work

_LEAST_ITERATIONS = 5  # perftest refuses fewer


class PerftestSession:
    """Answers the parent's commands; each run is one server and one client."""

    hard_exit = False

    def __init__(self, config: RunnerConfig, buffer: buffers.Bytes) -> None:
        if shutil.which("ib_write_bw") is None:
            raise ImportError("ib_write_bw")  # said as of any contender that is not there
        self._config = config
        self._cpus = config.cpus
        self._depth = int(config.option("wr_window", "128"))
        self._device, _, port = config.nic.partition(":")[2].partition(":")
        self._port = int(port or 1)
        self._gid = self._gid_index()
        self._work: Work | None = None

    def _gid_index(self) -> int:
        for device in _native.verbs_probe()["devices"]:
            if device["name"] == self._device:
                return int(next(one["chosen_gid"] for one in device["ports"] if one["number"] == self._port))
        raise ValueError(f"libibverbs shows no device {self._device}")

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "offer":
                answer = subprocess.run(["ib_write_bw", "--version"], capture_output=True, text=True, check=False)
                version = re.search(r"[\d.]+", answer.stdout + answer.stderr)
                return {"offer": "", "version": f"perftest {version[0] if version else '?'}", "details": {}}
            case "prepare":
                self._work = Work.from_dict(command["work"])
                return {"huge_page_bytes": 0}
            case "run":
                assert self._work is not None
                return {"laps": self._run(self._work), "served": {"end_ns": 0}}
            case "verify":
                return {"verified": None}
            case other:
                raise ValueError(f"unknown command {other!r}")

    def _command(self, work: Work) -> list[str]:
        latency = work.op == "pingpong"
        count = max(work.total_pages, _LEAST_ITERATIONS)
        if work.op == "read" or (not latency and work.window * work.pages == 1):
            raise NotImplementedError("perftest is asked for writes in flight and for ping-pong")
        command = ["ib_write_lat" if latency else "ib_write_bw", "-F", "-d", self._device, "-i", str(self._port)]
        command += ["-x", str(self._gid), "-s", str(work.page_bytes), "-n", str(count)]
        if not latency:
            command += ["-t", str(max(1, min(self._depth, work.window * work.pages, count)))]
        return command

    def _run(self, work: Work) -> dict[str, Any]:
        return self._laps(work, self._both(self._command(work)))

    def _laps(self, work: Work, row: list[float]) -> dict[str, Any]:
        count = max(work.total_pages, _LEAST_ITERATIONS)
        if work.op == "pingpong":  # bytes, iterations, t_min, t_max, t_typical, t_avg, ...
            return {"start_ns": 0, "end_ns": int(row[5] * 2e3 * count), "us_p50": row[4], "us_p99": row[7]}
        seconds = work.page_bytes * count / (row[3] * (1 << 20))  # bytes, iterations, peak, average in MiB/s
        return {"start_ns": 0, "end_ns": int(seconds * 1e9 * work.total_pages / count), "us_p50": 0.0, "us_p99": 0.0}

    def _both(self, command: list[str]) -> list[float]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [*command, "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            return self._client([*command, "127.0.0.1"], lambda: server.poll() is None)
        finally:
            if server.poll() is None:
                try:
                    server.wait(2)
                except subprocess.TimeoutExpired:
                    server.kill()
            server.communicate()

    def _client(self, command: list[str], server_runs: Callable[[], bool]) -> list[float]:
        """The last row of figures. The client gives up at once if the server does not listen yet."""
        deadline = time.monotonic() + self._config.timeout_s
        while True:
            client = subprocess.run(
                command, capture_output=True, text=True, timeout=self._config.timeout_s, check=False
            )
            rows = re.findall(r"^\s*\d+\s+\d+(?:\s+[\d.]+)+\s*$", client.stdout, re.MULTILINE)
            if client.returncode == 0 and rows:
                return [float(cell) for cell in rows[-1].split()]
            if not server_runs() or time.monotonic() > deadline:
                raise RuntimeError((client.stdout + client.stderr).strip()[-400:])
            time.sleep(0.05)

    def close(self) -> None:
        pass


class PerftestSide(PerftestSession):
    """One of the two, on two hosts: the target runs servers, the initiator clients."""

    _far_port = 0

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "offer":
                with socket.create_server(("", 0)) as probe:
                    self._far_port = probe.getsockname()[1]
                return {**super().handle(command), "offer": str(self._far_port)}
            case "connect":
                if self._config.initiator:
                    self._far_port = int(command["offer"])
                return {}
            case "serve":
                assert self._work is not None
                subprocess.run(
                    [*self._command(self._work), "-p", str(self._far_port)],
                    capture_output=True, timeout=self._config.timeout_s, check=True,
                )  # fmt: skip
                return {"end_ns": 0}
            case "go":
                assert self._work is not None
                words = [*self._command(self._work), "-p", str(self._far_port), self._config.option("host")]
                return self._laps(self._work, self._client(words, lambda: True))
            case _:
                return super().handle(command)


if __name__ == "__main__":
    serve_commands(lambda config, buffer: (PerftestSession if config.role == "both" else PerftestSide)(config, buffer))
