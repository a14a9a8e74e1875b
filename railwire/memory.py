"""Registered memory, descriptors of the peers' memory, and page lists."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from railwire import _native, cuda, wire
from railwire.allocation import SharedBuffer
from railwire.buffers import Buffer
from railwire.dispatcher import dispatcher
from railwire.errors import ClosedError
from railwire.owner import Owner
from railwire.peer import Peer
from railwire.transfer import Fence


def resolve_slice(key: object, nbytes: int) -> tuple[int, int]:
    """(start, length) of ``[a:b]`` in something of ``nbytes`` bytes. Unlike Python's own, it never clips.

    Raises:
        TypeError: not a slice with step 1.
        IndexError: out of range.
    """
    if not isinstance(key, slice) or key.step not in (None, 1):
        raise TypeError("regions are sliced as region[a:b], in bytes")
    start = 0 if key.start is None else int(key.start)
    stop = nbytes if key.stop is None else int(key.stop)
    if start < 0:
        start += nbytes
    if stop < 0:
        stop += nbytes
    if not 0 <= start <= stop <= nbytes:
        raise IndexError(f"[{key.start}:{key.stop}] lies outside a region of {nbytes} bytes")
    return start, stop - start


class RegionSlice:
    """Some bytes of a local region: what a transfer reads from, or a read fills."""

    __slots__ = ("region", "start", "nbytes")

    def __init__(self, region: MemoryRegion, start: int, nbytes: int) -> None:
        self.region = region
        self.start = start
        self.nbytes = nbytes

    def __getitem__(self, key: slice) -> RegionSlice:
        start, nbytes = resolve_slice(key, self.nbytes)
        return RegionSlice(self.region, self.start + start, nbytes)

    @property
    def descriptor(self) -> RemoteRegion:
        """What a peer needs to write to, or read from, just these bytes."""
        return self.region.descriptor[self.start : self.start + self.nbytes]


_fences_lock = threading.Lock()  # of all regions' lists of them


class MemoryRegion:
    """Memory registered with all NICs of an engine; keeps its owner alive. Made by ``register()``/``allocate()``.

    ``region[a:b]`` is a slice in bytes. Dropping the last reference deregisters it once no transfer uses it;
    peers that still write then get an error. Use :meth:`revoke` or :meth:`close` to be sure that nobody does.
    """

    def __init__(self, engine: Owner, native: _native.Region, buffer: Buffer) -> None:
        self._engine = engine
        self._native = native
        self._buffer = buffer
        self._closed = False
        # What was given out last, and how many revokes had begun before: it is good as long as there are no more.
        self._described: tuple[int, RemoteRegion] | None = None
        self._revokes = 0
        self._fences: list[Fence] = []  # of those that may not have ended

    @property
    def address(self) -> int:
        return self._native.address

    @property
    def nbytes(self) -> int:
        return self._native.length

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The memory as uint8 (host memory that came as an array or tensor; ``ValueError`` otherwise)."""
        if self._buffer.array is None:
            raise ValueError("this region was registered by address, or is not in host memory: use what you registered")
        return self._buffer.array

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        return "cpu" if self._buffer.device < 0 else f"cuda:{self._buffer.device}"

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """GPU memory as an array of bytes, for torch and CuPy; ``AttributeError`` for host memory."""
        if self._buffer.device < 0:
            raise AttributeError("this region is in host memory: use region.array")
        data = (self.address, self.readable_only)
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": data, "version": 3, "strides": None}

    @property
    def readable_only(self) -> bool:
        """A source: peers may read it, and neither they nor ``read()`` write to it."""
        return self._buffer.readable_only

    @property
    def start(self) -> int:
        return 0

    @property
    def region(self) -> MemoryRegion:
        return self

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, key: slice) -> RegionSlice:
        start, nbytes = resolve_slice(key, self.nbytes)
        return RegionSlice(self, start, nbytes)

    @property
    def descriptor(self) -> RemoteRegion:
        """What peers need to write here. Changes with the end of each :meth:`revoke`. ``ClosedError`` once closed."""
        self.check_open()
        described = self._described
        if described is not None and described[0] == self._revokes:
            return described[1]
        self._engine._check_process()
        with _fences_lock:
            revokes = self._revokes
            self._fences = [fence for fence in self._fences if not fence.done()]
            lasts = not self._fences  # what a revoke will change at any moment is not kept
        region_id, keys = self._engine._native.region_keys(self._native)
        descriptor = RemoteRegion(
            wire.Descriptor(
                wire.VERSION,
                self._engine.incarnation,
                region_id,
                self.nbytes,
                0,
                self.nbytes,
                tuple(keys),
                self.readable_only,
            )
        )
        if lasts:
            self._described = revokes, descriptor
        return descriptor

    def check_open(self) -> None:
        """Raises ClosedError unless the region can be used."""
        if self._closed or self._native.closed:
            raise ClosedError("the region is closed")

    def revoke(self, timeout: float | None = None) -> None:
        """Withdraws all descriptors given out; returns only when no peer can write to this memory any more.

        The pages may then be reused, and :attr:`descriptor` is a new one. Peers that do not confirm within
        ``timeout`` seconds (default: the liveness time) are cut off.

        Raises:
            FenceError: such a peer writes by itself (shm) and its process may still run; the region is then closed.
            RuntimeError: in a callback; use :meth:`revoke_async` there.
        """
        dispatcher.check_elsewhere("region.revoke()")
        self.revoke_async(timeout).wait()

    def revoke_async(self, timeout: float | None = None) -> Fence:
        """As :meth:`revoke`, to be awaited."""
        self._engine._check_process()
        self.check_open()
        seconds = self._engine.liveness if timeout is None else timeout
        fence = Fence(self._engine, _native.revoke(self._engine._native, self._native, True, seconds))
        with _fences_lock:
            self._fences = [before for before in self._fences if not before.done()] + [fence]
            self._revokes += 1
        return fence

    def close(self, timeout: float | None = None) -> None:
        """Fences the region as :meth:`revoke` does, and deregisters it. Called again, it returns at once if that has
        been done, and raises as long as it cannot be: after it has returned, nobody writes.

        Raises:
            FenceError: see :meth:`revoke`.
            RuntimeError: in a callback; use :meth:`close_async` there.
        """
        self._engine._check_process()
        dispatcher.check_elsewhere("region.close()")
        if not self._engine.closed:
            self.close_async(timeout).wait()
        self._closed = True

    def close_async(self, timeout: float | None = None) -> Fence:
        """As :meth:`close`, to be awaited. ClosedError if the engine is closed, and with it all its regions."""
        self._engine._check_open()  # a closed engine has closed its regions
        self._closed = True
        seconds = self._engine.liveness if timeout is None else timeout
        return Fence(self._engine, _native.revoke(self._engine._native, self._native, False, seconds))

    def __enter__(self) -> MemoryRegion:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.nbytes} bytes at {self.address:#x}{' closed' if self._closed else ''}>"


class RemoteRegion:
    """A peer's region, or a slice of one: ``bytes()`` on one side, :meth:`from_bytes` on the other."""

    __slots__ = ("_message", "_keys", "_peer")

    def __init__(
        self, message: wire.Descriptor, keys: _native.RemoteKeys | None = None, peer: Peer | None = None
    ) -> None:
        self._message = message
        self._keys = keys
        self._peer = peer

    @classmethod
    def from_bytes(cls, data: bytes) -> RemoteRegion:
        """Raises DescriptorError if the bytes are no descriptor."""
        return cls(wire.decode_descriptor(bytes(data)))

    def __bytes__(self) -> bytes:
        return wire.encode(self._message)

    def over(self, peer: Peer) -> RemoteRegion:
        """The same memory, reached over this connection and no other: once the peer is lost or closed, using it raises
        PeerLostError, even if the two engines have connected anew. For a right to write that ends with the
        connection, because the owner takes a fence of that connection (``peer.close()``) for the end of it. A
        descriptor without this uses the newest connection to its owner.

        Raises:
            ValueError: memory of another engine than this peer.
        """
        if peer.incarnation != self.incarnation:
            raise ValueError(f"{self!r} is memory of another engine than {peer!r}")
        return RemoteRegion(self._message, self._keys, peer)

    @property
    def peer(self) -> Peer | None:
        """The connection that :meth:`over` has bound it to."""
        return self._peer

    @property
    def nbytes(self) -> int:
        return self._message.nbytes

    @property
    def start(self) -> int:
        """Where the slice begins in its region, in bytes."""
        return self._message.start

    @property
    def readable_only(self) -> bool:
        """Its owner lets it be read, not written."""
        return self._message.readable_only

    @property
    def incarnation(self) -> bytes:
        """Of the engine that owns the memory."""
        return self._message.incarnation

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, key: slice) -> RemoteRegion:
        start, nbytes = resolve_slice(key, self.nbytes)
        m = self._message
        return RemoteRegion(
            msgspec.structs.replace(m, start=m.start + start, nbytes=nbytes),
            self.keys,
            self._peer,
        )

    @property
    def keys(self) -> _native.RemoteKeys:
        """The native form, made once."""
        if self._keys is None:
            m = self._message
            self._keys = _native.RemoteKeys(m.region, m.region_nbytes, list(m.keys), not m.readable_only)
        return self._keys

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteRegion) and self._message == other._message

    def __hash__(self) -> int:
        return hash((self._message.region, self._message.start, self._message.nbytes))

    def __repr__(self) -> str:
        return f"<RemoteRegion {self.nbytes} bytes of engine {self.incarnation.hex()[:8]}>"


