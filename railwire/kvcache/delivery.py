"""One ticket on the prefill side: what has been posted for it, what is still in the NIC's hands.

States: ``open`` -> ``sent`` (everything landed) or ``stopping`` -> ``stopped`` (nothing is under way, the receiver
has been told). All methods are called under the sender's lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from railwire.errors import DescriptorError, RailwireError
from railwire.kvcache import messages
from railwire.kvcache.deadlines import Deadline, cancel
from railwire.kvcache.slots import BASE
from railwire.memory import Pages, RemoteRegion

if TYPE_CHECKING:
    from railwire.kvcache.layout import RankLayout
    from railwire.kvcache.plan import RankPlan, Step
    from railwire.kvcache.push import Push
    from railwire.kvcache.sender import Sender
    from railwire.memory import MemoryRegion, RegionSlice
    from railwire.peer import Peer
    from railwire.transfer import Transfer

_MAX_INDICES = 8  # page lists kept for the next layers: shapes of layers, times chunks on their way through them


class Destination(NamedTuple):
    """A decode rank that has shaken hands."""

    peer: Peer
    layout: RankLayout
    regions: tuple[RemoteRegion, ...]
    """Bound to ``peer``: the right to write them ends with this connection."""
    plan: RankPlan


class Delivery:
    """Raises DescriptorError for a request that cannot be."""

    def __init__(self, sender: Sender, destination: Destination, request: messages.Request) -> None:
        layout, unit = destination.layout, destination.plan.unit_tokens
        first_block = request.first_token // layout.block_tokens
        needed = -(-request.num_tokens // layout.block_tokens) - first_block
        if not (0 <= request.first_token <= request.num_tokens and request.num_tokens >= 1):
            raise DescriptorError(f"tokens {request.first_token}..{request.num_tokens} are no range")
        capacity = sender.layout.num_blocks * sender.layout.block_tokens
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
        self.tail_region = RemoteRegion.from_bytes(request.tail) if request.tail else None
        if self.tail_region is not None:
            if self.tail_region.incarnation != destination.peer.incarnation:
                raise DescriptorError("tail memory of another engine")
            self.tail_region = self.tail_region.over(destination.peer)
        self.sender = sender
        self.destination = destination
        self.request = request
        self.push: Push | None = None
        self.deadline: Deadline | None = None
        self.state = "open"
        self.reason = ""
        self.nbytes = 0
        self._received: list[bytes] = []
        self._missing = needed
        self._table: npt.NDArray[np.int64] = np.zeros(first_block, dtype=np.int64)
        self._posted: dict[int, int] = {}
        self._indices: dict[tuple[int, ...], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        self._indices_of: npt.NDArray[np.int64] | None = None
        self._layers_left = set(destination.plan.steps) if request.first_token < request.num_tokens else set()
        self._tail_left = self.tail_region is not None
        self._accepted = False
        self.under_way: set[Transfer] = set()
        """Posted and not ended: NICs may still read their source."""
        self.add_blocks(request.blocks)

    @property
    def complete(self) -> bool:
        """Whether all destination blocks have been named."""
        return self._missing == 0

    def add_blocks(self, data: bytes) -> bool:
        """Returns whether the list is complete now, and was not before."""
        blocks = np.frombuffer(data, dtype="<u4") if len(data) % 4 == 0 else np.zeros(0, dtype="<u4")
        if len(data) % 4 or len(blocks) > self._missing:
            raise DescriptorError("more destination blocks than announced")
        if len(blocks) and int(blocks.max()) >= self.destination.layout.num_blocks:
            raise DescriptorError(f"destination block {int(blocks.max())} of {self.destination.layout.num_blocks}")
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

    def accept(self) -> None:
        """The request is here, queued or open: the receiver, told so once, need not wonder any more."""
        cancel(self.deadline)
        if not self._accepted:
            self._accepted = True
            self.sender.channel.send(self.destination.peer, messages.Accepted(self.request.ticket))

    # ---- posting -----------------------------------------------------------------------------------------------------
    def advance(self, layer: int, end_token: int, table: npt.NDArray[np.int64]) -> None:
        """Posts the pages of this layer up to ``end_token`` that have not been posted; whole units only, until the
        end."""
        if self.state != "open" or layer not in self._layers_left:
            return
        plan, request = self.destination.plan, self.request
        last = end_token >= request.num_tokens
        end = request.num_tokens if last else end_token // plan.unit_tokens * plan.unit_tokens
        begin = self._posted.get(layer, request.first_token)
        try:
            if end > begin:
                for step in plan.steps[layer]:
                    src, dst = step.src, step.dst
                    take, put = self._page_indices(step, table, begin, end)
                    self._keep(
                        self.sender.engine.write_pages(
                            self.sender.regions[step.src_region],
                            Pages(take, src.unit_stride, src.offset, src.runs),
                            self.destination.regions[step.dst_region],
                            Pages(put, dst.unit_stride, dst.offset, dst.runs),
                            step.unit_bytes,
                            imm=request.imm,
                        ),
                        layer,
                    )
                self._posted[layer] = end
        except RailwireError as error:
            self.stop(str(error))
            return
        if last:
            self._layers_left.discard(layer)
            if not self._layers_left and request.checksum:
                try:
                    self._send_sums(table)
                except ValueError as error:  # such as memory that the host cannot read
                    self.stop(f"cannot compute checksums: {error}")
                    return
            self.settle()

    def _page_indices(
        self, step: Step, table: npt.NDArray[np.int64], begin: int, end: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of both sides. Layers of one shape have the same, so that only the first of them computes."""
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

    def send_tail(self, payload: MemoryRegion | RegionSlice) -> None:
        if self.state != "open" or not self._tail_left or self.tail_region is None:
            return
        if payload.nbytes != self.tail_region.nbytes:
            self.stop(f"the tail has {payload.nbytes} bytes, the decoder has room for {self.tail_region.nbytes}")
            return
        try:
            self._keep(self.sender.engine.write(payload, self.tail_region, imm=self.request.imm), None)
        except RailwireError as error:
            self.stop(str(error))
            return
        self._tail_left = False
        self.settle()

    def _keep(self, transfer: Transfer, layer: int | None) -> None:
        self.under_way.add(transfer)
        self.nbytes += transfer.nbytes
        if self.push is not None and layer is not None:
            self.push.timeline.posted(layer, transfer.nbytes)
        transfer.add_done_callback(lambda done: self._on_transfer(done, layer))

    def _on_transfer(self, transfer: Transfer, layer: int | None) -> None:
        with self.sender.lock:
            self.under_way.discard(transfer)
            error = transfer.exception()
            if error is None and self.push is not None and layer is not None:
                self.push.timeline.landed(layer, time.monotonic())
            if error is not None and self.state == "open":
                self.stop(str(error))
            else:
                self.settle()

    def _send_sums(self, table: npt.NDArray[np.int64]) -> None:
        from railwire.kvcache.checksum import source_sums

        request = self.request
        regions: Sequence[Any] = [region.array for region in self.sender.regions]
        sums = source_sums(
            regions, self.sender.layout, self.destination.plan, table, request.first_token, request.num_tokens
        ).astype("<u8")
        for begin in range(0, len(sums), messages.SUMS_PER_MESSAGE):
            part = sums[begin : begin + messages.SUMS_PER_MESSAGE]
            message = messages.Sums(request.ticket, begin, part.tobytes())
            self.sender.channel.send(self.destination.peer, message)

    # ---- the end -----------------------------------------------------------------------------------------------------
    def stop(self, reason: str, by_receiver: bool = False) -> None:
        """No more is posted; what is under way is cancelled and drained; then the receiver is told."""
        if self.state != "open":
            return
        self.state = "stopping"
        self.reason = reason
        self.by_receiver = by_receiver
        cancel(self.deadline)
        for transfer in list(self.under_way):
            transfer.cancel()
        self.settle()

    def settle(self) -> None:
        """Ends it if nothing is left to do."""
        if self.under_way:
            return
        if self.state == "stopping":
            self.state = "stopped"
            # True of transfers that may still land, too: those end so only when this connection is lost, and then
            # nothing is sent over it any more.
            ended = messages.Ended(self.request.ticket, self.reason[: messages.MAX_REASON])
            self.sender.channel.send(self.destination.peer, ended)
        elif self.state == "open" and self.push is not None and not self._layers_left and not self._tail_left:
            self.state = "sent"
        else:
            return
        self.sender.forget_delivery(self)
        if self.push is not None:
            self.push._delivered(self)

    by_receiver = False
