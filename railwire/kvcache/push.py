"""The push of one request: its source pages, how far each layer is, and the deliveries that follow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from railwire.errors import RailwireError
from railwire.kvcache.deadlines import Deadline, cancel
from railwire.kvcache.errors import PushAborted, PushCancelled, PushError
from railwire.kvcache.outcome import Outcome

if TYPE_CHECKING:
    from railwire.kvcache.delivery import Delivery
    from railwire.kvcache.sender import Sender
    from railwire.memory import MemoryRegion, RegionSlice
    from railwire.transfer import Transfer


@dataclass
class LayerTimes:
    """Monotonic seconds; 0 for what has not been."""

    ready: float = 0.0
    """The last time that the layer was said to be ready."""
    posted: float = 0.0
    landed: float = 0.0
    nbytes: int = 0


@dataclass
class Timeline:
    """When each layer was ready, when it was posted, when the last of it had landed."""

    opened: float = field(default_factory=time.monotonic)
    layers: dict[int, LayerTimes] = field(default_factory=dict)

    def ready(self, layer: int) -> None:
        self.layers.setdefault(layer, LayerTimes()).ready = time.monotonic()

    def posted(self, layer: int, nbytes: int) -> None:
        times = self.layers.setdefault(layer, LayerTimes())
        times.posted = time.monotonic()
        times.nbytes += nbytes

    def landed(self, layer: int, when: float) -> None:
        times = self.layers.setdefault(layer, LayerTimes())
        times.landed = max(times.landed, when)

    def hidden(self, until: float) -> float:
        """Share of the bytes, 0..1, of layers that had landed before ``until`` (such as the end of the prefill)."""
        total = sum(times.nbytes for times in self.layers.values())
        done = sum(times.nbytes for times in self.layers.values() if 0 < times.landed <= until)
        return done / total if total else 1.0


class Push:
    """Made by ``sender.open()``.

    Attributes:
        done: an awaitable Outcome. While it is pending, the source blocks are being read by NICs; when it has ended
            they may be reused. Fails with PushAborted, PushCancelled or PushError if not every decoder got everything.
        timeline: times per layer.
    """

    def __init__(self, sender: Sender, request_id: str, num_tokens: int) -> None:
        self._sender = sender
        self.request_id = request_id
        self.num_tokens = num_tokens
        self.done: Outcome[None] = Outcome(f"the push of request {request_id}")
        self.timeline = Timeline()
        self.deliveries: list[Delivery] = []
        self.deadline: Deadline | None = None
        self._table: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._ready: dict[int, int] = {}
        self._tail: MemoryRegion | RegionSlice | None = None
        self.absent: set[int] = set()
        """Peers, ranks of decoders, that have said that they bring no ticket."""
        self._ended = 0
        self._expected = 0
        self._error: PushError | None = None
        self._layers = {storage.layer for storage in sender.layout.layers}

    @property
    def nbytes(self) -> int:
        """Bytes posted so far, to all decoders."""
        return sum(delivery.nbytes for delivery in self.deliveries)

    def append_blocks(self, block_ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Names the next blocks, by position, that the request's KV lies in. They must stay until :attr:`done`.

        Raises:
            ValueError: blocks that are not ours.
        """
        blocks = np.asarray(block_ids, dtype=np.int64)
        if blocks.ndim != 1:
            raise ValueError("block_ids must be a list of integers")
        if blocks.size and not (int(blocks.min()) >= 0 and int(blocks.max()) < self._sender.layout.num_blocks):
            raise ValueError(f"block ids must be 0..{self._sender.layout.num_blocks - 1}")
        with self._sender.lock:
            self._table = np.concatenate([self._table, blocks])

    def layer_ready(self, layer: int, end_token: int) -> None:
        """As ``sender.layer_ready(layer, [(self, end_token)])``."""
        with self._sender.lock:
            self._advance(layer, end_token)

    def check(self, layer: int, end_token: int) -> None:
        """Raises ValueError for what layer_ready() cannot be told."""
        if layer not in self._layers:
            raise ValueError(f"layer {layer} is none of this rank's")
        if not 0 <= end_token <= self.num_tokens:
            raise ValueError(f"end_token {end_token} of a request of {self.num_tokens} tokens")
        room = len(self._table) * self._sender.layout.block_tokens
        if end_token > room:
            raise ValueError(
                f"{end_token} tokens, but the blocks of only {room} have been named: append_blocks() first"
            )

    def tail(self, payload: MemoryRegion | RegionSlice) -> None:
        """Sends what else the decoder has asked for (last hidden state, logits), by one write. ``payload`` must stay
        as it is until :attr:`done`. Decoders that have not asked get nothing."""
        with self._sender.lock:
            self._tail = payload
            for delivery in list(self.deliveries):
                delivery.send_tail(payload)

    def abort(self, reason: str) -> None:
        """Stops; decoders get the negative completion once nothing more can land. Returns at once."""
        with self._sender.lock:
            if self.done.done():
                return
            if self._error is None:
                self._error = PushAborted(f"request {self.request_id}: {reason}", request_id=self.request_id)
            self._sender.remember_abort(self.request_id, reason)
            for delivery in list(self.deliveries):
                delivery.stop(reason)
            self._expected = len(self.deliveries)
            self._settle()

    def decline(self, reason: str) -> None:
        """A decoder wants it no more: ends with PushCancelled, unless tickets have come (they have ends of their
        own)."""
        with self._sender.lock:
            if self.done.done() or self.deliveries or self._error is not None:
                return
            self._error = PushCancelled(f"request {self.request_id}: {reason}", request_id=self.request_id)
            self._settle()

    def withdraw_blocks(self, timeout: float) -> bool:
        """Takes the blocks away, as an engine does that preempts the request: nothing more is posted from them, and
        what has been posted is waited for. What decoders have got they keep; after the next ``append_blocks()``, which
        begins at token 0 again, ``layer_ready()`` goes on from there.

        Args:
            timeout: seconds for what is under way. What takes longer is cancelled, and the push aborted; that ends
                within the engine's own bounds.

        Returns whether the push can go on. Either way no NIC reads the blocks when this returns.
        """
        with self._sender.lock:
            self._table = np.zeros(0, dtype=np.int64)
            self._ready.clear()
            if any(delivery.request.checksum and delivery.nbytes for delivery in self.deliveries):
                # Computed again, KV may differ in its last bits from what has been sent; the sums would not match.
                self.abort("its blocks were needed before it was done, and checksums were asked for")
            under_way = [transfer for delivery in self.deliveries for transfer in delivery.under_way]
        deadline = time.monotonic() + timeout
        try:
            for transfer in under_way:
                _ended(transfer, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self.abort("its blocks were needed, and the decoder took too long")
            for transfer in under_way:
                _ended(transfer, None)
        return self._error is None and not self.done.done()

    def __repr__(self) -> str:
        return f"<Push of request {self.request_id}, {len(self.deliveries)} tickets>"

    # ---- under the sender's lock -------------------------------------------------------------------------------------
    def _advance(self, layer: int, end_token: int) -> None:
        self.check(layer, end_token)
        if self.done.done() or self._error is not None:
            return
        self.timeline.ready(layer)
        self._ready[layer] = max(end_token, self._ready.get(layer, 0))
        for delivery in list(self.deliveries):
            delivery.advance(layer, self._ready[layer], self._table)

    def _attach(self, delivery: Delivery) -> None:
        """A ticket has come: it gets what is ready so far."""
        if self.done.done() or self._error is not None:
            delivery.stop(str(self._error or "the request has ended"))
            return
        cancel(self.deadline)
        delivery.accept()
        delivery.push = self
        self.deliveries.append(delivery)
        self._expected = max(self._expected, delivery.request.destinations)
        self.absent.discard(delivery.destination.peer.id)
        if self._to_come:
            seconds = self._sender.ticket_timeout
            self.deadline = self._sender.clock.after(seconds, lambda: self._incomplete(seconds))
        for layer, end_token in self._ready.items():
            delivery.advance(layer, end_token, self._table)
        if self._tail is not None:
            delivery.send_tail(self._tail)
        delivery.settle()

    @property
    def _to_come(self) -> bool:
        """Whether ranks of a decoder that has come are missing."""
        return len(self.deliveries) + len(self.absent) < self._expected

    def do_without(self, peer_id: int) -> None:
        """A rank of a decoder has declined: its ticket is not waited for."""
        if all(delivery.destination.peer.id != peer_id for delivery in self.deliveries):
            self.absent.add(peer_id)
            if self.deliveries and not self._to_come:
                cancel(self.deadline)
                self._settle()

    def _incomplete(self, seconds: float) -> None:
        if self._to_come:
            self.abort(f"{self._expected} tickets were announced, {len(self.deliveries)} came within {seconds:g} s")

    def _delivered(self, delivery: Delivery) -> None:
        self._ended += 1
        if delivery.state == "stopped" and self._error is None:
            kind = PushCancelled if delivery.by_receiver else PushError
            self._error = kind(f"request {self.request_id}: {delivery.reason}", request_id=self.request_id)
            # The other ranks of that decoder get no whole request any more: they will cancel, or are told.
        self._settle()

    def _settle(self) -> None:
        if self.done.done() or self._ended < len(self.deliveries):
            return
        if self._error is None and (not self.deliveries or self._to_come):
            return  # tickets are still to come
        cancel(self.deadline)
        self._sender.forget_push(self)
        if self._error is not None:
            self.done._fail(self._error)
        else:
            self.done._resolve(None)


def _ended(transfer: Transfer, timeout: float | None) -> None:
    """Waits until no NIC reads its source; how it ended is the delivery's affair."""
    try:
        transfer.wait(timeout)
    except RailwireError:
        pass