class Pages:
    """A page list: page ``i`` begins at ``offset + indices[i] * stride`` bytes of the region.

    Args:
        indices: integers, a 1-D numpy or torch (CPU) array, or any sequence of ints.
        stride: bytes from one page index to the next.
        offset: bytes before page 0.
        runs: ``(count, run_stride)`` where the slice of a page is not contiguous: it then consists of ``count`` runs
            of ``page_bytes // count`` bytes, run ``r`` beginning ``r * run_stride`` bytes after the page's begin.

    Raises:
        TypeError: indices that are no integers.
        ValueError: a negative stride, offset or run, or indices of more than one dimension.
    """

    __slots__ = ("indices", "stride", "offset", "runs")

    def __init__(self, indices: Any, stride: int, offset: int = 0, runs: tuple[int, int] | None = None) -> None:
        if not isinstance(indices, np.ndarray):
            indices = indices.numpy() if hasattr(indices, "numpy") else np.asarray(indices)
        if indices.size == 0 and indices.dtype.kind == "f":
            indices = indices.astype(np.int64)  # what numpy makes of []
        if indices.dtype.kind not in "iu":
            raise TypeError(f"page indices must be integers, not {indices.dtype}")
        if indices.ndim != 1:
            raise ValueError(f"page indices must have one dimension, not {indices.ndim}")
        if indices.dtype.itemsize < 4 or not indices.dtype.isnative:
            indices = indices.astype(np.int64)
        run_count, run_stride = (1, 0) if runs is None else runs
        if stride < 0 or offset < 0 or run_count < 1 or run_stride < 0:
            raise ValueError("stride, offset and runs must not be negative")
        self.indices: npt.NDArray[Any] = indices
        self.stride = int(stride)
        self.offset = int(offset)
        self.runs = (int(run_count), int(run_stride))

    def __len__(self) -> int:
        return int(self.indices.shape[0])

    def layout(self, start: int) -> tuple[int, int, int, int]:
        """(offset, stride, runs, run stride) from the begin of a region whose slice starts at ``start``."""
        return (start + self.offset, self.stride, *self.runs)


