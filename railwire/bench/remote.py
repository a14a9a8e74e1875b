"""The same benchmark between two hosts: one listens and starts targets, the other connects and measures.

The listener starts nothing but what it knows itself (``CONTENDERS``), on its own NICs, and passes the lines of
``bench/runner.py`` between the connection and the process. A shared word keeps strangers out; who knows it may keep
this host's NICs busy, and no more. Lines are JSON, as between the processes of one host.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from railwire.bench.contender import Setting
from railwire.bench.contenders import CONTENDERS, RIVALS, WHERE_RIVALS_ARE
from railwire.bench.process import MissingContender, RunnerError, RunnerProcess, answered

DEFAULT_PORT = 7411
_VERSION = 1
_LONGEST_LINE = 1 << 20
_PINGS = 32
_LARGEST_BUFFER = 64 << 30


@dataclass(frozen=True)
class Host:
    """Where the other half listens."""

    host: str
    port: int = DEFAULT_PORT
    secret: str = ""

    @classmethod
    def parse(cls, text: str, secret: str = "") -> Host:
        """``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``. Raises ValueError."""
        host, colon, port = text.rpartition(":") if not text.endswith("]") and text.count(":") != 0 else (text, "", "")
        if text.count(":") > 1 and not text.startswith("["):
            host, colon, port = text, "", ""
        if colon and not (port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"{port!r} is not a port")
        return cls(host.strip("[]"), int(port) if colon else DEFAULT_PORT, secret)


class Lines:
    """Lines of JSON over a socket. Raises RunnerError: the other side has gone, is silent, or sends no such thing."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection = connection
        self._name = name
        self._pending = b""

    def put(self, fields: dict[str, Any]) -> None:
        try:
            self.connection.sendall(json.dumps(fields).encode() + b"\n")
        except OSError as error:
            raise RunnerError(f"{self._name} is gone: {error}") from None

    def get(self, timeout: float | None) -> dict[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._pending:
            try:
                self.connection.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
                data = self.connection.recv(1 << 16)
            except TimeoutError:
                raise RunnerError(f"{self._name} did not answer in time") from None
            except OSError as error:
                raise RunnerError(f"{self._name} is gone: {error}") from None
            if not data:
                raise RunnerError(f"{self._name} has closed the connection")
            self._pending += data
            if len(self._pending) > _LONGEST_LINE:
                raise RunnerError(f"{self._name} sends no lines")
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            fields = json.loads(line)
        except ValueError:
            raise RunnerError(f"{self._name} sends no JSON") from None
        if not isinstance(fields, dict):
            raise RunnerError(f"{self._name} sends no JSON object")
        return fields


class Client:
    """Commands to a process on another host, and its answers."""

    def __init__(self, connection: socket.socket, name: str, timeout_s: float) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._lines = Lines(connection, name)

    def tell(self, do: str, **fields: Any) -> None:
        self._lines.put({"do": do, **fields})

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RunnerError: the other side says so, has gone, or is silent for too long."""
        return answered(self._lines.get(self._timeout_s), self.name, f"on {self.name}: ")

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        self.tell(do, **fields)
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(RunnerError):
            self.tell("quit")
        self._lines.connection.close()


def check_secret(hello: dict[str, Any], secret: str) -> None:
    """Raises RunnerError for a first line that does not have our secret."""
    if not hmac.compare_digest(str(hello.get("secret", "")).encode(), secret.encode()):
        raise RunnerError("the secrets differ (--secret)")


class RemoteProcess(Client):
    """A target on another host, with the interface of ``RunnerProcess``."""

    def __init__(self, host: Host, contender: str, nic: str, setting: Setting, buffer_bytes: int, timeout_s: float):
        try:
            connection = socket.create_connection((host.host, host.port), timeout=10)
        except OSError as error:
            raise RunnerError(
                f"nobody listens at {host.host} port {host.port} ({error}): run railwire bench p2p --listen there"
            ) from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The other side's own time-outs come first.
        super().__init__(connection, f"{contender} target at {host.host}", timeout_s + 20.0)
        try:
            self._lines.put({
                "version": _VERSION, "secret": host.secret, "contender": contender, "nic": nic,
                "progress": setting.progress, "receivers": setting.receivers, "link_depth": setting.link_depth,
                "buffer_bytes": buffer_bytes, "timeout_s": timeout_s, "device": setting.devices[1],
            })  # fmt: skip
            welcome = self.answer()
            self.nic: str = welcome["nic"]
            self.clock_offset_ns = self._compare_clocks()
        except BaseException:
            connection.close()
            raise

    def _compare_clocks(self) -> int:
        """Its monotonic clock less ours: of the quickest of several round trips, the middle."""
        best = None
        for _ in range(_PINGS):
            begin = time.monotonic_ns()
            there = int(self.ask("clock")["ns"])
            end = time.monotonic_ns()
            if best is None or end - begin < best[0]:
                best = (end - begin, there - (begin + end) // 2)
        assert best is not None
        return best[1]

    def kill(self) -> None:
        self._lines.connection.close()


class Listener:
    """Serves connections until it is closed, which ends what it has started.

    Args:
        nics: of this host; the connecting side names one of them by its kind. Empty: what it asks for.
        device: where this side's memory lies; empty: where the connecting side says.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(
        self, host: str, port: int, *, secret: str = "", nics: Sequence[str] = (), device: str = "",
        cpus: Sequence[int] = (), say: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._secret, self._nics, self._device, self._cpus, self._say = secret, list(nics), device, list(cpus), say
        self._attended: dict[threading.Thread, socket.socket] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=16)
        self.port: int = self._socket.getsockname()[1]

    def serve(self) -> None:
        """Until close(). Several connections at a time: each contender has one of its own."""
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._attend, args=(connection, str(address[0])), daemon=True)
            self._attended = {one: other for one, other in self._attended.items() if one.is_alive()}
            self._attended[thread] = connection
            thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread, connection in self._attended.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(15)

    def _attend(self, connection: socket.socket, who: str) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = Lines(connection, who)
        process: RunnerProcess | None = None
        try:
            process = self._start(lines.get(10.0), lines)
            if process is not None:
                self._relay(lines, process)
        except (RunnerError, OSError) as error:
            self._say(f"{who}: {error}")
            with contextlib.suppress(RunnerError):
                lines.put({"error": str(error)})
        finally:
            if process is not None:
                process.kill()
                process.close()
            connection.close()

    def _start(self, hello: dict[str, Any], lines: Lines) -> RunnerProcess | None:
        if hello.get("version") != _VERSION:
            raise RunnerError("another release of railwire; use the same on both hosts")
        check_secret(hello, self._secret)
        contender = CONTENDERS.get(str(hello.get("contender")))
        if contender is None:
            name = str(hello.get("contender"))
            raise RunnerError(f"{name} {WHERE_RIVALS_ARE}" if name in RIVALS else f"unknown contender {name!r}")
        nic = self._own_nic(str(hello.get("nic", "")))
        device = self._device or str(hello.get("device", "cpu"))
        buffer_bytes, timeout_s = int(hello.get("buffer_bytes", 0)), float(hello.get("timeout_s", 0))
        if not (0 < buffer_bytes <= _LARGEST_BUFFER and 0 < timeout_s <= 3600):
            raise RunnerError("no sensible buffer_bytes or timeout_s")
        setting = Setting(
            progress="spin" if hello.get("progress") == "spin" else "adaptive",
            receivers=max(1, min(64, int(hello.get("receivers", 1)))),
            link_depth=max(0, int(hello.get("link_depth", 0))),
            devices=(device, device),
            two_hosts=True,
        )
        launch = contender.launch(nic, setting)
        if launch is None:
            lines.put({"missing": f"{contender.name} has nothing for {nic}"})
            return None
        self._say(f"{contender.name} on {nic}, {device}")
        process = RunnerProcess(launch, "target", nic, self._cpus, buffer_bytes, timeout_s)
        try:
            process.answer()
        except MissingContender:
            lines.put({"missing": contender.missing})
            process.close()
            return None
        except BaseException:
            process.kill()
            process.close()
            raise
        lines.put({"nic": nic})
        return process

    def _own_nic(self, asked: str) -> str:
        kind = kind_of(asked)
        own = [nic for nic in self._nics if kind_of(nic) == kind]
        if self._nics and not own:
            raise RunnerError(
                f"a NIC of the kind {kind!r} was asked for; this side listens for {', '.join(self._nics)}"
            )
        # A name of the other host's says nothing here.
        return own[0] if own else kind

    def _relay(self, lines: Lines, process: RunnerProcess) -> None:
        while True:
            command = lines.get(None)
            do = str(command.pop("do", ""))
            if do == "quit":
                return
            if do == "clock":
                lines.put({"ns": time.monotonic_ns()})
                continue
            process.tell(do, **command)
            lines.put(process.answer())
            if do == "serve":  # it says that it is ready, and later that all has arrived
                lines.put(process.answer())


def kind_of(nic: str) -> str:
    """What a NIC's name begins with, as far as it means the same on another host: ``tcp``, ``efa``,
    ``libfabric:efa-direct``, ``auto``."""
    parts = nic.split(":")
    return ":".join(parts[:2]) if parts[0] == "libfabric" else parts[0]


def check_reaches(nic: str) -> None:
    """Raises ValueError for a NIC that no other host can reach."""
    if kind_of(nic) in ("shm", "sim", "libfabric:shm"):
        raise ValueError(f"{nic} reaches no other host")
