"""The ranks of a group meet: each says who it is and what it offers, all connect to all, nobody writes before all are
ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from railwire.engine import TransferEngine
from railwire.errors import ConfigurationError, ConnectTimeout, DescriptorError
from railwire.memory import MemoryRegion, RemoteRegion
from railwire.moe.config import MoeConfig, check_equal, to_dict
from railwire.moe.rendezvous import Exchange
from railwire.peer import EngineAddress, Peer


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """What each rank tells all others at the start."""

    rank: int
    config: dict[str, Any]
    address: bytes
    regions: list[bytes]
    first_imm: int
    generation: int


@dataclass(frozen=True, slots=True)
class Remote:
    """Another rank, and what it offers."""

    peer: Peer
    regions: list[RemoteRegion]
    first_imm: int


def meet(
    engine: TransferEngine,
    exchange: Exchange,
    config: MoeConfig,
    rank: int,
    regions: Sequence[MemoryRegion],
    first_imm: int,
    generation: int,
    timeout: float,
    ready: Callable[[], None],
) -> tuple[dict[int, Remote], int]:
    """Tells all ranks about this one, connects to all that are there, and returns when all are ready.

    Args:
        regions: what the others may write to; of the same sizes everywhere.
        ready: called when all are connected and before anybody writes.

    Returns:
        The other ranks that are there, and the highest generation of all.

    Raises:
        ConfigurationError: the ranks disagree, or one is not who it should be.
        ConnectError: one cannot be reached.
    """
    mine = Hello(
        rank,
        to_dict(config),
        bytes(engine.address),
        [bytes(region.descriptor) for region in regions],
        first_imm,
        generation,
    )
    hellos = _decode(exchange(msgspec.msgpack.encode(mine)), config.ranks, rank)
    sizes = [region.nbytes for region in regions]
    remotes = {}
    for other, hello in hellos.items():
        if other > rank:
            remotes[other] = _remote(hello, sizes, engine.connect(hello.address, timeout))
    exchange(b"connected")
    for other, hello in hellos.items():
        if other < rank:
            remotes[other] = _remote(hello, sizes, _connected(engine, hello, timeout))
    ready()
    exchange(b"ready")
    return remotes, max(hello.generation for hello in hellos.values())


def _decode(data: Sequence[bytes], ranks: int, own: int) -> dict[int, Hello]:
    if len(data) != ranks:
        raise ConfigurationError(f"the exchange joins {len(data)} ranks, the configuration says {ranks}")
    hellos = {}
    configs = {}
    for rank, item in enumerate(data):
        if not item:
            continue
        try:
            hello = msgspec.msgpack.decode(item, type=Hello)
            configs[rank] = MoeConfig(**hello.config)
        except (msgspec.MsgspecError, TypeError) as error:
            raise ConfigurationError(f"rank {rank} speaks another version of this protocol: {error}") from None
        if hello.rank != rank:
            raise ConfigurationError(f"rank {hello.rank} came as number {rank} of the exchange")
        hellos[rank] = hello
    if own not in hellos:
        raise ConfigurationError(f"the exchange does not return what rank {own} itself has said")
    check_equal(configs)
    return hellos


def _remote(hello: Hello, sizes: list[int], peer: Peer) -> Remote:
    regions = [RemoteRegion.from_bytes(data).over(peer) for data in hello.regions]
    theirs = [region.nbytes for region in regions]
    if theirs != sizes:
        raise DescriptorError(f"rank {hello.rank} offers regions of {theirs} bytes, not {sizes}")
    return Remote(peer, regions, hello.first_imm)


def _connected(engine: TransferEngine, hello: Hello, timeout: float) -> Peer:
    """The peer that has connected to us, which may take a moment to show."""
    incarnation = EngineAddress.from_bytes(hello.address).incarnation
    end = time.monotonic() + timeout
    while True:
        for peer in engine.peers:
            if peer.incarnation == incarnation:
                return peer
        if time.monotonic() > end:
            raise ConnectTimeout(f"rank {hello.rank} has not connected within {timeout:g} s")
        time.sleep(0.001)
