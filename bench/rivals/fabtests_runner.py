"""fabtests as a contender: ``fi_rma_bw``, what EFA's own people measure with, between two hosts.

The target runs the server, the initiator the client. It checks nothing: its figures are not verified, and its "pages"
are writes of that size.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from typing import Any

from railwire.bench import buffers
from railwire.bench.runner import RunnerConfig, serve_commands
from railwire.bench.work import Work

_LEAST_ITERATIONS = 64
# bytes, iterations, total, time, MB/sec, usec/xfer, Mxfers/sec: only the rates are plain numbers
_ROW = re.compile(r"^\S+\s+\S+\s+\S+\s+[\d.]+s\s+([\d.]+)\s+([\d.]+)\s+[\d.]+\s*$", re.MULTILINE)


class FabtestsSide:
    """Answers the parent's commands; each run is one server and one client."""

    hard_exit = False

    def __init__(self, config: RunnerConfig, buffer: buffers.Bytes) -> None:
        if shutil.which("fi_rma_bw") is None:
            raise ImportError("fi_rma_bw")  # said as of any contender that is not there
        self._config = config
        self._port = 0
        self._work: Work | None = None

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "offer":
                with socket.create_server(("", 0)) as probe:
                    self._port = probe.getsockname()[1]
                answer = subprocess.run(["fi_info", "--version"], capture_output=True, text=True, check=False)
                version = re.search(r"libfabric: ([\d.]+)", answer.stdout)
                return {
                    "offer": str(self._port),
                    "version": f"fi_rma_bw {version[1] if version else '?'}",
                    "details": {},
                }
            case "connect":
                if self._config.initiator:
                    self._port = int(command["offer"])
                return {}
            case "prepare":
                self._work = Work.from_dict(command["work"])
                return {"huge_page_bytes": 0}
            case "serve":
                subprocess.run(self._command(), capture_output=True, timeout=self._config.timeout_s, check=True)
                return {"end_ns": 0}
            case "go":
                return self._go()
            case "verify":
                return {"verified": None}
            case other:
                raise ValueError(f"unknown command {other!r}")

    def _command(self) -> list[str]:
        work = self._work
        assert work is not None
        kind, _, rest = self._config.nic.partition(":")
        if kind == "libfabric":
            kind, _, rest = rest.partition(":")
        fabric = ["-f", kind] if kind.startswith("efa") else []
        provider = "efa" if kind.startswith("efa") else kind
        domain = ["-d", rest] if rest and not rest.startswith("//") else []
        gpu = self._config.device.partition(":")[2]
        return [
            "fi_rma_bw", "-p", provider, *fabric, *domain, "-e", "rdm", "-o", "write", f"-E={self._port}",
            "-S", str(work.page_bytes), "-I", str(self._count(work)),
            "-W", str(max(1, min(int(self._config.option("wr_window", "64")), work.window * work.pages))),
            *(["-D", "cuda", "-i", gpu] if gpu else []),
        ]  # fmt: skip

    @staticmethod
    def _count(work: Work) -> int:
        return max(work.total_pages, _LEAST_ITERATIONS)

    def _go(self) -> dict[str, Any]:
        work = self._work
        assert work is not None
        if work.window * work.pages == 1:
            raise NotImplementedError("fi_rma_bw is asked for writes in flight")
        deadline = time.monotonic() + self._config.timeout_s
        while True:  # the client gives up at once if the server does not listen yet
            client = subprocess.run(
                [*self._command(), self._config.option("host")],
                capture_output=True, text=True, timeout=self._config.timeout_s, check=False,
            )  # fmt: skip
            found = _ROW.findall(client.stdout)
            if client.returncode == 0 and found:
                seconds = work.total_bytes / (float(found[-1][0]) * 1e6)
                return {"start_ns": 0, "end_ns": int(seconds * 1e9), "us_p50": 0.0, "us_p99": 0.0}
            if time.monotonic() > deadline:
                raise RuntimeError((client.stdout + client.stderr).strip()[-400:])
            time.sleep(0.05)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve_commands(FabtestsSide)
