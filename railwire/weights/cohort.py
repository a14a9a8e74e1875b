"""What is exchanged once: who is where, and the plan for each cohort of receivers."""

from __future__ import annotations

import zlib

import msgspec

from railwire.weights.errors import PlanError
from railwire.weights.tables import MAX_TABLE_BYTES, RankTable


class TrainerInfo(msgspec.Struct, frozen=True, array_like=True):
    """A trainer rank: where its engine is, and what it holds."""

    rank: int
    address: bytes
    incarnation: str
    table: bytes


class ReceiverInfo(msgspec.Struct, frozen=True, array_like=True):
    """A receiver: where its engine is, what it wants, and the descriptors of its regions."""

    name: str
    address: bytes
    incarnation: str
    table: bytes
    descriptors: tuple[bytes, ...]


class CohortInfo(msgspec.Struct, frozen=True, array_like=True):
    """Receivers that joined together, by the numbers that they have in the store, in the order of the plan."""

    digest: bytes
    receivers: tuple[int, ...]


class PublishedInfo(msgspec.Struct, frozen=True, array_like=True):
    """The newest version that has been published; ``checksum``: what is written is compared with what has landed."""

    version: int
    checksum: bool


Info = TrainerInfo | ReceiverInfo | CohortInfo | PublishedInfo


def pack(info: Info) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(info), 1)


def unpack(data: bytes, kind: type[Info]) -> Info:
    """Raises PlanError for anything else."""
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(data, MAX_TABLE_BYTES)
        if inflater.unconsumed_tail:
            raise PlanError(f"more than {MAX_TABLE_BYTES} bytes")
        return msgspec.msgpack.decode(plain, type=kind)
    except (zlib.error, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise PlanError(f"not a {kind.__name__}: {error}") from error


def table_of(info: TrainerInfo | ReceiverInfo) -> RankTable:
    return RankTable.decode(info.table)


def member(name: str, slot: int) -> str:
    """A receiver's life: one that comes back under its name is another member."""
    return f"{name}#{slot}"


def name_of(member: str) -> str:
    return member.rpartition("#")[0]
