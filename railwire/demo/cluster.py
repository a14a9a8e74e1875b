"""The processes of the demo: ``railwire serve router|prefill|decode`` on loopback; started, watched, killed, ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from railwire.demo.record import Worker
from railwire.errors import RailwireError

_START_SECONDS = 90.0
_STOP_SECONDS = 8.0
_PR_SET_PDEATHSIG = 1
_LINE = 1 << 20


class Failed(RailwireError):
    """The demo cannot go on; the message says why."""


class Announcement(msgspec.Struct):
    """What a serving process prints when it is there."""

    role: str
    url: str
    pid: int


class Process:
    """A child with its standard error in a file. It dies with us, whatever happens to us.

    Args:
        log: where its standard error goes.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self.expected_to_end = False

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(
        self, arguments: Sequence[str], *, stdin: bytes = b"", environment: dict[str, str] | None = None
    ) -> None:
        with self._log.open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=_LINE,
                # One thread each: two cores and five processes.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})},
                start_new_session=True,  # Ctrl-C is for us; we stop them in order
                preexec_fn=_die_with_parent(),
            )
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(ConnectionError):
            pipe.write(stdin)
            await pipe.drain()
        pipe.close()

    async def line(self, timeout: float) -> bytes:
        """The next line of its standard output.

        Raises:
            Failed: none came in time, or it has ended.
        """
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout)
        except asyncio.TimeoutError:
            raise Failed(f"{self.name} has said nothing for {timeout:g} s{self.last_words()}") from None
        if not line:
            raise Failed(f"{self.name} has ended{self.last_words()}")
        return line

    def last_words(self) -> str:
        """The end of its standard error, to be appended to a message."""
        try:
            text = self._log.read_text(errors="replace").strip()
        except OSError:
            return ""
        return "; its last words:\n" + "\n".join(text.splitlines()[-15:]) if text else ""

    async def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        self.expected_to_end = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def stop(self, timeout: float = _STOP_SECONDS) -> int | None:
        """SIGTERM, and after ``timeout`` seconds SIGKILL. Returns the exit status, None if it never ran."""
        self.expected_to_end = True
        if self._process is None:
            return None
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), timeout)
            if self.running:
                await self.kill()
        return self._process.returncode


class Cluster:
    """A router and its workers. Use as ``async with``: leaving it stops everything.

    Args:
        runner, model, options: for ``--runner``, ``--model``, ``--runner-option``.
        nics: for ``--nic``; empty: automatic.
        chunk: for ``--chunk`` of the prefill workers.
    """

    def __init__(
        self, *, runner: str, model: str, options: dict[str, Any], nics: Sequence[str] = (), chunk: int = 1024
    ) -> None:
        self._model = [f"--runner={runner}", f"--model={model}"]
        self._model += [f"--runner-option={key}={value}" for key, value in options.items()]
        self._nics = [f"--nic={nic}" for nic in nics]
        self._chunk = chunk
        self._membership = f"--membership=tcpstore://127.0.0.1:{_free_port()}"
        self._environment = {"RAILWIRE_SECRET": secrets.token_hex(16)}
        self._directory = tempfile.TemporaryDirectory(prefix="railwire-demo-")
        self._processes: dict[str, Process] = {}
        self._session: aiohttp.ClientSession | None = None
        self.workers: list[Worker] = []
        self.router_url = ""

    async def __aenter__(self) -> Cluster:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Prefillers and decoders first: they take leave of the router's registry.
        router = [process for name, process in self._processes.items() if name == "router"]
        others = [process for process in self._processes.values() if process not in router]
        for group in (others, router):
            await asyncio.gather(*(process.stop() for process in group), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        self._directory.cleanup()

    def process(self, name: str) -> Process:
        """A new child; it ends with the cluster."""
        process = self._processes[name] = Process(name, Path(self._directory.name) / f"{name}.log")
        return process

    async def start(self, role: str, name: str) -> Worker:
        """Starts ``railwire serve ROLE`` and waits until it answers.

        Raises:
            Failed: it did not start; the message has its last words.
        """
        worker = Worker(name, role)
        self.workers.append(worker)
        arguments = [sys.executable, "-c", "from railwire.cli import app; app()", "serve", role, "--host=127.0.0.1"]
        arguments += ["--port=0", "--log-level=warning", "--drain-timeout=3", self._membership, *self._model]
        if role != "router":
            # On one host silence means death sooner than between hosts.
            arguments += ["--liveness=2", "--ttl=3", *self._nics]
        if role == "prefill":
            arguments.append(f"--chunk={self._chunk}")
        process = self.process(name)
        await process.start(arguments, environment=self._environment)
        worker.pid = process.pid
        line = await process.line(_START_SECONDS)
        try:
            worker.url = msgspec.json.decode(line, type=Announcement).url
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Failed(f"{name} says {line[:100]!r}, not where it is{process.last_words()}") from error
        health = await self.health(worker)
        worker.instance = str(health.get("instance", ""))
        if role == "router":
            self.router_url = worker.url
            worker.state, worker.joined = "ready", time.monotonic()
        return worker

    async def health(self, worker: Worker) -> dict[str, Any]:
        """Its /health.

        Raises:
            Failed: no answer.
        """
        return await self._get(f"{worker.url}/health", worker.name)

    async def joined(self, workers: Sequence[Worker], timeout: float = _START_SECONDS) -> None:
        """Waits until the router knows all of them as ready.

        Raises:
            Failed: not within ``timeout`` seconds.
        """
        wanted = {worker.url for worker in workers}
        end = time.monotonic() + timeout
        while True:
            members = (await self._get(f"{self.router_url}/members", "router")).get("members", [])
            missing = wanted - {member["url"] for member in members if member["state"] == "ready"}
            if not missing:
                break
            if time.monotonic() > end:
                names = ", ".join(worker.name for worker in workers if worker.url in missing)
                raise Failed(f"the router has not heard of {names} within {timeout:g} s")
            await asyncio.sleep(0.05)
        for worker in workers:
            worker.state, worker.joined = "ready", time.monotonic()

    async def kill(self, worker: Worker) -> None:
        """SIGKILL in the middle of whatever it does."""
        worker.killed = time.monotonic()
        worker.state = "killed"
        await self._processes[worker.name].kill()

    def check(self) -> None:
        """Raises Failed if a process has ended that should not have."""
        for worker in self.workers:
            process = self._processes[worker.name]
            if worker.state == "ready" and not process.running and not process.expected_to_end:
                raise Failed(f"{worker.name} has died{process.last_words()}")

    async def _get(self, url: str, name: str) -> dict[str, Any]:
        assert self._session is not None
        try:
            async with self._session.get(url) as response:
                body = await response.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            words = self._processes[name].last_words()
            raise Failed(f"{name} does not answer at {url}: {error or type(error).__name__}{words}") from error
        if not isinstance(body, dict):
            raise Failed(f"{name} answers no JSON object at {url}")
        return body


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> Callable[[], None]:
    """For the child, before it becomes another program: SIGKILL when its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after the fork as little as possible is done
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare
