"""Where trainers and receivers find each other: a torch TCPStore, or anything with its four calls.

Every value is signed with the secret that both sides share, so who can only reach the port can neither join nor make
anybody believe anything. The store that we open listens on the named host only (torch's own listens everywhere).
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import time
from datetime import timedelta
from typing import Any, Protocol

from railwire.weights.errors import RendezvousError

_TAG = 16
_PART = 4 << 20  # bytes of one value; longer ones are cut
_MAX_PARTS = 1 << 10
_POLL = 0.02


class Store(Protocol):
    """What is asked of a store: the calls of ``torch.distributed.Store`` of these names."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...


class Rendezvous:
    """Signed values under a prefix of a store.

    Args:
        store: a client that nobody else waits on: a TCPStore's serves one call at a time.
        secret: shared by trainers and receivers; also that of their engines.
        prefix: of the keys, one per job.
    """

    def __init__(self, store: Store, *, secret: str | bytes = b"", prefix: str = "railwire/weights") -> None:
        self._store = store
        self._key = secret.encode() if isinstance(secret, str) else bytes(secret)
        self._prefix = prefix

    def put(self, key: str, value: bytes) -> None:
        parts = [value[i : i + _PART] for i in range(0, len(value), _PART)] or [b""]
        if len(parts) > _MAX_PARTS:
            raise RendezvousError(f"{key}: {len(value)} bytes are too many for a store")
        for number, part in enumerate(parts):
            self._put(f"{key}#{number}", part)
        self._put(key, len(parts).to_bytes(4, "big"))  # last: who finds it finds the parts

    def get(self, key: str, timeout: float = 0.0) -> bytes:
        """Waits for it.

        Raises:
            RendezvousError: it does not come, or is not signed with our secret.
        """
        deadline = time.monotonic() + timeout
        while not self.has(key):
            if time.monotonic() >= deadline:
                raise RendezvousError(f"{self._prefix}/{key} is not in the store after {timeout:g} s")
            time.sleep(_POLL)
        count = int.from_bytes(self._get(key), "big")
        if not 1 <= count <= _MAX_PARTS:
            raise RendezvousError(f"{key}: {count} parts cannot be")
        return b"".join(self._get(f"{key}#{number}") for number in range(count))

    def has(self, key: str) -> bool:
        return bool(self._call("check", [self._name(key)]))

    def number(self, key: str) -> int:
        """A number that nobody has been given before, from 1."""
        return int(self._call("add", self._name(key), 1))

    def count(self, key: str) -> int:
        """How many numbers have been given."""
        return int(self._call("add", self._name(key), 0))

    def _put(self, key: str, value: bytes) -> None:
        self._call("set", self._name(key), self._sign(key, value))

    def _get(self, key: str) -> bytes:
        return self._verify(key, bytes(self._call("get", self._name(key))))

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _sign(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._key, key.encode() + b"\0" + value, hashlib.sha256)[:_TAG] + value

    def _verify(self, key: str, signed: bytes) -> bytes:
        tag, value = signed[:_TAG], signed[_TAG:]
        if not hmac.compare_digest(tag, self._sign(key, value)[:_TAG]):
            raise RendezvousError(f"{self._prefix}/{key} is not signed with our secret")
        return value

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._store, name)(*args)
        except RendezvousError:
            raise
        except Exception as error:  # torch raises RuntimeErrors of several names, Ray its own
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RendezvousError(f"the store does not answer: {text}") from error


def tcp_store(host: str, port: int, *, server: bool = False, timeout: float = 30.0) -> Any:
    """A TCPStore. The one that keeps it (``server``) listens on ``host`` only; port 0 takes a free one, see ``.port``.

    Raises:
        RendezvousError: nobody listens there, or somebody else does.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    span = timedelta(seconds=timeout)
    try:
        if server:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((host, port), family=family, backlog=1024)
            bound = listener.getsockname()[1]
            return TCPStore(host, bound, None, True, span, wait_for_workers=False, master_listen_fd=listener.detach())
        _wait_for(host, port, timeout)
        return TCPStore(host, port, None, False, span, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise RendezvousError(f"TCPStore at {host}:{port}: {str(error).splitlines()[0]}") from error


def _wait_for(host: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class MemoryStore:
    """A store inside one process; behind a Ray actor (``ray.remote(MemoryStore)``), one for a cluster."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes, /) -> None:
        self._values[key] = bytes(value)

    def get(self, key: str, /) -> bytes:
        return self._values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int, /) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = b"%d" % total
        return total


class RayStore:
    """A store behind a Ray actor's handle: pass the handle to trainers and receivers.

    ``handle = ray.remote(MemoryStore).remote()``; on either side ``Rendezvous(RayStore(handle), secret=...)``.
    """

    def __init__(self, handle: Any, timeout: float = 30.0) -> None:
        self._handle = handle
        self._timeout = timeout

    def __getattr__(self, name: str) -> Any:
        if name not in ("set", "get", "check", "add"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            import ray

            return ray.get(getattr(self._handle, name).remote(*args), timeout=self._timeout)

        return call
