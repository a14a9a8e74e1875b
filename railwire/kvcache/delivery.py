"""One ticket on the prefill side: its memory at both ends, and the transfers that are under way.

A shell around :mod:`railwire.kvcache.protocol.delivery`. Everything is called under the sender's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from railwire.errors import DescriptorError, RailwireError
from railwire.kvcache.deadlines import Deadline, cancel
from railwire.kvcache.driver import Driver
from railwire.kvcache.protocol import delivery as protocol
from railwire.kvcache.protocol import messages
from railwire.kvcache.slots import BASE
from railwire.memory import Pages, RemoteRegion

if TYPE_CHECKING:
    from railwire.kvcache.geometry.layout import RankLayout
    from railwire.kvcache.geometry.pages import Step
    from railwire.kvcache.geometry.plan import RankPlan
    from railwire.kvcache.side import Side
    from railwire.kvcache.timeline import Timeline
    from railwire.memory import MemoryRegion, RegionSlice
    from railwire.peer import Peer
    from railwire.transfer import Transfer

_MAX_INDICES = 8  # page lists kept for the next layers: shapes of layers, times chunks on their way through them
_Indices = npt.NDArray[np.int64]


class Destination(NamedTuple):
    """A decode rank that has shaken hands."""

    peer: Peer
    layout: RankLayout
    regions: tuple[RemoteRegion, ...]
    """Bound to ``peer``: the right to write them ends with this connection."""
    plan: RankPlan


class Source(NamedTuple):
    """The request that a ticket is attached to: what its pages are read from, and where its events go."""

    feed: Callable[[protocol.Event], None]
    state: Callable[[], protocol.DeliveryState]
    table: Callable[[], _Indices]
    """Source blocks by position: the same array until blocks are named or taken away."""
    tail: Callable[[], MemoryRegion | RegionSlice | None]
    timeline: Timeline


class Delivery:
    """Made of a request message.

    Args:
        forget: called once, when nothing of it is under way any more.

    Raises:
        DescriptorError: a request that cannot be.
    """

    def __init__(
        self, side: Side, destination: Destination, request: messages.Request, forget: Callable[[Delivery], None]
    ) -> None:
        layout, plan = destination.layout, destination.plan
        first_block, needed = _check(side, destination, request)
        self.tail_region = RemoteRegion.from_bytes(request.tail) if request.tail else None
        if self.tail_region is not None:
            if self.tail_region.incarnation != destination.peer.incarnation:
                raise DescriptorError("tail memory of another engine")
            self.tail_region = self.tail_region.over(destination.peer)
        self.key = (destination.peer.id, request.ticket)
        self.destination = destination
        self.request = request
        self.source: Source | None = None
        """None until its request is open here."""
        self.deadline: Deadline | None = None
        """Of what it waits for before that."""
        self.under_way: set[Transfer] = set()
        """Posted and not ended: NICs may still read their source."""
        self._side = side
        self._forget = forget
        self._received: list[bytes] = []
        self._missing = needed
        self._table: _Indices = np.zeros(first_block, dtype=np.int64)
        self._num_blocks = layout.num_blocks
        self._indices: dict[tuple[int, ...], tuple[_Indices, _Indices]] = {}
        self._indices_of: _Indices | None = None
        taken = protocol.taken(
            destination.peer.id, request.destinations, request.first_token, request.num_tokens, plan.unit_tokens,
            frozenset(plan.steps), tail=self.tail_region is not None, checksum=request.checksum,
        )  # fmt: skip
        self._waiting: Driver[protocol.DeliveryState, protocol.Event, protocol.Action] = Driver(
            taken, lambda state, event: protocol.step(state, event, {}, False), self.perform
        )
        self.add_blocks(request.blocks)

    @property
    def status(self) -> protocol.DeliveryState:
        """Of its machine."""
        return self._waiting.state if self.source is None else self.source.state()

    @property
    def state(self) -> str:
        """``waiting``, ``open``, ``stopping``, ``stopped`` or ``sent``."""
        return self.status.phase

    @property
    def reason(self) -> str:
        """Why it was stopped."""
        return self.status.reason

    @property
    def complete(self) -> bool:
        """Whether all destination blocks have been named."""
        return self._missing == 0

    def add_blocks(self, data: bytes) -> bool:
        """Returns whether the list is complete now, and was not before."""
        blocks = np.frombuffer(data, dtype="<u4") if len(data) % 4 == 0 else np.zeros(0, dtype="<u4")
        if len(data) % 4 or len(blocks) > self._missing:
            raise DescriptorError("more destination blocks than announced")
        if len(blocks) and int(blocks.max()) >= self._num_blocks:
            raise DescriptorError(f"destination block {int(blocks.max())} of {self._num_blocks}")
        if not len(blocks):
            return False  # no progress, and nothing to keep
        before = self._missing
        self._received.append(data)
        self._missing -= len(blocks)
        if self._missing == 0:
            tail = np.frombuffer(b"".join(self._received), dtype="<u4").astype(np.int64)
            self._table = np.concatenate([self._table, tail])
            self._received = []
        return before > 0 and self._missing == 0

    def feed(self, event: protocol.Event) -> None:
        """Something has happened."""
        if self.source is None:
            self._waiting.feed(event)
        else:
            self.source.feed(event)

    def perform(self, action: protocol.Action) -> None:
        """Carries out what its machine wants."""
        match action:
            case protocol.Post():
                self._post(action)
            case protocol.SendTail():
                self._send_tail()
            case protocol.SendSums():
                self._send_sums()
            case protocol.CancelTransfers():
                for transfer in list(self.under_way):
                    transfer.cancel()
            case protocol.ClearTimer():
                cancel(self.deadline)
            case protocol.Accept():
                self._say(messages.Accepted(self.request.ticket))
            case protocol.Tell():
                self._say(messages.Ended(self.request.ticket, action.reason[: messages.MAX_REASON]))
            case protocol.Forget():
                self._forget(self)

    def _say(self, message: messages.Message) -> None:
        self._side.channel.send(self.destination.peer, message)

    # ---- posting -----------------------------------------------------------------------------------------------------
    def _post(self, post: protocol.Post) -> None:
        def write(started: list[Transfer]) -> None:
            for step in self.destination.plan.steps[post.layer]:
                src, dst = step.src, step.dst
                take, put = self._page_indices(step, post.begin, post.end)
                transfer = self._side.engine.write_pages(
                    self._side.regions[step.src_region],
                    Pages(take, src.unit_stride, src.offset, src.runs),
                    self.destination.regions[step.dst_region],
                    Pages(put, dst.unit_stride, dst.offset, dst.runs),
                    step.unit_bytes,
                    imm=self.request.imm,
                )
                started.append(transfer)

        self._start(write, post.layer)

    def _send_tail(self) -> None:
        def write(started: list[Transfer]) -> None:
            payload, room = self._source.tail(), self.tail_region
            assert payload is not None and room is not None
            if payload.nbytes != room.nbytes:
                raise RailwireError(f"the tail has {payload.nbytes} bytes, the decoder has room for {room.nbytes}")
            started.append(self._side.engine.write(payload, room, imm=self.request.imm))

        self._start(write, None)

    def _start(self, write: Callable[[list[Transfer]], None], layer: int | None) -> None:
        """Posts, and says what has been posted, also where the rest failed."""
        started: list[Transfer] = []
        error = ""
        try:
            write(started)
        except RailwireError as failure:
            error = str(failure)
        except BaseException as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            nbytes = sum(transfer.nbytes for transfer in started)
            self.under_way.update(started)
            if layer is not None and started:
                self._source.timeline.posted(layer, nbytes)
            self.feed(protocol.Posted(len(started), nbytes, error))
            for transfer in started:
                transfer.add_done_callback(lambda done: self._on_transfer(done, layer))

    def _on_transfer(self, transfer: Transfer, layer: int | None) -> None:
        with self._side.lock:
            self.under_way.discard(transfer)
            error = transfer.exception()
            if error is None and layer is not None:
                self._source.timeline.landed(layer, time.monotonic())
            self.feed(protocol.TransferEnded("" if error is None else str(error) or type(error).__name__))

    def _page_indices(self, step: Step, begin: int, end: int) -> tuple[_Indices, _Indices]:
        """Of both sides. Layers of one shape have the same, so that only the first of them computes."""
        table = self._source.table()
        if table is not self._indices_of:  # blocks have been named, or taken away
            self._indices_of = table
            self._indices.clear()
        key = (step.src.block_step, step.src.sub_step, step.dst.block_step, step.dst.sub_step, begin, end)
        known = self._indices.get(key)
        if known is None:
            plan = self.destination.plan
            known = (plan.src_indices(step, table, begin, end), plan.dst_indices(step, self._table, begin, end))
            if len(self._indices) >= _MAX_INDICES:
                self._indices.clear()
            self._indices[key] = known
        return known

    def _send_sums(self) -> None:
        from railwire.kvcache.geometry.checksum import source_sums

        request, error = self.request, ""
        try:
            regions: Sequence[Any] = [region.array for region in self._side.regions]
            sums = source_sums(
                regions, self._side.layout, self.destination.plan, self._source.table(), request.first_token,
                request.num_tokens,
            ).astype("<u8")  # fmt: skip
            for begin in range(0, len(sums), messages.SUMS_PER_MESSAGE):
                part = sums[begin : begin + messages.SUMS_PER_MESSAGE]
                self._say(messages.Sums(request.ticket, begin, part.tobytes()))
        except ValueError as failure:  # such as memory that the host cannot read
            error = f"cannot compute checksums: {failure}"
        except BaseException as failure:
            error = f"cannot compute checksums: {failure!r}"
            raise
        finally:
            self.feed(protocol.Posted(error=error))

    @property
    def _source(self) -> Source:
        assert self.source is not None
        return self.source


def _check(side: Side, destination: Destination, request: messages.Request) -> tuple[int, int]:
    """Its first destination block by position, and how many there are. Raises DescriptorError for what cannot be."""
    layout, unit = destination.layout, destination.plan.unit_tokens
    first_block = request.first_token // layout.block_tokens
    needed = -(-request.num_tokens // layout.block_tokens) - first_block
    if not (0 <= request.first_token <= request.num_tokens and request.num_tokens >= 1):
        raise DescriptorError(f"tokens {request.first_token}..{request.num_tokens} are no range")
    capacity = side.layout.num_blocks * side.layout.block_tokens
    if request.num_tokens > capacity:  # also what bounds the memory that a ticket takes here
        raise DescriptorError(f"{request.num_tokens} tokens, where the prefiller has room for the KV of {capacity}")
    if request.first_token % unit:
        raise DescriptorError(f"first token {request.first_token} is no multiple of {unit}")
    if request.first_block != first_block or request.num_blocks != needed:
        raise DescriptorError("a block list that does not fit the tokens")
    if not BASE <= request.imm < 1 << 22:
        raise DescriptorError(f"immediate {request.imm} is none of a ticket")
    if request.destinations < 1:
        raise DescriptorError(f"{request.destinations} destinations")
    return first_block, needed
