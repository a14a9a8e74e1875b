"""What an engine does to the memory of its peers, and how they learn of it: writes, reads, immediates."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from railwire import _native, cuda
from railwire.counter import MAX_IMM, Counter, check_imm
from railwire.engine_core import EngineCore, SetUp
from railwire.errors import ClosedError, DescriptorError, RailwireError
from railwire.group import PeerGroup
from railwire.memory import Pages, RemoteRegion, ScatterTarget, Source
from railwire.peer import Peer
from railwire.prepared import ArrivalWords
from railwire.transfer import Transfer


class OneSided(EngineCore):
    """The part of ``TransferEngine`` that writes, reads and counts."""

    def __init__(self, setup: SetUp) -> None:
        self._next_imm = 1 + secrets.randbelow(MAX_IMM // 2)
        super().__init__(setup)

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
            src.region._native, src.start, peer._native, dst.keys, dst.start, src.nbytes, check_imm(imm),
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
            src.start + src.nbytes, dst.start + dst.nbytes, page_bytes, check_imm(imm),
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
        return self._transfer(_native.scatter, src.region._native, group._natives, native, check_imm(imm), gate)

    def barrier(self, group: PeerGroup, imm: int, *, after: Any = None) -> Transfer:
        """One arrival at counter ``imm`` of every peer of the group, and nothing else."""
        self._check_ours(group)
        return self._transfer(_native.barrier, group._natives, check_imm(imm), cuda.mark(after, self.device))

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
        return Counter(self, check_imm(imm))

    def arrival_words(self, first_imm: int, writers: Sequence[Peer]) -> ArrivalWords:
        """Words of memory that follow the counters of immediates ``first_imm``, ``first_imm + 1`` and so on, each of
        which one peer writes: for kernels that wait for arrivals. Nothing else should expect on these counters.

        Raises:
            ValueError: no writers, or a counter that is followed already. ClosedError: the engine is closed.
        """
        return ArrivalWords(self, first_imm, writers)

    def _transfer(self, function: Callable[..., _native.Operation], *args: Any) -> Transfer:
        self._check_open()
        try:
            return Transfer(self, function(self._native, *args))
        except _native.BadKeysError as error:
            raise DescriptorError(str(error)) from error
        except _native.NativeError as error:
            raise ClosedError(str(error)) from error
