"""`railwire serve` as real processes on loopback: a router, prefill and decode workers, and what clients ask."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Enough work that a prefill of a thousand tokens takes a good part of a second: time to die in the middle.
SHAPE = {"layers": 10, "hidden": 256, "intermediate": 768, "num_blocks": 400, "block_tokens": 16, "threads": 1}
NUM_BLOCKS = 400
START_SECONDS = 60.0
ANSWER_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """One serving process."""

    def __init__(self, folder: Path, name: str, arguments: list[str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAILWIRE_")}
        environment["OMP_NUM_THREADS"] = "1"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from railwire.cli import app; app()", "serve", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        self.url = ""

    def ready(self) -> Server:
        """Waits for its first line, which says where it is."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_SECONDS)
        line = self.process.stdout.readline() if readable else b""
        assert line, f"{self.name} does not come up:\n{self.text()}"
        self.url = json.loads(line)["url"]
        return self

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def metric(self, name: str) -> float:
        """Sum over the labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10.0) as response:
            text = response.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health", timeout=10.0) as response:
            body: dict[str, Any] = json.loads(response.read())
        return body

    def end(self, number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[Server] = []
        self.store = f"tcpstore://127.0.0.1:{free_port()}"
        self.options = [part for key, value in SHAPE.items() for part in ("--runner-option", f"{key}={value}")]

    def start(self, prefillers: int, decoders: int, extra: dict[str, list[str]] | None = None) -> None:
        more = extra or {}
        # The router first: it keeps the registry.
        router = self._spawn("router", ["router", "--port", "0", "--model", "tiny", *more.get("router", [])])
        names = [f"prefill{i}" for i in range(prefillers)] + [f"decode{i}" for i in range(decoders)]
        workers = [self.spawn_worker(name, more.get(name[:-1], [])) for name in names]
        for server in [router, *workers]:
            server.ready()
        self.until(lambda: self.router_sees(prefillers, decoders))

    def spawn_worker(self, name: str, extra: list[str]) -> Server:
        role = name.rstrip("0123456789")
        settings = ["--model", "tiny", "--nic", "tcp://127.0.0.1", "--liveness", "1", "--ttl", "2", *self.options]
        if role == "prefill":
            settings += ["--chunk", "64", "--ticket-timeout", "20"]
        return self._spawn(name, [role, *settings, *extra])

    def _spawn(self, name: str, arguments: list[str]) -> Server:
        server = Server(self.folder, name, [*arguments, "--membership", self.store])
        self.servers.append(server)
        return server

    def __getitem__(self, name: str) -> Server:
        return next(server for server in self.servers if server.name == name)

    def router_sees(self, prefillers: int, decoders: int) -> bool:
        health = self["router"].health()
        return bool((health["prefillers"], health["decoders"]) == (prefillers, decoders))

    def until(self, check: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not check():
            if time.monotonic() > end:
                logs = "\n".join(f"---- {server.name}\n{server.text()}" for server in self.servers)
                raise AssertionError(f"it did not come about within {seconds} s\n{logs}")
            time.sleep(0.02)

    def post(self, **body: Any) -> dict[str, Any]:
        """A completion; HTTP errors raise."""
        request = urllib.request.Request(
            f"{self['router'].url}/v1/completions",
            json.dumps({"model": "tiny", "return_token_ids": True, "railwire_timing": True, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def stream(self, **body: Any) -> Iterator[dict[str, Any]]:
        request = urllib.request.Request(
            f"{self['router'].url}/v1/completions",
            json.dumps({"model": "tiny", "return_token_ids": True, "stream": True, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            for line in response:
                if not line.strip():
                    continue
                assert line.startswith(b"data: ")
                data = line[6:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
        raise AssertionError("the stream ended without [DONE]")

    def nothing_is_held(self, *names: str) -> bool:
        """No leg, ticket or block is left behind on these workers."""
        return all(
            health["active"] == 0 and health.get("open_tickets", 0) == 0 and health["free_blocks"] == NUM_BLOCKS
            for health in (self[name].health() for name in names)
        )

    def kill(self) -> None:
        for server in self.servers:
            server.process.kill()
        for server in self.servers:
            server.process.wait(10.0)
            if server.process.stdout is not None:
                server.process.stdout.close()


@contextlib.contextmanager
def running(folder: Path, prefillers: int, decoders: int, **extra: list[str]) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start(prefillers, decoders, extra)
        yield cluster
    finally:
        cluster.kill()


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(256) for _ in range(length)]


def ids(answer: dict[str, Any], index: int = 0) -> list[int]:
    return list(answer["choices"][index]["token_ids"])


def attempts(answer: dict[str, Any], index: int = 0) -> list[dict[str, Any]]:
    return list(answer["railwire"][index]["attempts"])
