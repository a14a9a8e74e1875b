"""How the two hosts of the first day meet: agents on the far one, and an engine here, connected to one of them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from railwire.bench.first_day_agent import Memory
from railwire.bench.process import RunnerError
from railwire.bench.remote import Client, Host, Lines, check_secret, kind_of
from railwire.engine import TransferEngine
from railwire.memory import RemoteRegion
from railwire.peer import Peer
from railwire.transfer import Transfer

IMM, BACK = 11, 12
LIVENESS = 2.0


@dataclass
class Row:
    """One row of the support table."""

    title: str
    nics: list[str]  # ours
    device: str = "cpu"
    steps: dict[str, str] = field(default_factory=dict)  # "verified: ...", "FAILED: ..." or "not run: ..."

    @property
    def state(self) -> str:
        if any(text.startswith("FAILED") for text in self.steps.values()):
            return "FAILED"
        return "verified" if any(text.startswith("verified") for text in self.steps.values()) else "not run"


class Far(Client):
    """An agent on the other host."""

    def __init__(self, host: Host) -> None:
        connection = socket.create_connection((host.host, host.port + 1), timeout=20)
        super().__init__(connection, f"the agent at {host.host}", 20.0)
        self._lines.put({"secret": host.secret})
        self.answer()
        self._timeout_s = 300.0  # of steps, which write gigabytes


class AgentServer:
    """Starts one agent process a connection."""

    def __init__(self, host: str, port: int, secret: str, nics: list[str]) -> None:
        self._secret, self._nics = secret, nics
        self._socket = socket.create_server((host, port), backlog=16)
        self._processes: list[subprocess.Popen[bytes]] = []

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._processes = [one for one in self._processes if one.poll() is None]
            with connection, contextlib.suppress(OSError, RunnerError):
                connection.settimeout(10)
                lines = Lines(connection, "a stranger")
                hello = lines.get(10.0)
                try:
                    check_secret(hello, self._secret)
                except RunnerError as error:
                    lines.put({"error": str(error)})
                    continue
                lines.put({})  # nothing follows the hello before this: the agent reads all the rest
                connection.settimeout(None)
                command = [sys.executable, "-m", "railwire.bench.first_day_agent", json.dumps(self._nics)]
                self._processes.append(subprocess.Popen(command, stdin=connection.fileno(), stdout=2))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for process in self._processes:
            process.kill()
            process.wait()


class Meeting:
    """Our engine, and one of the other host's, for one row."""

    def __init__(self, row: Row, host: Host, nbytes: int, nics: Sequence[str] | None = None) -> None:
        ours = list(nics or row.nics)
        self.engine = TransferEngine(row.device, nics=ours, liveness=LIVENESS)
        self.memory = Memory(self.engine, row.device, nbytes)
        self.host, self.row, self.nbytes = host, row, nbytes
        self.fars: list[Far] = []
        self.far, self.peer, self.remote = self.meet()

    def meet(self) -> tuple[Far, Peer, RemoteRegion]:
        far = Far(self.host)
        self.fars.append(far)
        # Names of devices are each host's own: as many NICs of the kind as we have.
        opened = far.ask(
            "open", kind=kind_of(self.engine.nics[0].name if self.row.nics == ["auto"] else self.row.nics[0]),
            count=len(self.engine.nics), device=self.row.device, nbytes=self.nbytes, liveness=LIVENESS,
        )  # fmt: skip
        peer = self.engine.connect(bytes.fromhex(opened["address"]))
        return far, peer, RemoteRegion.from_bytes(bytes.fromhex(opened["descriptor"]))

    def write(self, nbytes: int, imm: int | None = IMM, remote: RemoteRegion | None = None) -> Transfer:
        return self.engine.write(self.memory.region[:nbytes], (remote or self.remote)[:nbytes], imm=imm)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *exc: object) -> None:
        for far in self.fars:
            far.close()
        self.engine.close()
