"""The transfer engine: Railwire's one entry point."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

from railwire import _native, cuda, host, memory, topology, wire
from railwire.allocation import SharedBuffer, allocate_huge
from railwire.counter import MAX_IMM, Counter
from railwire.dispatcher import dispatcher
from railwire.errors import (
    ClosedError,
    ConfigurationError,
    ConnectError,
    DescriptorError,
    PeerLostError,
    RailwireError,
    StaleAddressError,
    check_seconds,
)
from railwire.handshake import Connector, Pair
from railwire.memory import MemoryRegion, Pages, RegionSlice, RemoteRegion, ScatterTarget
from railwire.messages import MessageQueue
from railwire.nics import NicInfo, reachable
from railwire.peer import EngineAddress, Peer, PeerGroup
from railwire.prepared import ArrivalWords, Trigger
from railwire.regions import Regions
from railwire.transfer import Transfer
from railwire.watcher import Watcher

MAX_MESSAGE_BYTES: int = _native.MAX_MESSAGE_BYTES
_FORKED = "this engine belongs to the process that was forked: open an engine of its own in this one"
_CREDIT_BATCH = 1 << 20  # bytes of messages taken before the sender is told

Source = MemoryRegion | RegionSlice


class TransferEngine:
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
        if progress not in ("adaptive", "spin"):
            raise ConfigurationError(f'progress is "adaptive" or "spin", not {progress!r}')
        if not 0.05 <= liveness <= 3600:
            raise ConfigurationError(f"liveness must be between 0.05 and 3600 seconds, not {liveness}")
        specs = topology.nics_for_device(device) if nics == "auto" else list(nics)
        if isinstance(nics, str) and nics != "auto":
            raise ConfigurationError(f'nics is "auto" or a list of names, not the string {nics!r}')
        if not specs:
            raise ConfigurationError("an engine needs at least one NIC")
        if len(specs) > 64:
            raise ConfigurationError(f"an engine has at most 64 NICs, not {len(specs)}")
        specs = [reachable(spec) for spec in specs]
        self.device = device
        self.liveness = liveness
        self.incarnation = secrets.token_bytes(16)
        """16 random bytes of this life of the engine."""
        self._closed = False
        self._inherited = False  # this process is a child of the one whose engine it is
        self._lock = threading.RLock()
        self._peers: dict[int, Peer] = {}
        self._by_incarnation: dict[bytes, Peer] = {}
        self._lost_incarnations: dict[bytes, str] = {}
        self._peer_handlers: list[Callable[[Peer], object]] = []
        self._message_handler: Callable[[Peer, bytes], object] | None = None
        self._messages = MessageQueue()
        self._credits: dict[int, int] = {}
        self._watchers: dict[int, Watcher] = {}
        self._triggers: dict[int, Trigger] = {}
        self._next_imm = 1 + secrets.randbelow(MAX_IMM // 2)
        if cpu is not None and cpu < 0:
            raise ConfigurationError(f"cpu={cpu}: cores are counted from 0; None pins to none")
        self._tag = dispatcher.register_engine(self)
        ordinal = topology.parse_device(device)
        all_options = {**(options or {}), **({} if ordinal is None else {"gpu": str(ordinal)})}
        try:
            self._native = _native.Engine(
                specs, progress == "spin", -1 if cpu is None else cpu, liveness, self._tag, all_options
            )
        except _native.NativeError as error:
            raise ConfigurationError(str(error)) from error
        self.nics: tuple[NicInfo, ...] = tuple(NicInfo(**info) for info in self._native.nic_infos())
        pid = os.getpid()
        self.name = name or _default_name(pid)
        self._address = wire.Address(
            wire.VERSION,
            self.incarnation,
            self.name[:256],
            host.host_id(),
            pid,
            host.process_start(pid),
            tuple(
                wire.NicAddress(nic.kind, nic.name, control, nic.takes_all_memory, min(nic.links_per_pair, 16))
                for nic, control in zip(self.nics, self._native.nic_addresses(), strict=True)
            ),
        )
        key = secret.encode() if isinstance(secret, str) else bytes(secret or b"")
        self._connector = Connector(self._native, self._address, key, self._new_peer)
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

    # ---- memory ------------------------------------------------------------------------------------------------------
    def register(self, buffer: Any, *, readable_only: bool = False) -> MemoryRegion:
        """Registers memory with all NICs and keeps its owner alive.

        Args:
            buffer: numpy array, torch tensor (CPU or CUDA), anything with the buffer protocol or DLPack, or
                ``(address, nbytes)``. Contiguous, not empty, and writable unless ``readable_only``.
            readable_only: a source: we may write from it, and peers may read it; a write of a peer to it is a
                ``ValueError`` at its call, and refused by our NICs if it is made nevertheless. For mapped checkpoints
                and other read-only memory.

        Raises:
            TypeError, ValueError: not such a buffer; also host memory that is not mapped, cannot be written though it
                should be, or lies beyond the end of the file that is mapped there.
            ConfigurationError: a NIC refuses it (a memlock limit, or GPU memory on a NIC that cannot reach it).
        """
        self._check_open()
        try:
            return memory.register(self, buffer, readable_only)
        except _native.NativeError as error:
            raise ConfigurationError(str(error)) from error

    def register_many(self, buffers: Sequence[Any], *, readable_only: bool = False) -> Regions:
        """Registers many buffers in one call: microseconds each. ``regions[i]`` is the region of ``buffers[i]``, and
        ``regions.descriptor`` describes all of them in one table of some 15 bytes a region.

        All or none is registered. Arguments and errors are those of :meth:`register`.
        """
        self._check_open()
        try:
            return Regions(self, buffers, readable_only)
        except _native.NativeError as error:
            raise ConfigurationError(str(error)) from error

    def allocate(self, nbytes: int, device: str = "cpu") -> MemoryRegion:
        """New memory, registered.

        Args:
            nbytes: its size.
            device: ``"cpu"``: page-aligned, zeroed, prefaulted. With an shm NIC it is a memfd that peers on this host
                map, which is the fastest way there; a child of fork() shares it. Otherwise it is on huge pages.
                ``region.array`` is the memory. ``"cuda:N"``: memory of that GPU that peers on
                this host can always map; what is in it is undefined. ``torch.as_tensor(region, device="cuda")`` is the
                memory.

        Raises:
            ConfigurationError: there is no such GPU, or not so much memory.
        """
        ordinal = topology.parse_device(device)
        if ordinal is None:
            if nbytes < 1:
                raise ValueError("nbytes must be positive")
            if not any(nic.kind == "shm" for nic in self.nics):
                return self.register(allocate_huge(nbytes))
            shared = SharedBuffer(nbytes)
            try:
                return self.register(shared)
            finally:
                shared.close_fd()
        return self.register(cuda.GpuMemory(nbytes, ordinal))

    # ---- one-sided ---------------------------------------------------------------------------------------------------
    def write(self, src: Source, dst: RemoteRegion, imm: int | None = None, *, after: Any = None) -> Transfer:
        """Writes ``src`` to ``dst``; with ``imm``, the receiver's counter gets one arrival.

        Args:
            after: a CUDA stream (torch, CuPy, anything with ``__cuda_stream__``, or a handle) or a recorded event: the
                source is read when the stream has done what it has been given so far, and no thread waits for it.
                :meth:`read`, :meth:`write_pages`, :meth:`scatter` and :meth:`barrier` have it, too.

        Raises:
            ValueError: different lengths.
            ClosedError, PeerLostError, StaleAddressError, DescriptorError: at the call.
        """
        self._check_local(src.region)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"source has {src.nbytes} bytes, destination {dst.nbytes}")
        peer = self._owner(dst)
        return self._transfer(
            _native.write,
            src.region._native, src.start, peer._native, dst.keys, dst.start, src.nbytes, _imm(imm),
            cuda.mark(after, self.device),
        )  # fmt: skip

    def read(self, src: RemoteRegion, dst: Source, *, after: Any = None) -> Transfer:
        """Reads ``src`` of a peer into local memory. Raises as :meth:`write` does."""
        self._check_local(dst.region)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"source has {src.nbytes} bytes, destination {dst.nbytes}")
        peer = self._owner(src)
        return self._transfer(
            _native.read,
            dst.region._native, dst.start, peer._native, src.keys, src.start, dst.nbytes,
            cuda.mark(after, self.device),
        )  # fmt: skip

    def write_pages(
        self,
        src: Source,
        src_pages: Pages,
        dst: RemoteRegion,
        dst_pages: Pages,
        page_bytes: int,
        imm: int | None = None,
        *,
        after: Any = None,
    ) -> Transfer:
        """Writes page ``src_pages[i]`` of ``src`` to page ``dst_pages[i]`` of ``dst``, for all i, in one call.

        Each page is one arrival at ``imm``. Pages that are contiguous on both sides travel together.

        Args:
            page_bytes: bytes of each page that are written.

        Raises:
            IndexError: a page leaves its region.
            ValueError: lists of different lengths, or runs that do not divide the page.
        """
        self._check_local(src.region)
        if page_bytes < 0:
            raise ValueError(f"page_bytes must not be negative, but is {page_bytes}")
        peer = self._owner(dst)
        return self._transfer(
            _native.write_pages,
            src.region._native, src_pages.indices, src_pages.layout(src.start),
            peer._native, dst.keys, dst_pages.indices, dst_pages.layout(dst.start),
            src.start + src.nbytes, dst.start + dst.nbytes, page_bytes, _imm(imm),
            cuda.mark(after, self.device),
        )  # fmt: skip

    def scatter(
        self,
        group: PeerGroup,
        src: Source,
        targets: Sequence[ScatterTarget],
        imm: int | None = None,
        *,
        after: Any = None,
    ) -> Transfer:
        """Writes slices of ``src`` to many peers at once. Each target is one arrival at its peer's counter ``imm``.

        If some targets fail, the others still complete; the transfer fails with the first failure.

        Raises:
            ValueError: a target of a peer outside the group.
        """
        self._check_local(src.region)
        self._check_ours(group)
        native = []
        for target in targets:
            index = group._member(target.dst)
            if target.src_offset < 0 or target.src_offset + target.dst.nbytes > src.nbytes:
                raise IndexError(
                    f"source bytes {target.src_offset}..{target.src_offset + target.dst.nbytes} of a scatter lie "
                    f"outside {src.nbytes}"
                )
            dst = target.dst
            native.append((index, dst.keys, src.start + target.src_offset, dst.start, dst.nbytes))
        gate = cuda.mark(after, self.device)
        return self._transfer(_native.scatter, src.region._native, group._natives, native, _imm(imm), gate)

    def barrier(self, group: PeerGroup, imm: int, *, after: Any = None) -> Transfer:
        """One arrival at counter ``imm`` of every peer of the group, and nothing else."""
        self._check_ours(group)
        return self._transfer(_native.barrier, group._natives, _imm(imm), cuda.mark(after, self.device))

    # ---- counters ----------------------------------------------------------------------------------------------------
    def new_imm(self) -> int:
        """An immediate that is not in use: new_imm() has not given it out before, or (22 bits: it wraps after four
        million) long ago, and nothing has arrived for it, waits for it or has failed since it was used up or reset.

        Raises:
            RailwireError: all are in use.
        """
        return self.new_imms(1)

    def new_imms(self, count: int) -> int:
        """The first of ``count`` consecutive immediates that are not in use, see :meth:`new_imm`."""
        if not 1 <= count <= MAX_IMM:
            raise ValueError(f"between 1 and {MAX_IMM} immediates, not {count}")
        self._check_open()
        with self._lock:
            first = self._native.find_unused_ids(self._next_imm % MAX_IMM + 1, count)
            if first is None:
                raise RailwireError(
                    f"no {count} consecutive immediates are free: counters that are done with are to be reset()"
                )
            self._next_imm = first + count - 1
            return first

    def counter(self, imm: int) -> Counter:
        """The counter of an immediate, 0 to 4194303, chosen by the user or by :meth:`new_imm`."""
        return Counter(self, _imm(imm))

    def arrival_words(self, first_imm: int, writers: Sequence[Peer]) -> ArrivalWords:
        """Words of memory that follow the counters of immediates ``first_imm``, ``first_imm + 1`` and so on, each of
        which one peer writes: for kernels that wait for arrivals. Nothing else should expect on these counters.

        Raises:
            ValueError: no writers, or a counter that is followed already. ClosedError: the engine is closed.
        """
        return ArrivalWords(self, first_imm, writers)

    # ---- messages ----------------------------------------------------------------------------------------------------
    def send(self, peer: Peer, message: bytes | bytearray | memoryview) -> Transfer:
        """Sends a message, at most 60 KiB, whatever the NICs carry at once. In order, once.

        Done when the peer's engine has it. Waits for room while the peer's user has 16 MiB of messages still to take.

        Raises:
            ValueError: too long. Write such data into a registered region instead.
        """
        self._check_open()
        self._check_ours(peer)
        peer.check()
        data = bytes(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"a message has at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}: write() it into a region instead"
            )
        return Transfer(self, _native.send(self._native, peer._native, data))

    def on_message(self, handler: Callable[[Peer, bytes], object] | None) -> None:
        """Calls ``handler(peer, message)`` on the dispatcher, in order. None: back to receive() and messages()."""
        self._message_handler = handler

    def receive(self, timeout: float | None = None) -> tuple[Peer, bytes]:
        """The next message. Raises TimeoutError, ClosedError."""
        item = self._messages.get(timeout)
        self._message_taken(*item)
        return item

    async def messages(self) -> AsyncIterator[tuple[Peer, bytes]]:
        """``async for peer, message in engine.messages()``; ends when the engine is closed."""
        while True:
            try:
                item = await self._messages.get_async()
            except ClosedError:
                return
            self._message_taken(*item)
            yield item

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

    @property
    def closed(self) -> bool:
        return self._closed

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
    def _check_open(self) -> None:
        if self._closed:
            self._check_process()
            raise ClosedError("the engine is closed")

    def _check_process(self) -> None:
        if self._inherited:
            raise ClosedError(_FORKED)

    def _on_forked(self) -> None:
        """In the child of a fork. Nothing of the engine may be touched there, not even to close it."""
        self._lock = threading.RLock()
        self._messages = MessageQueue()
        self._messages.close()
        peers = list(self._peers.values())
        if not self._closed:
            self._closed = self._inherited = True
            _open_engines.discard(self)
            self._peers, self._by_incarnation = {}, {}
            for peer in peers:
                peer.lost._on_forked(_FORKED)

    def _check_local(self, region: MemoryRegion) -> None:
        if region._engine is not self:
            raise ValueError(f"{region!r} is registered with engine {region._engine.name}, not with {self.name}")
        region.check_open()

    def _check_ours(self, other: Peer | PeerGroup) -> None:
        if getattr(other, "_engine", None) is not self:
            raise ValueError(f"{other!r} belongs to another engine than {self.name}")

    def _transfer(self, function: Callable[..., _native.Operation], *args: Any) -> Transfer:
        self._check_open()
        try:
            return Transfer(self, function(self._native, *args))
        except _native.BadKeysError as error:
            raise DescriptorError(str(error)) from error
        except _native.NativeError as error:
            raise ClosedError(str(error)) from error

    def _owner(self, remote: RemoteRegion) -> Peer:
        """The peer that a descriptor belongs to."""
        if remote.peer is not None and remote.peer._engine is not self:
            raise ValueError(f"{remote!r} is bound to {remote.peer!r} of another engine of this process")
        peer = remote.peer or self._by_incarnation.get(remote.incarnation)
        if peer is None:
            self._check_open()
            why = self._lost_incarnations.get(remote.incarnation)
            if why is not None:
                raise StaleAddressError(f"the owner of {remote!r} is gone: {why}")
            raise DescriptorError(f"{remote!r} belongs to no peer of this engine: connect() to its owner first")
        if peer.state != "connected":
            self._check_open()  # its peers are told of the end a little later than we are
            peer.check()
        return peer

    def _peer_name(self, peer_id: int) -> str | None:
        with self._lock:
            peer = self._peers.get(peer_id)
        return peer.name if peer else None

    def _new_peer(self, native: _native.Peer, address: wire.Address, pairs: list[Pair], initiator: bool) -> Peer:
        """A peer that is being connected. What follows is told by its events: up, messages, lost, in this order."""
        names = [(self.nics[own].name, address.nics[other].name) for own, other in pairs]
        peer = Peer(self, native, address, names, initiator)
        with self._lock:
            self._peers[peer.id] = peer
        return peer

    def _admit(self, peer: Peer) -> None:
        """It is up: descriptors of its engine are written over it. Done once, by whoever learns it first."""
        with self._lock:
            if peer._admitted or self._peers.get(peer.id) is not peer:
                return  # or it is lost already
            peer._admitted = True
            if peer.initiated or peer.incarnation != self.incarnation:
                self._by_incarnation[peer.incarnation] = peer
            self._lost_incarnations.pop(peer.incarnation, None)

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
            self._credits.pop(peer_id, None)
        peer.lost._set(reason)

    def _on_message(self, peer_id: int, message: bytes) -> None:
        with self._lock:
            peer = self._peers.get(peer_id)
        if peer is None:
            return
        handler = self._message_handler
        if handler is None:
            self._messages.put((peer, message))
        else:
            dispatcher.call(handler, peer, message)
            self._message_taken(peer, message)

    def _message_taken(self, peer: Peer, message: bytes) -> None:
        """Gives the sender room again, a batch at a time."""
        with self._lock:
            taken = self._credits.get(peer.id, 0) + len(message) + _native.MESSAGE_OVERHEAD
            self._credits[peer.id] = 0 if taken >= _CREDIT_BATCH else taken
        if taken >= _CREDIT_BATCH and not self._closed:
            self._native.message_taken(peer._native, taken)

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


def _imm(imm: int | None) -> int:
    if imm is None:
        return -1
    if isinstance(imm, bool) or not isinstance(imm, int):
        raise TypeError(f"an immediate is an int, not {type(imm).__name__}")
    if not 0 <= imm <= MAX_IMM:
        raise ValueError(f"an immediate is 0..{MAX_IMM}, not {imm}")
    return imm


def _default_name(pid: int) -> str:
    """Different for each engine of the process, those that are gone included: metrics must not run together."""
    number = next(_numbers)
    return f"{os.uname().nodename}:{pid}" + (f"/{number}" if number > 1 else "")


_numbers = itertools.count(1)
_open_engines: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


def _close_all() -> None:
    """At exit: peers learn it at once instead of after their liveness time."""
    for engine in list(_open_engines):
        engine.close(timeout=0.5)


atexit.register(_close_all)

__all__ = ["MAX_MESSAGE_BYTES", "PeerLostError", "TransferEngine"]
