"""Descriptors of many regions as one table: a header once, then a column for each value.

A column of integers is its least value and, in as few bytes as they need, what each is more. Region ids are not carried
at all where they are those that the table's seed gives: ``id[i] = siphash(seed, first + i)`` (SipHash-2-4 of the number
as one 8-byte block, Aumasson and Bernstein 2012). Whoever has only the descriptor of one region cannot know the others.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from railwire import wire
from railwire.errors import DescriptorError

U64s = npt.NDArray[np.uint64]
MOST_REGIONS = 1 << 24
SEED_BYTES = 16
KEY_BYTES = 16  # of a plain key: base and rkey


class Column(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Integers: ``low`` plus ``width`` bytes each, little endian, one after the other."""

    low: wire.U64
    width: Annotated[int, msgspec.Meta(ge=0, le=8)]
    data: bytes


class PlainKeys(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="plain"):
    """Keys of a NIC, each a base and an rkey."""

    bases: Column
    rkeys: Column | None  # None: each is the region's id


class OpaqueKeys(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="opaque"):
    """Keys of a NIC of any other form; empty where a region is not registered with it."""

    lengths: Column
    data: bytes


class Table(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="railwire-regions"):
    """All that peers need of ``count`` regions."""

    version: int
    incarnation: wire.Incarnation
    count: Annotated[int, msgspec.Meta(ge=0, le=MOST_REGIONS)]
    seed: Annotated[bytes, msgspec.Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]
    first: wire.U64
    ids: Column | None
    nbytes: Column
    keys: Annotated[tuple[PlainKeys | OpaqueKeys, ...], msgspec.Meta(min_length=1, max_length=64)]
    readable_only: bool


_decoder = msgspec.msgpack.Decoder(Table)


def siphash(seed: bytes, numbers: U64s) -> U64s:
    """SipHash-2-4 of each number as 8 little-endian bytes."""
    k0, k1 = (np.uint64(int.from_bytes(seed[i : i + 8], "little")) for i in (0, 8))
    shape = numbers.shape
    v0 = np.full(shape, k0 ^ np.uint64(0x736F6D6570736575))
    v1 = np.full(shape, k1 ^ np.uint64(0x646F72616E646F6D))
    v2 = np.full(shape, k0 ^ np.uint64(0x6C7967656E657261))
    v3 = np.full(shape, k1 ^ np.uint64(0x7465646279746573))

    def turn(value: U64s, bits: int) -> None:
        high = value >> np.uint64(64 - bits)
        value <<= np.uint64(bits)
        value |= high

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0 += v1
            turn(v1, 13)
            v1 ^= v0
            turn(v0, 32)
            v2 += v3
            turn(v3, 16)
            v3 ^= v2
            v0 += v3
            turn(v3, 21)
            v3 ^= v0
            v2 += v1
            turn(v1, 17)
            v1 ^= v2
            turn(v2, 32)

    for block in (numbers, np.full(shape, np.uint64(8 << 56))):
        v3 ^= block
        rounds(2)
        v0 ^= block
    v2 ^= np.uint64(0xFF)
    rounds(4)
    result: U64s = v0 ^ v1 ^ v2 ^ v3
    return result


def ids_of(seed: bytes, first: int, count: int) -> U64s:
    """The ids of regions ``first`` to ``first + count``."""
    return siphash(seed, np.arange(first, first + count, dtype=np.uint64))


def pack(values: U64s, least_width: int = 0) -> Column:
    if values.size == 0:
        return Column(0, 0, b"")
    low = int(values.min())
    above = values - np.uint64(low)
    width = max((int(above.max()).bit_length() + 7) // 8, least_width)
    data = above.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    return Column(low, width, data)


def unpack(column: Column, count: int) -> U64s:
    """Raises DescriptorError unless there are ``count``, none beyond 64 bits."""
    if len(column.data) != count * column.width or column.low >= 1 << 64:
        raise DescriptorError("region table whose columns do not have its length")
    full = np.zeros((count, 8), np.uint8)
    full[:, : column.width] = np.frombuffer(column.data, np.uint8).reshape(count, column.width)
    values: U64s = full.reshape(-1).view("<u8").astype(np.uint64)
    if count and int(values.max()) + column.low >= 1 << 64:
        raise DescriptorError("region table with a value beyond 64 bits")
    values += np.uint64(column.low)
    return values


def pack_keys(lengths: U64s, data: bytes, ids: U64s) -> PlainKeys | OpaqueKeys:
    """Of one NIC: the keys' lengths, and all of them one after the other."""
    if lengths.size and (lengths == KEY_BYTES).all():
        both = np.frombuffer(data, "<u8").reshape(-1, 2).astype(np.uint64)
        rkeys = None if (both[:, 1] == ids).all() else pack(both[:, 1])
        return PlainKeys(pack(both[:, 0], 1), rkeys)
    return OpaqueKeys(pack(lengths, 1), data)


class Decoded:
    """A table that has been checked: what :class:`railwire.regions.RemoteRegions` looks things up in."""

    def __init__(self, table: Table) -> None:
        count = table.count
        if table.version != wire.VERSION:
            raise DescriptorError(f"region table of version {table.version}; this Railwire speaks {wire.VERSION}")
        if table.first + count >= 1 << 64:
            raise DescriptorError("region table with a value beyond 64 bits")
        self.table = table
        self.ids = ids_of(table.seed, table.first, count) if table.ids is None else unpack(table.ids, count)
        self.nbytes = unpack(table.nbytes, count)
        self._keys: list[tuple[Any, ...]] = []
        for keys in table.keys:
            if isinstance(keys, PlainKeys):
                rkeys = self.ids if keys.rkeys is None else unpack(keys.rkeys, count)
                both = np.stack([unpack(keys.bases, count), rkeys], axis=1).astype("<u8")
                self._keys.append((both.tobytes(), None))
                continue
            lengths = unpack(keys.lengths, count)
            if count and int(lengths.max()) > 256:
                raise DescriptorError("region table with a key of more than 256 bytes")
            ends = np.cumsum(lengths)
            if len(keys.data) != (int(ends[-1]) if count else 0):
                raise DescriptorError("region table whose columns do not have its length")
            self._keys.append((keys.data, np.concatenate([np.zeros(1, np.uint64), ends])))

    def keys(self, index: int) -> tuple[bytes, ...]:
        """Of a region, by NIC."""
        found = []
        for data, places in self._keys:
            begin, end = (
                (index * KEY_BYTES, (index + 1) * KEY_BYTES) if places is None else map(int, places[index : index + 2])
            )
            found.append(data[begin:end])
        return tuple(found)


def decode(data: bytes) -> Decoded:
    """Raises DescriptorError if the bytes are no region table."""
    try:
        table = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise DescriptorError(f"these {len(data)} bytes are no region table: {error}") from error
    if table.count > len(data):  # keys take at least a byte each: few bytes cannot have us make much
        raise DescriptorError(f"region table of {table.count} regions in {len(data)} bytes")
    return Decoded(table)
