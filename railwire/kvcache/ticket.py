"""A ticket: the right of a prefill instance to write certain pages, and what becomes of it.

States: ``open`` -> ``arrived``; or ``open`` -> ``draining`` -> ``failed`` | ``cancelled``. Draining ends when every
source rank has said that nothing of it will land, or has been fenced; never because time has passed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from railwire.errors import DescriptorError, RailwireError
from railwire.kvcache import messages
from railwire.kvcache.deadlines import Deadline, cancel
from railwire.kvcache.errors import ChecksumMismatch, TicketCancelled, TicketError, TicketFailed
from railwire.kvcache.outcome import Outcome

if TYPE_CHECKING:
    from railwire.kvcache.receiver import Link, Receiver
    from railwire.memory import RegionSlice
    from railwire.peer import Peer
    from railwire.transfer import Expectation


class Arrival(NamedTuple):
    """All pages of a ticket are here."""

    seconds: float
    """Since the ticket was sent."""
    nbytes: int
    arrivals: int


class Ticket(Outcome[Arrival]):
    """Await it, or ``wait()``: an :class:`Arrival`, or TicketFailed, TicketCancelled, ChecksumMismatch.

    Made by ``receiver.prepare()``. Its pages belong to the prefill instance until :attr:`reusable` has ended.
    """

    def __init__(
        self,
        receiver: Receiver,
        ticket_id: int,
        link: Link,
        request_id: str,
        blocks: npt.NDArray[Any],
        first_block: int,
        first_token: int,
        num_tokens: int,
    ) -> None:
        super().__init__(f"the ticket of request {request_id}")
        self._receiver = receiver
        self.id = ticket_id
        self.link = link
        self.request_id = request_id
        self.blocks = blocks
        self.first_block = first_block
        self.first_token = first_token
        self.num_tokens = num_tokens
        self.imm = receiver.slots.take()
        self.reusable: Outcome[None] = Outcome(f"the fence of request {request_id}")
        """Ends when nobody can write the pages any more; before or with the ticket itself, but for a lost shm peer."""
        self.state = "open"
        self._busy = {source.peer.id: source for source in link.sources}  # may still write
        self._error: TicketError | None = None
        self._began = time.monotonic()
        self._expectation: Expectation | None = None
        self._arrivals = sum(source.plan.arrivals(first_token, num_tokens) for source in link.sources)
        self._nbytes = sum(source.plan.nbytes(first_token, num_tokens) for source in link.sources)
        self._checksum = False
        self._sums: npt.NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._sums_missing: dict[int, int] = {}
        self._landed = False
        self._silent = {source.peer.id: source for source in link.sources}  # have not said that the request is there
        self._silence: Deadline | None = None

    # ---- called under the receiver's lock ----------------------------------------------------------------------------
    def start(self, tail: RegionSlice | None, checksum: bool, timeout: float, answer_timeout: float) -> None:
        """Sends itself. What fails here fails the ticket."""
        receiver = self._receiver
        receiver.tickets[self.id] = self
        self._checksum = checksum
        if checksum:
            units = -(-(self.num_tokens - self.first_token) // self.link.unit_tokens)
            self._sums = np.zeros(units, dtype=np.uint64)
            self._sums_missing = {s.peer.id: units for s in self.link.sources if s.plan.num_steps and units}
        tail_source = self.link.sources[-1] if tail is not None else None
        if tail_source is not None and tail is not None:
            self._arrivals += 1
            self._nbytes += tail.nbytes
        data = self.blocks.astype("<u4").tobytes()
        step = 4 * messages.BLOCKS_PER_MESSAGE
        try:
            peers = [source.peer for source in self.link.sources]
            counter = receiver.engine.counter(self.imm)
            self._expectation = counter.expect(self._arrivals, peers=peers, timeout=timeout)
            for source in self.link.sources:
                wants_tail = tail.descriptor if tail is not None and source is tail_source else None
                request = messages.Request(
                    self.id, self.link.instance, self.request_id, self.imm, self.first_token, self.num_tokens,
                    self.first_block, len(self.blocks), data[:step], source.destinations,
                    b"" if wants_tail is None else bytes(wants_tail), checksum,
                )  # fmt: skip
                receiver.channel.send(source.peer, request)
                for begin in range(step, len(data), step):
                    receiver.channel.send(source.peer, messages.Blocks(self.id, data[begin : begin + step]))
            self._expectation.add_done_callback(self._on_expectation)
            self._silence = receiver.clock.after(answer_timeout, lambda: self._too_silent(answer_timeout))
        except Exception as error:  # whatever it is: the source that got its part may write, and the slot is taken
            self._drain(self._failed(str(error)))

    def waits_for(self, peer: Peer) -> bool:
        return self.state == "draining" and peer.id in self._busy

    def on_accepted(self, peer: Peer) -> None:
        """The request is there, in a queue or under way. With the word of all ranks it is a question of their lives,
        not of time."""
        self._silent.pop(peer.id, None)
        if not self._silent:
            cancel(self._silence)

    def on_ended(self, peer: Peer, reason: str) -> None:
        """This source rank writes no more."""
        if peer.id not in self._busy:
            return
        if self.state == "open":
            # Its word comes first: draining then asks the others only.
            self._busy.pop(peer.id)
            self._drain(self._failed(f"prefiller {peer.name}: {reason}"))
        else:
            if isinstance(self._error, TicketFailed) and reason != messages.CANCELLED and not self.done():
                # The counter failed first; the prefiller's own word says why.
                self._error.args = (f"request {self.request_id}: prefiller {peer.name}: {reason}",)
            self.on_quiet(peer)

    def on_quiet(self, peer: Peer) -> None:
        """It has confirmed, or it has been fenced."""
        self._busy.pop(peer.id, None)
        if self.state == "draining" and not self._busy:
            self._quiet()

    def on_unfenced(self, peer: Peer, error: RailwireError) -> None:
        """It is lost, and may still write: the ticket ends, its pages do not come back yet."""
        if self._error is not None and not self.done():
            self._error.reusable = False
            self._error.args = (f"{self._error}; and {error}",)
            self._fail(self._error)

    def on_sums(self, peer: Peer, message: messages.Sums) -> None:
        missing = self._sums_missing.get(peer.id, 0)
        sums = np.frombuffer(message.sums, dtype="<u8") if len(message.sums) % 8 == 0 else np.zeros(0, np.uint64)
        last = message.first + len(sums)
        if not 0 < len(sums) <= missing or message.first < 0 or last > len(self._sums):
            raise DescriptorError(f"checksums {message.first}..{last} of ticket {self.id}, which has {len(self._sums)}")
        self._sums[message.first : last] += sums
        self._sums_missing[peer.id] = missing - len(sums)
        if self._landed and not any(self._sums_missing.values()):
            self._arrived()

    # ---- from anywhere -----------------------------------------------------------------------------------------------
    def cancel(self, reason: str = "cancelled") -> None:
        """Asks for the end; returns at once. The ticket ends as cancelled when both ends have drained, unless
        everything has arrived meanwhile."""
        with self._receiver.lock:
            if self.state == "open":
                self._drain(TicketCancelled(f"request {self.request_id}: {reason}", request_id=self.request_id))

    def __repr__(self) -> str:
        return f"<Ticket {self.id} of request {self.request_id}: {self.state}>"

    # ---- transitions -------------------------------------------------------------------------------------------------
    def _on_expectation(self, expectation: Expectation) -> None:
        with self._receiver.lock:
            if self.state != "open":
                return
            error = expectation.exception()
            if error is not None:
                self._drain(self._failed(str(error)))
            elif any(self._sums_missing.values()):
                self._landed = True
                limit = self._receiver.drain_timeout
                self._receiver.clock.after(limit, lambda: self._sums_late(limit))
            else:
                self._arrived()

    def _sums_late(self, seconds: float) -> None:
        with self._receiver.lock:
            if self.state == "open":
                self._drain(self._failed(f"all pages are here, but no checksums after {seconds:g} s more"))

    def _too_silent(self, seconds: float) -> None:
        with self._receiver.lock:
            if self.state == "open" and self._silent and not self._landed:
                names = ", ".join(source.peer.name for source in self._silent.values())
                self._drain(self._failed(f"prefiller {names} did not say within {seconds:g} s that it has the request"))

    def _arrived(self) -> None:
        if self._checksum:
            try:
                wrong = self._wrong_units()
            except ValueError as error:  # such as memory that the host cannot read
                self._error = self._failed(f"cannot compute checksums: {error}")
                self._quiet()
                return
            if len(wrong):
                first = self.first_token + int(wrong[0]) * self.link.unit_tokens
                text = f"{len(wrong)} of {len(self._sums)} pages differ from what was sent, the first at token {first}"
                self._error = ChecksumMismatch(f"request {self.request_id}: {text}", request_id=self.request_id)
                self._quiet()
                return
        self.state = "arrived"
        self._release()
        self.reusable._resolve(None)
        self._resolve(Arrival(time.monotonic() - self._began, self._nbytes, self._arrivals))

    def _wrong_units(self) -> npt.NDArray[np.int64]:
        from railwire.kvcache.checksum import destination_sums

        receiver = self._receiver
        table = np.zeros(self.first_block + len(self.blocks), dtype=np.int64)
        table[self.first_block :] = self.blocks
        have = destination_sums(
            [region.array for region in receiver.regions],
            receiver.layout,
            self.link.unit_tokens,
            table,
            self.first_token,
            self.num_tokens,
        )
        return np.flatnonzero(have != self._sums)

    def _failed(self, why: str) -> TicketFailed:
        return TicketFailed(f"request {self.request_id}: {why}", request_id=self.request_id)

    def _drain(self, error: TicketError) -> None:
        receiver = self._receiver
        self.state = "draining"
        self._error = error
        if self._expectation is not None:
            self._expectation.cancel()
        if not self._busy:
            self._quiet()
            return
        for source in list(self._busy.values()):
            if source.peer.state != "connected" or receiver.channel.send(source.peer, messages.Cancel(self.id)) is None:
                receiver.fence(source.peer)
        receiver.clock.after(receiver.drain_timeout, self._drain_late)

    def _drain_late(self) -> None:
        """Whoever has not confirmed by now loses its connection, and with it the means to write."""
        with self._receiver.lock:
            late = list(self._busy.values()) if self.state == "draining" else []
        for source in late:
            self._receiver.fence(source.peer)

    def _quiet(self) -> None:
        assert self._error is not None
        self.state = "cancelled" if isinstance(self._error, TicketCancelled) else "failed"
        self._release()
        self.reusable._resolve(None)
        if not self.done():
            self._fail(self._error)

    def _release(self) -> None:
        receiver = self._receiver
        receiver.tickets.pop(self.id, None)
        cancel(self._silence)
        if not receiver.engine.closed:
            receiver.engine.counter(self.imm).reset()
        receiver.slots.give_back(self.imm)
