"""Prepared scatters: settled once, posted again and again, by a call or by a word that moves; and words that follow
arrivals, for whoever waits without a call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from railwire import _native, cuda
from railwire.counter import check_imm
from railwire.dispatcher import dispatcher
from railwire.errors import ClosedError, DescriptorError
from railwire.memory import MemoryRegion, RegionSlice, RemoteRegion, ScatterTarget
from railwire.owner import Owner
from railwire.peer import Peer
from railwire.transfer import Transfer
from railwire.words import words_at

log = logging.getLogger("railwire")

SOURCE, DESTINATION, LENGTH, IMMEDIATE = range(4)
NO_IMMEDIATE = 2**64 - 1
MOST_ROWS = 1 << 20


class Scattering(Owner, Protocol):
    """An engine, seen by what scatters."""

    def _check_local(self, region: MemoryRegion) -> None:
        """Raises ValueError for a region of another engine, ClosedError for a closed one."""

    def _keep_trigger(self, trigger: Trigger) -> None:
        """It is told when its operations have ended."""

    def _forget_word(self, watcher_id: int) -> None:
        """It is told no more."""


class Members(Protocol):
    """A peer group, seen by what scatters to it."""

    _engine: Scattering
    peers: tuple[Peer, ...]

    def _member(self, target: RemoteRegion | Peer) -> int:
        """Which of the peers that is, or to whom the memory belongs."""


class Prepared:
    """A scatter that is posted again and again. Made by ``group.prepare_scatter()``.

    :attr:`table` says what a post does. It is plain memory: fill it from Python, from another thread, or from a kernel.
    """

    def __init__(
        self,
        group: Members,
        src: MemoryRegion | RegionSlice,
        targets: Sequence[ScatterTarget | Peer],
        imm: int | None,
        depth: int,
    ) -> None:
        engine = group._engine
        engine._check_local(src.region)
        if depth < 1 or depth * max(len(targets), 1) > MOST_ROWS:
            raise ValueError(f"a table has 1 to {MOST_ROWS} rows, not {depth} times {len(targets)}")
        if imm is not None:
            check_imm(imm)
        windows: list[Any] = []
        rows = np.zeros((len(targets), 4), np.uint64)
        rows[:, IMMEDIATE] = NO_IMMEDIATE if imm is None else imm
        for i, target in enumerate(targets):
            peer = group.peers[group._member(target if isinstance(target, Peer) else target.dst)]
            if isinstance(target, Peer):
                windows.append((peer._native, None, 0, 0))
                continue
            dst = target.dst
            if not 0 <= target.src_offset <= src.nbytes:
                raise IndexError(f"source offset {target.src_offset} of target {i} lies outside {src.nbytes} bytes")
            windows.append((peer._native, dst.keys, dst.start, dst.nbytes))
            rows[i, SOURCE] = target.src_offset
            rows[i, LENGTH] = min(dst.nbytes, src.nbytes - target.src_offset)
        self._engine = engine
        try:
            self._native: _native.PreparedScatter = _native.prepare_scatter(
                engine._native, src.region._native, src.start, src.nbytes, windows, depth
            )
        except _native.BadKeysError as error:
            raise DescriptorError(str(error)) from error
        except _native.NativeError as error:
            raise ClosedError(str(error)) from error
        self._post = self._native.post
        words = words_at(self._native.table, depth * len(targets) * 4, self._native)
        self.table: npt.NDArray[np.uint64] = words.reshape(depth, len(targets), 4)
        """What a post does: uint64, ``[slot, target, column]``, with the columns source offset, destination offset,
        length (bytes, within the source and within the target) and immediate (``2**64 - 1``: none). A target with no
        bytes and no immediate gets nothing; one with an immediate and no bytes gets the arrival alone. All slots begin
        with what ``scatter()`` would do: whole targets. It begins a page of memory, and has its pages to itself."""
        self.table[:] = rows

    def __len__(self) -> int:
        """Targets."""
        return int(self.table.shape[1])

    def post(self, slot: int = 0, *, after: Any = None) -> Transfer:
        """Posts what ``table[slot]`` says now; it may be changed as soon as this returns.

        As for ``scatter()``: if some targets fail, the others still complete.

        Args:
            after: see ``engine.write()``.

        Raises:
            IndexError: no such slot, or a row that leaves its source or target, or has no immediate. Nothing moves.
            ClosedError: the engine or the source is closed.
        """
        try:
            if after is None:
                return Transfer(self._engine, self._post(slot))
            return Transfer(self._engine, self._post(slot, cuda.mark(after, self._engine.device)))
        except _native.NativeError as error:
            self._engine._check_open()
            raise ClosedError(str(error)) from error

    def __call__(
        self,
        lengths: Any,
        src_offsets: Any = None,
        dst_offsets: Any = None,
        imms: Any = None,
        *,
        slot: int = 0,
        after: Any = None,
    ) -> Transfer:
        """Fills ``table[slot]`` and posts it. Each argument: an array with a value per target, or one for all; None
        leaves the column as it is. Raises as :meth:`post` does; the table is then filled all the same.
        """
        rows = self.table[slot]
        rows[:, LENGTH] = lengths
        if src_offsets is not None:
            rows[:, SOURCE] = src_offsets
        if dst_offsets is not None:
            rows[:, DESTINATION] = dst_offsets
        if imms is not None:
            rows[:, IMMEDIATE] = imms
        return self.post(slot, after=after)

    def on_word(self, on_end: Callable[[int, Transfer], object] | None = None) -> Trigger:
        """A 64-bit word: whenever it grows by one the engine posts this scatter by itself, without any Python.

        Operation ``n`` is posted when the word reaches ``n``, from ``table[(n - 1) % depth]``. So fill that slot, then
        store ``n`` (release). Fill a slot again when :attr:`Trigger.posted` has reached the operation that used it.

        Args:
            on_end: ``on_end(n, transfer)`` runs on the dispatcher for each operation that has ended, done or not.
                None: failures are logged.

        An operation whose row is wrong fails as a whole with reason ``rejected``, moves nothing, and fails the counters
        of all whose row has an immediate. So does one whose source region is closed.
        """
        self._engine._check_open()
        try:
            native = self._engine._native.watch(self._native, on_end is not None)
        except _native.NativeError as error:
            raise ClosedError(str(error)) from error
        trigger = Trigger(self._engine, native, on_end)
        self._engine._keep_trigger(trigger)
        return trigger

    def __repr__(self) -> str:
        return f"<Prepared {len(self)} targets, {self.table.shape[0]} slots>"


class Trigger:
    """A word that posts a prepared scatter. Made by :meth:`Prepared.on_word`."""

    def __init__(
        self, engine: Scattering, native: _native.Watcher, on_end: Callable[[int, Transfer], object] | None
    ) -> None:
        self._engine = engine
        self._native = native
        self._on_end = on_end
        self.word: npt.NDArray[np.uint64] = words_at(native.address, 1, native)
        """The word, an array of one uint64. It has a page of memory to itself; only one thread or kernel writes it."""
        self.progress: npt.NDArray[np.uint64] = words_at(native.progress, 24, native)
        """24 words in a page of their own, which the engine writes: 0, 8 and 16 are :attr:`posted`, :attr:`ended` and
        :attr:`failed`. For whoever fills the table and has no Python."""

    @property
    def id(self) -> int:
        return self._native.id

    @property
    def address(self) -> int:
        """Of the word, in this process."""
        return self._native.address

    @property
    def posted(self) -> int:
        """The number of the last operation that was posted: its slot of the table may be filled again."""
        return int(self.progress[0])

    @property
    def ended(self) -> int:
        """All operations up to this number have ended: nobody reads their sources any more."""
        return int(self.progress[8])

    @property
    def failed(self) -> int:
        """How many have failed."""
        return int(self.progress[16])

    def close(self) -> None:
        """Nothing is posted after this returns. What is under way goes on, and is told of no more."""
        self._engine._forget_word(self.id)
        if not self._engine.closed:
            self._engine._native.unwatch(self._native)

    def _tell(self) -> None:
        for number, native in self._native.take_ended():
            transfer = Transfer(self._engine, native)
            if self._on_end is not None:
                dispatcher.call(self._on_end, number, transfer)
            else:
                log.error("railwire: operation %d of a watched word failed: %s", number, transfer.exception())


class ArrivalWords:
    """Words that follow counters, for a kernel that waits. Made by ``engine.arrival_words()``."""

    def __init__(self, engine: Owner, first: int, writers: Sequence[Peer]) -> None:
        if not writers:
            raise ValueError("arrival words need at least one writer")
        for number in (first, first + len(writers) - 1):
            check_imm(number)
        engine._check_open()
        self._engine = engine
        try:
            self._native: _native.ArrivalWords = _native.follow(engine._native, first, [peer.id for peer in writers])
        except _native.NativeError as error:
            engine._check_open()
            raise ValueError(f"counters {first} to {first + len(writers) - 1}: {error}") from error
        self.address: int = self._native.address
        """Of the first word, in this process."""
        self.words: npt.NDArray[np.int64] = words_at(self.address, len(writers), self._native).view(np.int64)
        """``words[i]``: arrivals of immediate ``first + i`` since its last reset; negative once ``writers[i]`` is lost
        or has reported a failed write. They have pages of memory to themselves."""

    def close(self) -> None:
        """The words stay as they are from now on. Idempotent."""
        if not self._engine.closed:
            _native.unfollow(self._engine._native, self._native)

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"<ArrivalWords of {len(self)} counters>"
