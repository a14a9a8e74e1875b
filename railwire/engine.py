"""The transfer engine: Railwire's one entry point."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from railwire import _native, host
from railwire.dispatcher import dispatcher
from railwire.engine_core import FORKED, SetUp
from railwire.errors import ConnectError, check_seconds
from railwire.group import PeerGroup
from railwire.messaging import MAX_MESSAGE_BYTES, Messaging
from railwire.one_sided import OneSided
from railwire.peer import EngineAddress, Peer
from railwire.prepared import Trigger
from railwire.registration import Registration
from railwire.watcher import Watcher


class TransferEngine(Registration, OneSided, Messaging):
    """Moves bytes between processes over all NICs of one GPU, or of one CPU-only process.

    Args:
        device: ``"cpu"`` or ``"cuda:N"``; with ``nics="auto"`` it decides which NICs are near.
        nics: ``"auto"``, or names: ``tcp://HOST[:PORT]``, ``tcp``, ``shm``, ``efa:DOMAIN``,
            ``libfabric:PROVIDER[:DOMAIN]``, ``sim://FABRIC/NAME``. `railwire doctor` lists what there is.
        progress: ``"adaptive"`` spins while busy and then sleeps on the NICs' descriptors; ``"spin"`` never sleeps:
            give it a core of its own.
        cpu: core to pin the worker to; None leaves that to the kernel.
        secret: shared by all engines that may connect; peers that cannot prove they know it are refused.
        liveness: seconds of silence after which a peer counts as dead, and everything that depends on it fails.
        name: for people, in errors and metrics; default ``host:pid``, and ``host:pid/2`` for the process's second.
        options: provider options, see docs/nics.md.

    Raises:
        ConfigurationError: a NIC cannot be opened; the message says why and what to do.
    """

    def __init__(
        self,
        device: str = "cpu",
        nics: Literal["auto"] | Sequence[str] = "auto",
        *,
        progress: Literal["adaptive", "spin"] = "adaptive",
        cpu: int | None = None,
        secret: bytes | str | None = None,
        liveness: float = 5.0,
        name: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._peer_handlers: list[Callable[[Peer], object]] = []
        self._watchers: dict[int, Watcher] = {}
        self._triggers: dict[int, Trigger] = {}
        super().__init__(SetUp(device, nics, progress, cpu, secret, liveness, name, options))
        _open_engines.add(self)

    # ---- peers -------------------------------------------------------------------------------------------------------
    @property
    def address(self) -> EngineAddress:
        """Where others can reach this engine."""
        return EngineAddress(self._address)

    @property
    def peers(self) -> tuple[Peer, ...]:
        """All peers that are connected, whoever began."""
        with self._lock:
            return tuple(peer for peer in self._peers.values() if peer._admitted and peer.state == "connected")

    def connect(self, address: EngineAddress | bytes, timeout: float | None = None) -> Peer:
        """Connects to an engine, or returns the peer if the two are connected already.

        Args:
            address: the other engine's ``engine.address``.
            timeout: seconds; default twice the liveness time.

        Raises:
            StaleAddressError: the process at this address has restarted.
            AuthenticationError: the secrets differ.
            ConnectTimeout: nobody answers.
            ConnectError: it refuses, and says why; or one of the two processes has no open files to spare.
            ConfigurationError: the two have no kind of NIC in common.
        """
        self._check_open()
        target = EngineAddress.from_bytes(address) if isinstance(address, bytes | bytearray) else address
        with self._lock:
            known = self._by_incarnation.get(target.incarnation)
        if known is not None and known.state == "connected" and target.incarnation != self.incarnation:
            return known
        if problem := host.files_problem(self.name):
            raise ConnectError(problem)
        try:
            seconds = 2 * self.liveness if timeout is None else check_seconds(timeout)
            peer = self._connector.connect(target._message, seconds)
        except ConnectError:
            self._check_open()  # closed meanwhile: no fault of the peer's
            raise
        self._admit(peer)
        return peer

    async def connect_async(self, address: EngineAddress | bytes, timeout: float | None = None) -> Peer:
        """As :meth:`connect`, without blocking the event loop."""
        return await asyncio.to_thread(self.connect, address, timeout)

    def on_peer(self, handler: Callable[[Peer], object]) -> None:
        """Calls ``handler(peer)`` on the dispatcher for every engine that connects to this one from now on."""
        self._peer_handlers.append(handler)

    def peer_group(self, peers: Sequence[Peer]) -> PeerGroup:
        """Peers that are addressed together. Raises PeerLostError if one is not connected, ValueError for doubles."""
        self._check_open()
        for peer in peers:
            self._check_ours(peer)
            peer.check()
        if len({peer.id for peer in peers}) != len(peers):
            raise ValueError("a peer group names each peer once")
        return PeerGroup(self, peers)

    # ---- watchers ----------------------------------------------------------------------------------------------------
    def watch(self, callback: Callable[[int, int], object]) -> Watcher:
        """A 64-bit word that anybody may increment; ``callback(old, new)`` runs on the dispatcher when it has moved.

        Values in between may be skipped. With a CUDA device the word is mapped for its kernels.
        """
        self._check_open()
        if not callable(callback):
            raise TypeError(f"{callback!r} cannot be called")
        if self.device != "cpu":
            _native.expect_gpu_words()
        watcher = Watcher(self, self._native.watch(), callback)
        with self._lock:
            self._watchers[watcher.id] = watcher
        return watcher

    # ---- the rest ----------------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, Any]:
        """Counts since the engine began: see docs/metrics.md for every key."""
        self._check_open()
        raw = self._native.stats()
        nics = [
            {"name": nic.name, "kind": nic.kind, **counts} for nic, counts in zip(self.nics, raw["nics"], strict=True)
        ]
        with self._lock:
            peers = [
                {"name": self._peers[counts["id"]].name, "state": self._peers[counts["id"]].state, **counts}
                for counts in raw["peers"]
                if counts["id"] in self._peers
            ]
        return {
            "nics": nics,
            "peers": peers,
            "transfers": {key: raw[key] for key in ("submitted", "done", "failed", "cancelled", "active")},
            "arrivals": raw["units"] / 16,
            "pending_expectations": raw["pending_expectations"],
            "regions": raw["regions"],
            "bad_frames": raw["bad_frames"],
            "callback_errors": dispatcher.callback_errors,
            "worker": {key: raw[key] for key in ("loops", "sleeps", "inline_drives", "post_latency_ns")},
        }

    def close(self, timeout: float | None = None) -> None:
        """Cancels what is in flight, tells the peers, ends the worker and frees everything. Idempotent.

        Args:
            timeout: seconds to wait for peers to confirm; default the liveness time.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._native.close(self.liveness if timeout is None else timeout)
        self._messages.close()
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.lost._set("the engine was closed")
        _open_engines.discard(self)

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.peers)} peers"
        return f"<TransferEngine {self.name} on {', '.join(nic.name for nic in self.nics)}: {state}>"

    # ---- what the dispatcher and the other modules call --------------------------------------------------------------

    def _on_forked(self) -> None:
        """In the child of a fork. Nothing of the engine may be touched there, not even to close it."""
        self._lock = threading.RLock()
        self._drop_messages()
        peers = list(self._peers.values())
        if not self._closed:
            self._closed = self._inherited = True
            _open_engines.discard(self)
            self._peers, self._by_incarnation = {}, {}
            for peer in peers:
                peer.lost._on_forked(FORKED)

    def _on_peer_up(self, peer_id: int) -> None:
        with self._lock:
            peer = self._peers.get(peer_id)
        if peer is None:
            return
        self._admit(peer)
        if not peer.initiated:
            for handler in list(self._peer_handlers):
                dispatcher.call(handler, peer)

    def _on_peer_lost(self, peer_id: int) -> None:
        with self._lock:
            peer = self._peers.get(peer_id)
            if peer is None:
                return
        reason = self._native.peer_failure(peer._native)[3]
        with self._lock:
            if self._by_incarnation.get(peer.incarnation) is peer:
                del self._by_incarnation[peer.incarnation]
                self._lost_incarnations[peer.incarnation] = reason
                while len(self._lost_incarnations) > 4096:
                    self._lost_incarnations.pop(next(iter(self._lost_incarnations)))
            del self._peers[peer_id]
            self._forget_credit(peer_id)
        peer.lost._set(reason)

    def _keep_trigger(self, trigger: Trigger) -> None:
        with self._lock:
            self._triggers[trigger.id] = trigger

    def _forget_word(self, watcher_id: int) -> None:
        with self._lock:
            self._watchers.pop(watcher_id, None)
            self._triggers.pop(watcher_id, None)

    def _on_unreached(self, peer_id: int, reason: bytes) -> None:
        with self._lock:
            peer = self._peers.get(peer_id)
        if peer is not None:
            peer._on_unreached(reason.decode(errors="replace"))

    def _on_watcher(self, watcher_id: int) -> None:
        with self._lock:
            watcher = self._watchers.get(watcher_id)
        if watcher is not None:
            watcher._moved()

    def _on_action(self, watcher_id: int) -> None:
        with self._lock:
            trigger = self._triggers.get(watcher_id)
        if trigger is not None:
            trigger._tell()

    def _on_handshake(self, nic: int, frame: bytes) -> None:
        if not self._closed:
            self._connector.on_frame(nic, frame)


_open_engines: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


def _close_all() -> None:
    """At exit: peers learn it at once instead of after their liveness time."""
    for engine in list(_open_engines):
        engine.close(timeout=0.5)


atexit.register(_close_all)

__all__ = ["MAX_MESSAGE_BYTES", "TransferEngine"]