class ScatterTarget:
    """One target of a scatter: bytes ``[src_offset, src_offset + dst.nbytes)`` of the source go to ``dst``."""

    __slots__ = ("src_offset", "dst")

    def __init__(self, src_offset: int, dst: RemoteRegion) -> None:
        self.src_offset = src_offset
        self.dst = dst


def register(engine: Owner, buffer: Any, readable_only: bool = False) -> MemoryRegion:
    """Implements ``engine.register``."""
    shared = buffer if isinstance(buffer, SharedBuffer) else None
    where = Buffer(buffer.array if isinstance(buffer, SharedBuffer) else buffer, readable_only)
    if where.nbytes == 0:
        raise ValueError("an empty buffer cannot be registered")
    dmabuf_fd, dmabuf_offset = -1, 0
    if where.device >= 0:
        dmabuf_fd, dmabuf_offset = cuda.export_dmabuf(where.address, where.nbytes, where.device)
    owner = dispatcher.keep(where.owner)
    try:
        native = engine._native.register(
            where.address,
            where.nbytes,
            dmabuf_fd,
            dmabuf_offset,
            where.device,
            not readable_only,
            owner,
            shared.fd if shared else -1,
        )
    except BaseException:
        dispatcher.drop(owner)
        raise
    finally:
        if dmabuf_fd >= 0:
            cuda.close_dmabuf(dmabuf_fd)
    return MemoryRegion(engine, native, where)


Source = MemoryRegion | RegionSlice
Targets = Sequence[ScatterTarget]
