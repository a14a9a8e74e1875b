"""Addresses and peers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from railwire import _native, wire
from railwire.dispatcher import dispatcher
from railwire.errors import PeerLostError
from railwire.owner import Owner
from railwire.transfer import Fence, resolve

log = logging.getLogger("railwire")
_STATES = ("connecting", "connected", "closing", "closed", "lost")


class EngineAddress:
    """Where an engine can be reached: opaque, carried to others any way you like.

    ``bytes(address)`` and :meth:`from_bytes` are the two ends of that way.
    """

    def __init__(self, message: wire.Address) -> None:
        self._message = message

    @classmethod
    def from_bytes(cls, data: bytes) -> EngineAddress:
        """Raises DescriptorError if the bytes are no address."""
        return cls(wire.decode_address(bytes(data)))

    def __bytes__(self) -> bytes:
        return wire.encode(self._message)

    @property
    def incarnation(self) -> bytes:
        """16 random bytes of this life of the engine: a restarted process has another."""
        return self._message.incarnation

    @property
    def name(self) -> str:
        return self._message.name

    @property
    def nics(self) -> tuple[str, ...]:
        """Names of the NICs, in their order."""
        return tuple(nic.name for nic in self._message.nics)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineAddress) and self._message == other._message

    def __hash__(self) -> int:
        return hash(self._message.incarnation)

    def __repr__(self) -> str:
        return f"<EngineAddress {self.name} {self.incarnation.hex()[:8]} {', '.join(self.nics)}>"


class PeerLoss:
    """Awaitable end of a peer: ``await peer.lost`` or ``peer.lost.wait(timeout)`` returns why."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[str], object]] = []
        self._reason = ""

    def done(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> str:
        """Blocks until the peer is lost or closed; returns the reason. ``TimeoutError`` if it is still there,
        ``RuntimeError`` in a callback."""
        if timeout != 0 and not self._event.is_set():
            dispatcher.check_elsewhere("wait()")
        if not self._event.wait(timeout):
            raise TimeoutError(f"the peer is still there after {timeout} s")
        return self._reason

    def add_done_callback(self, callback: Callable[[str], object]) -> None:
        """Calls ``callback(reason)`` on the dispatcher when the peer is lost or closed."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return
        dispatcher.soon(lambda: dispatcher.call(callback, self._reason))

    def __await__(self) -> Generator[Any, None, str]:
        if not self._event.is_set():
            dispatcher.check_elsewhere("await")
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()

            def wake(_: str) -> None:
                try:
                    loop.call_soon_threadsafe(resolve, waiter)
                except RuntimeError:
                    pass  # the loop has been closed

            self.add_done_callback(wake)
            yield from waiter
        return self._reason

    def _on_forked(self, reason: str) -> None:
        """In a child process: the callbacks are the parent's."""
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._callbacks = []
        self._set(reason)

    def _set(self, reason: str) -> None:
        with self._lock:
            if self._event.is_set():
                return
            self._reason = reason
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            dispatcher.call(callback, reason)


@dataclass(frozen=True)
class Rails:
    """The links between two engines over NICs of one kind."""

    kind: str
    nics: tuple[tuple[str, str], ...]
    """Pairs of names: ours, theirs."""
    links: int
    up: int
    """How many of the links are up."""
    carries: str
    """Which of our memory they take."""
    why: str
    """Why it is this set, and in this place."""


class Peer:
    """Another engine that this one is connected to. Made by ``engine.connect()``, or by the other side's connect."""

    def __init__(
        self,
        engine: Owner,
        native: _native.Peer,
        address: wire.Address,
        nic_pairs: Sequence[tuple[str, str]],
        initiator: bool,
    ) -> None:
        self._engine = engine
        self._native = native
        self._address = address
        self.nics = tuple(own for own, _ in nic_pairs)
        """Names of our NICs that the links to this peer use, one per link."""
        self.initiated = initiator
        """True if we called connect(), False if the peer did."""
        self._nic_pairs = tuple(nic_pairs)
        self._unreached: list[str] = []  # why memory of the peer is not reached over a better kind of NIC
        self.lost = PeerLoss()
        self._admitted = False  # the engine knows that it is up

    @property
    def id(self) -> int:
        """Number of this peer in this engine; never reused."""
        return self._native.id

    @property
    def name(self) -> str:
        return self._address.name

    @property
    def incarnation(self) -> bytes:
        return self._address.incarnation

    @property
    def address(self) -> EngineAddress:
        return EngineAddress(self._address)

    @property
    def state(self) -> str:
        """``connecting``, ``connected``, ``closing``, ``closed`` or ``lost``."""
        return _STATES[self._native.state]

    @property
    def path(self) -> tuple[Rails, ...]:
        """Which NICs carry what to this peer, and why: its sets of rails, best first. A transfer goes over the first
        set on which both memories are registered."""
        engine = self._engine
        sets: list[Rails] = []
        at = 0
        for kind, usable, links, up in engine._native.peer_rails(self._native):
            names = self._nic_pairs[at : at + links]
            at += links
            ours = [nic for nic in engine.nics if nic.name in {own for own, _ in names}]
            carries = "any memory" if all(nic.takes_all_memory for nic in ours) else "host memory"
            if kind in ("shm", "tcp") and engine.device != "cpu":
                carries = f"host memory and memory of {engine.device}"  # which they copy themselves
            if not sets:
                why = f"{kind} is the best kind of NIC that both sides have"
            else:
                why = f"memory that {sets[0].kind} does not take goes over {kind}"
                if self._unreached:
                    why += f" ({'; '.join(self._unreached)})"
            if not usable:
                why += "; none of its links is up"
            sets.append(Rails(kind, tuple(dict.fromkeys(names)), links, up, carries, why))
        return tuple(sets)

    def _on_unreached(self, reason: str) -> None:
        """Some memory of its goes over a lesser kind of NIC. Said once for each reason."""
        if reason in self._unreached or len(self._unreached) == 8:
            return
        self._unreached.append(reason)
        log.warning("railwire: memory of %s is not reached over its best NIC: %s", self.name, reason)

    def close(self, timeout: float | None = None) -> None:
        """Ends the connection; returns only when this peer can no longer write into our memory.

        Transfers to and from it end. A peer that does not confirm within ``timeout`` seconds (default: the liveness
        time) is cut off.

        Raises:
            FenceError: it did not confirm, its process may still run, and it writes by itself (shm).
            RuntimeError: in a callback; use :meth:`close_async` there.
        """
        self._engine._check_process()
        dispatcher.check_elsewhere("peer.close()")
        self.close_async(timeout).wait()

    def close_async(self, timeout: float | None = None) -> Fence:
        """As :meth:`close`, to be awaited."""
        self._engine._check_process()
        seconds = self._engine.liveness if timeout is None else timeout
        return Fence(self._engine, _native.close_peer(self._engine._native, self._native, seconds))

    def check(self) -> None:
        """Raises PeerLostError unless the peer is connected."""
        if self.state != "connected":
            reason = self.lost._reason or f"peer {self.name} is {self.state}"
            raise PeerLostError(reason, peer=self.name, reason="peer_lost")

    def __repr__(self) -> str:
        return f"<Peer {self.name} {self.incarnation.hex()[:8]} {self.state} via {', '.join(self.nics)}>"
