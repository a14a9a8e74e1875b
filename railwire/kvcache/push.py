"""The push of one request: its source pages, its tail, and the tickets that get them.

A shell around :mod:`railwire.kvcache.protocol.push`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from railwire.errors import RailwireError
from railwire.kvcache.deadlines import Deadline, cancel
from railwire.kvcache.delivery import Delivery, Source
from railwire.kvcache.driver import Driver
from railwire.kvcache.errors import PushAborted, PushCancelled, PushError
from railwire.kvcache.outcome import Outcome
from railwire.kvcache.protocol import push as protocol
from railwire.kvcache.protocol.delivery import Event as TicketEvent
from railwire.kvcache.protocol.delivery import Stop
from railwire.kvcache.protocol.push import Key
from railwire.kvcache.timeline import Timeline

if TYPE_CHECKING:
    from railwire.kvcache.side import Side
    from railwire.memory import MemoryRegion, RegionSlice
    from railwire.transfer import Transfer

_KINDS = {"failed": PushError, "cancelled": PushCancelled, "aborted": PushAborted}


class Push:
    """Made by ``sender.open()``.

    Attributes:
        done: an awaitable Outcome. While it is pending, the source blocks are being read by NICs; when it has ended
            they may be reused. Fails with PushAborted, PushCancelled or PushError if not every decoder got everything.
        timeline: times per layer.
    """

    def __init__(
        self,
        side: Side,
        request_id: str,
        num_tokens: int,
        *,
        ticket_timeout: float,
        absent: set[int],
        remember: Callable[[str, str], None],
        forget: Callable[[Push], None],
    ) -> None:
        self.request_id = request_id
        self.num_tokens = num_tokens
        self.done: Outcome[None] = Outcome(f"the push of request {request_id}")
        self.timeline = Timeline()
        self._side = side
        self._remember = remember
        self._forget = forget
        self._layers = {storage.layer for storage in side.layout.layers}
        self._table: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._tail: MemoryRegion | RegionSlice | None = None
        self._deliveries: dict[Key, Delivery] = {}
        self._deadline: Deadline | None = None
        state = protocol.PushState(request_id, num_tokens, ticket_timeout, frozenset(absent))
        self._driver: Driver[protocol.PushState, protocol.Event, protocol.Action] = Driver(
            state, protocol.step, self._perform
        )

    @property
    def status(self) -> protocol.PushState:
        """Of its machine."""
        return self._driver.state

    @property
    def deliveries(self) -> list[Delivery]:
        """The tickets that have come, those that are over included."""
        return [self._deliveries[key] for key in self.status.tickets]

    @property
    def nbytes(self) -> int:
        """Bytes posted so far, to all decoders."""
        return sum(ticket.nbytes for ticket in self.status.tickets.values())

    def append_blocks(self, block_ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Names the next blocks, by position, that the request's KV lies in. They must stay until :attr:`done`.

        Raises:
            ValueError: blocks that are not ours.
        """
        blocks = np.asarray(block_ids, dtype=np.int64)
        if blocks.ndim != 1:
            raise ValueError("block_ids must be a list of integers")
        if blocks.size and not (int(blocks.min()) >= 0 and int(blocks.max()) < self._side.layout.num_blocks):
            raise ValueError(f"block ids must be 0..{self._side.layout.num_blocks - 1}")
        with self._side.lock:
            self._table = np.concatenate([self._table, blocks])

    def layer_ready(self, layer: int, end_token: int) -> None:
        """As ``sender.layer_ready(layer, [(self, end_token)])``."""
        with self._side.lock:
            self.check(layer, end_token)
            if not self.status.over and self.status.failure is None:
                self.timeline.ready(layer)
                self._driver.feed(protocol.Ready(layer, end_token))

    def check(self, layer: int, end_token: int) -> None:
        """Raises ValueError for what layer_ready() cannot be told."""
        if layer not in self._layers:
            raise ValueError(f"layer {layer} is none of this rank's")
        if not 0 <= end_token <= self.num_tokens:
            raise ValueError(f"end_token {end_token} of a request of {self.num_tokens} tokens")
        room = len(self._table) * self._side.layout.block_tokens
        if end_token > room:
            raise ValueError(
                f"{end_token} tokens, but the blocks of only {room} have been named: append_blocks() first"
            )

    def tail(self, payload: MemoryRegion | RegionSlice) -> None:
        """Sends what else the decoder has asked for (last hidden state, logits), by one write. ``payload`` must stay
        as it is until :attr:`done`. Decoders that have not asked get nothing."""
        with self._side.lock:
            self._tail = payload
            self._driver.feed(protocol.TailReady())

    def abort(self, reason: str) -> None:
        """Stops; decoders get the negative completion once nothing more can land. Returns at once."""
        self.feed(protocol.Abort(reason))

    def withdraw_blocks(self, timeout: float) -> bool:
        """Takes the blocks away, as an engine does that preempts the request: nothing more is posted from them, and
        what has been posted is waited for. What decoders have got they keep; after the next ``append_blocks()``, which
        begins at token 0 again, ``layer_ready()`` goes on from there.

        Args:
            timeout: seconds for what is under way. What takes longer is cancelled, and the push aborted; that ends
                within the engine's own bounds.

        Returns whether the push can go on. Either way no NIC reads the blocks when this returns.
        """
        with self._side.lock:
            self._table = np.zeros(0, dtype=np.int64)
            self._driver.feed(protocol.Withdraw())
            under_way = [transfer for delivery in self.deliveries for transfer in delivery.under_way]
        deadline = time.monotonic() + timeout
        try:
            for transfer in under_way:
                _ended(transfer, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self.abort("its blocks were needed, and the decoder took too long")
            for transfer in under_way:
                _ended(transfer, None)
        return self.status.failure is None and not self.status.over

    def __repr__(self) -> str:
        return f"<Push of request {self.request_id}, {len(self.status.tickets)} tickets>"

    # ---- for the sender ----------------------------------------------------------------------------------------------
    def feed(self, event: protocol.Event) -> None:
        """Something has happened."""
        with self._side.lock:
            self._driver.feed(event)

    def attach(self, delivery: Delivery) -> None:
        """A ticket for this request has come, and its list of blocks is whole."""
        key, ticket = delivery.key, delivery.status

        def feed(event: TicketEvent) -> None:
            self._driver.feed(protocol.ForTicket(key, event))

        self._deliveries[key] = delivery
        delivery.source = Source(
            feed, lambda: self.status.tickets[key], lambda: self._table, lambda: self._tail, self.timeline
        )
        self._driver.feed(protocol.Attach(key, ticket))

    # ---- actions -----------------------------------------------------------------------------------------------------
    def _perform(self, action: protocol.Action) -> None:
        match action:
            case protocol.To():
                self._deliveries[action.key].perform(action.action)
            case protocol.Refuse():
                delivery = self._deliveries.pop(action.key)
                delivery.source = None
                delivery.feed(Stop(action.reason))
            case protocol.Set():
                cancel(self._deadline)
                self._deadline = self._side.clock.after(action.seconds, lambda: self.feed(protocol.Late()))
            case protocol.Clear():
                cancel(self._deadline)
            case protocol.Remember():
                self._remember(self.request_id, action.reason)
            case protocol.Close():
                self._forget(self)
                failure = action.failure
                if failure is None:
                    self.done._resolve(None)
                else:
                    self.done._fail(_KINDS[failure.kind](failure.text, request_id=self.request_id))


def _ended(transfer: Transfer, timeout: float | None) -> None:
    """Waits until no NIC reads its source; how it ended is the delivery's affair."""
    try:
        transfer.wait(timeout)
    except RailwireError:
        pass
