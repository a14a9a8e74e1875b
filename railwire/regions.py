"""Many regions at once: registered in one call, described by one table."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from railwire import _native, region_table, wire
from railwire.buffers import Buffer
from railwire.dispatcher import dispatcher
from railwire.errors import ClosedError
from railwire.memory import MemoryRegion, RemoteRegion, register
from railwire.owner import Owner


class RemoteRegions(Sequence[RemoteRegion]):
    """A peer's regions, as its table tells of them: ``remotes[i]`` is a :class:`RemoteRegion`."""

    def __init__(self, data: bytes, decoded: region_table.Decoded) -> None:
        self._data = data
        self._decoded = decoded
        self._made: dict[int, RemoteRegion] = {}

    @classmethod
    def from_bytes(cls, data: bytes) -> RemoteRegions:
        """Raises DescriptorError if the bytes are no region table."""
        data = bytes(data)
        return cls(data, region_table.decode(data))

    def __bytes__(self) -> bytes:
        return self._data

    def __len__(self) -> int:
        return self._decoded.table.count

    @property
    def incarnation(self) -> bytes:
        """Of the engine that owns the memory."""
        return self._decoded.table.incarnation

    @overload
    def __getitem__(self, index: int) -> RemoteRegion: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RemoteRegion]: ...
    def __getitem__(self, index: int | slice) -> RemoteRegion | Sequence[RemoteRegion]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        made = self._made.get(number)
        if made is None:
            table, decoded = self._decoded.table, self._decoded
            nbytes = int(decoded.nbytes[number])
            made = self._made[number] = RemoteRegion(
                wire.Descriptor(
                    wire.VERSION,
                    table.incarnation,
                    int(decoded.ids[number]),
                    nbytes,
                    0,
                    nbytes,
                    decoded.keys(number),
                    table.readable_only,
                )
            )
        return made

    def __repr__(self) -> str:
        return f"<RemoteRegions {len(self)} of engine {self.incarnation.hex()[:8]}>"


class Regions(Sequence[MemoryRegion]):
    """Made by ``engine.register_many()``. ``regions[i]`` is a :class:`MemoryRegion`; dropping the last reference to
    all of them deregisters them."""

    def __init__(self, engine: Owner, buffers: Sequence[Any], readable_only: bool) -> None:
        self._engine = engine
        self._buffers = list(buffers)
        self._readable_only = readable_only
        self._seed = secrets.token_bytes(region_table.SEED_BYTES)
        self._made: dict[int, MemoryRegion] = {}
        count = len(self._buffers)
        if count > region_table.MOST_REGIONS:
            raise ValueError(f"at most {region_table.MOST_REGIONS} regions in one table, not {count}")
        addresses, lengths = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        for i in _native.plain_buffers(self._buffers, readable_only, addresses, lengths):
            buffer = Buffer(self._buffers[i], readable_only)  # says what is wrong with it, or knows its kind
            if buffer.device >= 0:
                self._made[i] = register(engine, self._buffers[i], readable_only)
            addresses[i], lengths[i] = buffer.address, buffer.nbytes
        if count and int(lengths.min()) == 0:
            raise ValueError(f"an empty buffer cannot be registered: number {int(lengths.argmin())}")
        owner = dispatcher.keep(self._buffers)
        try:
            self._native = _native.register_many(
                engine._native,
                addresses,
                lengths,
                region_table.ids_of(self._seed, 0, count),
                {i: region._native for i, region in self._made.items()},
                not readable_only,
                owner,
            )
        except BaseException:
            dispatcher.drop(owner)
            raise

    def __len__(self) -> int:
        return len(self._buffers)

    @overload
    def __getitem__(self, index: int) -> MemoryRegion: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MemoryRegion]: ...
    def __getitem__(self, index: int | slice) -> MemoryRegion | Sequence[MemoryRegion]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        made = self._made.get(number)
        if made is None:
            made = self._made[number] = MemoryRegion(
                self._engine, self._native.at(number), Buffer(self._buffers[number], self._readable_only)
            )
        return made

    def __iter__(self) -> Iterator[MemoryRegion]:
        return (self[i] for i in range(len(self)))

    @property
    def descriptor(self) -> RemoteRegions:
        """What peers need to write to all of them, or to read them: one table, as they are now. ``bytes()`` and
        ``RemoteRegions.from_bytes`` are the two ends of its way. ``ClosedError`` if one is closed."""
        self._engine._check_open()
        try:
            ids, nbytes, keys = self._native.table(self._engine._native)
        except _native.NativeError as error:
            raise ClosedError(str(error)) from error
        count = len(self)
        ids = np.frombuffer(ids, np.uint64)
        own = bool((ids == region_table.ids_of(self._seed, 0, count)).all())
        table = region_table.Table(
            wire.VERSION,
            self._engine.incarnation,
            count,
            self._seed,
            0,
            None if own else region_table.pack(ids),
            region_table.pack(np.frombuffer(nbytes, np.uint64)),
            tuple(region_table.pack_keys(np.frombuffer(lengths, np.uint64), data, ids) for lengths, data in keys),
            self._readable_only,
        )
        return RemoteRegions(wire.encode(table), region_table.Decoded(table))

    def close(self, timeout: float | None = None) -> None:
        """Closes all, as ``region.close()`` does: nobody writes to any when this returns.

        Raises:
            FenceError, RuntimeError: see ``region.close()``.
        """
        dispatcher.check_elsewhere("regions.close()")
        if self._engine.closed:
            return
        fences = [region.close_async(timeout) for region in self]
        for fence in fences:
            fence.wait()

    def __repr__(self) -> str:
        return f"<Regions {len(self)} of {self._engine.name}>"
