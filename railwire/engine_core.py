"""What all parts of an engine stand on: its native engine, its NICs, the peers it knows, and whether it is open."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from railwire import _native, host, topology, wire
from railwire.dispatcher import EventSink, dispatcher, log
from railwire.errors import ClosedError, ConfigurationError, DescriptorError, StaleAddressError
from railwire.handshake import Connector, Pair
from railwire.memory import MemoryRegion, RemoteRegion
from railwire.nics import NicInfo, reachable
from railwire.peer import Peer

FORKED = "this engine belongs to the process that was forked: open an engine of its own in this one"


class SetUp(NamedTuple):
    """The arguments of ``TransferEngine``, which says what they mean."""

    device: str
    nics: Literal["auto"] | Sequence[str]
    progress: Literal["adaptive", "spin"]
    cpu: int | None
    secret: bytes | str | None
    liveness: float
    name: str | None
    options: Mapping[str, str] | None


class EngineCore(EventSink):
    """Set-up, and who is who. Events may come as soon as this has begun: parts that stand on it set themselves up
    first."""

    def __init__(self, setup: SetUp) -> None:
        device, nics, progress, liveness = setup.device, setup.nics, setup.progress, setup.liveness
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
        if setup.cpu is not None and setup.cpu < 0:
            raise ConfigurationError(f"cpu={setup.cpu}: cores are counted from 0; None pins to none")
        self._tag = dispatcher.register_engine(self)
        ordinal = topology.parse_device(device)
        all_options = {**(setup.options or {}), **({} if ordinal is None else {"gpu": str(ordinal)})}
        try:
            self._native = _native.Engine(
                specs, progress == "spin", -1 if setup.cpu is None else setup.cpu, liveness, self._tag, all_options
            )
        except _native.NativeError as error:
            raise ConfigurationError(str(error)) from error
        self.nics: tuple[NicInfo, ...] = tuple(NicInfo(**info) for info in self._native.nic_infos())
        for nic in self.nics:
            if nic.warning:
                log.warning("%s: %s", nic.name, nic.warning)
        pid = os.getpid()
        self.name = setup.name or _default_name(pid)
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
        secret = setup.secret
        key = secret.encode() if isinstance(secret, str) else bytes(secret or b"")
        self._connector = Connector(self._native, self._address, key, self._new_peer)

    @property
    def closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            self._check_process()
            raise ClosedError("the engine is closed")

    def _check_process(self) -> None:
        if self._inherited:
            raise ClosedError(FORKED)

    def _check_local(self, region: MemoryRegion) -> None:
        if region._engine is not self:
            raise ValueError(f"{region!r} is registered with engine {region._engine.name}, not with {self.name}")
        region.check_open()

    def _check_ours(self, other: object) -> None:
        """Raises ValueError for a peer or a group of another engine."""
        if getattr(other, "_engine", None) is not self:
            raise ValueError(f"{other!r} belongs to another engine than {self.name}")

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

    # ---- peers -------------------------------------------------------------------------------------------------------
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


def _default_name(pid: int) -> str:
    """Different for each engine of the process, those that are gone included: metrics must not run together."""
    number = next(_numbers)
    return f"{os.uname().nodename}:{pid}" + (f"/{number}" if number > 1 else "")


_numbers = itertools.count(1)
