"""A ticket: the right of a prefill instance to write certain pages, and what becomes of it.

A shell around :mod:`railwire.kvcache.protocol.ticket`, which says in which states it can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from railwire.errors import DescriptorError
from railwire.kvcache.deadlines import Deadline, cancel
from railwire.kvcache.driver import Driver
from railwire.kvcache.errors import ChecksumMismatch, TicketCancelled, TicketError, TicketFailed
from railwire.kvcache.outcome import Outcome
from railwire.kvcache.protocol import messages
from railwire.kvcache.protocol import ticket as protocol

if TYPE_CHECKING:
    from railwire.kvcache.link import Link
    from railwire.kvcache.side import Side
    from railwire.kvcache.slots import ImmSlots
    from railwire.memory import RegionSlice
    from railwire.peer import Peer
    from railwire.transfer import Expectation

_KINDS: dict[str, type[TicketError]] = {
    "failed": TicketFailed,
    "cancelled": TicketCancelled,
    "mismatch": ChecksumMismatch,
}


class Arrival(NamedTuple):
    """All pages of a ticket are here."""

    seconds: float
    """Since the ticket was sent."""
    nbytes: int
    arrivals: int


class Wanted(NamedTuple):
    """What a ticket asks for: the tokens [first_token, num_tokens) of a request, and how."""

    request_id: str
    blocks: npt.NDArray[Any]
    """Ours by position, from ``first_block`` on."""
    first_block: int
    first_token: int
    num_tokens: int
    tail: RegionSlice | None
    checksum: bool


class Ticket(Outcome[Arrival]):
    """Await it, or ``wait()``: an :class:`Arrival`, or TicketFailed, TicketCancelled, ChecksumMismatch.

    Made by ``receiver.prepare()``. Its pages belong to the prefill instance until :attr:`reusable` has ended.
    """

    def __init__(
        self,
        side: Side,
        slots: ImmSlots,
        ticket_id: int,
        link: Link,
        wanted: Wanted,
        *,
        answer_timeout: float,
        drain_timeout: float,
        fence: Callable[[Peer], None],
        forget: Callable[[Ticket], None],
    ) -> None:
        request_id = wanted.request_id
        super().__init__(f"the ticket of request {request_id}")
        self.id = ticket_id
        self.link = link
        self.request_id = request_id
        self.first_token = wanted.first_token
        self.num_tokens = wanted.num_tokens
        self.imm = slots.take()
        self.reusable: Outcome[None] = Outcome(f"the fence of request {request_id}")
        """Ends when nobody can write the pages any more; before or with the ticket itself, but for a lost shm peer."""
        self._side = side
        self._slots = slots
        self._wanted = wanted
        self._fence = fence
        self._forget = forget
        self._began = time.monotonic()
        self._expectation: Expectation | None = None
        self._deadlines: dict[protocol.Timer, Deadline] = {}
        tokens = (wanted.first_token, wanted.num_tokens)
        self._arrivals = sum(source.plan.arrivals(*tokens) for source in link.sources)
        self._nbytes = sum(source.plan.nbytes(*tokens) for source in link.sources)
        if wanted.tail is not None:
            self._arrivals += 1
            self._nbytes += wanted.tail.nbytes
        units = -(-(wanted.num_tokens - wanted.first_token) // link.unit_tokens) if wanted.checksum else 0
        self._sums: npt.NDArray[np.uint64] = np.zeros(units, dtype=np.uint64)
        self._peers = {source.peer.id: source.peer for source in link.sources}
        state = protocol.opened(
            {source.peer.id: source.peer.name for source in link.sources},
            {source.peer.id: units for source in link.sources if source.plan.num_steps and units},
            wanted.checksum, answer_timeout, drain_timeout,
        )  # fmt: skip
        self._driver: Driver[protocol.TicketState, protocol.Event, protocol.Action] = Driver(
            state, protocol.step, self._perform
        )

    @property
    def state(self) -> str:
        """``open``, ``draining``, ``arrived``, ``failed`` or ``cancelled``."""
        phase = self._driver.state.phase
        return "open" if phase == "verifying" else phase

    def cancel(self, reason: str = "cancelled") -> None:
        """Asks for the end; returns at once. The ticket ends as cancelled when both ends have drained, unless
        everything has arrived meanwhile."""
        self.feed(protocol.Cancel(reason))

    def __repr__(self) -> str:
        return f"<Ticket {self.id} of request {self.request_id}: {self.state}>"

    # ---- for the receiver --------------------------------------------------------------------------------------------
    def feed(self, event: protocol.Event) -> None:
        """Something has happened."""
        with self._side.lock:
            self._driver.feed(event)

    def start(self, timeout: float) -> None:
        """Sends itself. What fails here fails the ticket."""
        wanted = self._wanted
        data = wanted.blocks.astype("<u4").tobytes()
        step = 4 * messages.BLOCKS_PER_MESSAGE
        try:
            expectation = self._side.engine.counter(self.imm).expect(
                self._arrivals, peers=list(self._peers.values()), timeout=timeout
            )
            self._expectation = expectation
            for source in self.link.sources:
                tail = b""
                if wanted.tail is not None and source is self.link.sources[-1]:
                    tail = bytes(wanted.tail.descriptor)
                request = messages.Request(
                    self.id, self.link.instance, self.request_id, self.imm, wanted.first_token, wanted.num_tokens,
                    wanted.first_block, len(wanted.blocks), data[:step], source.destinations, tail, wanted.checksum,
                )  # fmt: skip
                self._side.channel.send(source.peer, request)
                for begin in range(step, len(data), step):
                    self._side.channel.send(source.peer, messages.Blocks(self.id, data[begin : begin + step]))
            expectation.add_done_callback(self._on_expectation)
            self.feed(protocol.Sent())
        except Exception as error:  # whatever it is: the source that got its part may write, and the slot is taken
            self.feed(protocol.NotSent(str(error)))

    def waits_for(self, peer: Peer) -> bool:
        """Whether its end depends on this peer, which may still write."""
        state = self._driver.state
        return state.phase == "draining" and peer.id in state.busy

    def on_sums(self, peer: Peer, message: messages.Sums) -> None:
        """Checksums have come. Raises DescriptorError for those that cannot be."""
        missing = self._driver.state.missing.get(peer.id, 0)
        sums = np.frombuffer(message.sums, dtype="<u8") if len(message.sums) % 8 == 0 else np.zeros(0, np.uint64)
        last = message.first + len(sums)
        if not 0 < len(sums) <= missing or message.first < 0 or last > len(self._sums):
            raise DescriptorError(f"checksums {message.first}..{last} of ticket {self.id}, which has {len(self._sums)}")
        self._sums[message.first : last] += sums
        self.feed(protocol.SumsCame(peer.id, len(sums)))

    # ---- events and actions ------------------------------------------------------------------------------------------
    def _on_expectation(self, expectation: Expectation) -> None:
        error = expectation.exception()
        self.feed(protocol.Landed() if error is None else protocol.CounterFailed(str(error)))

    def _perform(self, action: protocol.Action) -> None:
        match action:
            case protocol.Set():
                timer = action.timer
                self._deadlines[timer] = self._side.clock.after(action.seconds, lambda: self.feed(protocol.Late(timer)))
            case protocol.Clear():
                cancel(self._deadlines.get(action.timer))
            case protocol.StopCounting():
                if self._expectation is not None:
                    self._expectation.cancel()
            case protocol.Withdraw():
                peer = self._peers[action.source]
                cancel_it = messages.Cancel(self.id)
                if peer.state != "connected" or self._side.channel.send(peer, cancel_it) is None:
                    self._fence(peer)
            case protocol.Fence():
                self._fence(self._peers[action.source])
            case protocol.Verify():
                self._verify()
            case protocol.Release():
                self._forget(self)
                if not self._side.engine.closed:
                    self._side.engine.counter(self.imm).reset()
                self._slots.give_back(self.imm)
                self.reusable._resolve(None)
            case protocol.End():
                self._end(action.failure)

    def _end(self, failure: protocol.Failure | None) -> None:
        if failure is None:
            self._resolve(Arrival(time.monotonic() - self._began, self._nbytes, self._arrivals))
            return
        text = f"request {self.request_id}: {failure.text}"
        self._fail(_KINDS[failure.kind](text, request_id=self.request_id, reusable=failure.reusable))

    def _verify(self) -> None:
        failure: protocol.Failure | None = protocol.Failure("failed", "cannot compute checksums")
        try:
            wrong = self._wrong_units()
            failure = None
            if len(wrong):
                first = self.first_token + int(wrong[0]) * self.link.unit_tokens
                text = f"{len(wrong)} of {len(self._sums)} pages differ from what was sent, the first at token {first}"
                failure = protocol.Failure("mismatch", text)
        except ValueError as error:  # such as memory that the host cannot read
            failure = protocol.Failure("failed", f"cannot compute checksums: {error}")
        finally:
            self.feed(protocol.Verified(failure))

    def _wrong_units(self) -> npt.NDArray[np.int64]:
        from railwire.kvcache.geometry.checksum import destination_sums

        wanted = self._wanted
        table = np.zeros(wanted.first_block + len(wanted.blocks), dtype=np.int64)
        table[wanted.first_block :] = wanted.blocks
        have = destination_sums(
            [region.array for region in self._side.regions], self._side.layout, self.link.unit_tokens, table,
            wanted.first_token, wanted.num_tokens,
        )  # fmt: skip
        return np.flatnonzero(have != self._sums)
