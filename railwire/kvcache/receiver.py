"""The decode side: links to prefill instances, and tickets for pages that shall come."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from railwire.errors import ConnectError, ConnectTimeout, PeerLostError, RailwireError
from railwire.kvcache.geometry.idle import idle_plan, informing_rank
from railwire.kvcache.geometry.layout import InstanceLayout, LayoutError
from railwire.kvcache.geometry.plan import RankPlan, plan
from railwire.kvcache.link import Link, Source
from railwire.kvcache.protocol import messages
from railwire.kvcache.protocol.descriptor import RankDescriptor
from railwire.kvcache.protocol.ticket import Accepted, Ended, Fenced, NotFenced
from railwire.kvcache.side import Side
from railwire.kvcache.slots import ImmSlots
from railwire.kvcache.ticket import Ticket, Wanted

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.memory import MemoryRegion, RegionSlice
    from railwire.peer import Peer


_Key = tuple[str | bytes, ...]  # of a prefill instance: its id, and the incarnations of its engines


class _Turn:
    """Whoever shakes hands with an instance: one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0  # who has it or waits for it; under the receiver's lock


class Receiver(Side):
    """Takes KV pages from any number of prefill instances, that come and go.

    Args:
        engine: of this rank; the receiver takes over its messages (see :class:`~railwire.kvcache.channel.Channel`).
        instance: layouts of all ranks of this decode instance.
        rank: which of them this is.
        regions: registered memory in the order in which the layout counts it.
        max_tickets: tickets that may be open at once.
        drain_timeout: seconds that a prefill rank has to confirm a cancel, before its connection is closed instead.
            Default: the engine's liveness time.

    Raises:
        LayoutError: regions that are not what the layout says.
    """

    def __init__(
        self,
        engine: TransferEngine,
        instance: InstanceLayout,
        rank: int,
        regions: Sequence[MemoryRegion],
        *,
        max_tickets: int = 1024,
        drain_timeout: float | None = None,
    ) -> None:
        super().__init__(engine, instance, rank, regions, "railwire-kv-receiver")
        self.drain_timeout = engine.liveness if drain_timeout is None else drain_timeout
        self.slots = ImmSlots(max_tickets)
        self.tickets: dict[int, Ticket] = {}
        self._ids = itertools.count(1)
        self._links: dict[_Key, Link] = {}
        self._connecting: dict[_Key, _Turn] = {}
        self._answers: dict[int, tuple[threading.Event, list[messages.Message]]] = {}
        self._fencing: set[int] = set()
        self._watched: set[int] = set()
        if self.channel.receiver is not None:
            raise RailwireError("this engine has a receiver already")
        self.channel.receiver = self._on_message

    # ---- links -------------------------------------------------------------------------------------------------------
    def connect(self, instance: Sequence[bytes | RankDescriptor], timeout: float | None = None) -> Link:
        """Connects to all ranks of a prefill instance and agrees on the plan; at once if that has been done.

        Args:
            instance: what each rank's ``sender.descriptor`` gave, of all ranks, in any order.
            timeout: seconds for everything; default twice the liveness time.

        Raises:
            LayoutError: its KV cannot be mapped onto ours; the message says why.
            ConnectError, StaleAddressError: it cannot be reached, or has restarted: ask the router for its new
                descriptors.
        """
        ranks = [item if isinstance(item, RankDescriptor) else RankDescriptor.from_bytes(item) for item in instance]
        ranks.sort(key=lambda descriptor: descriptor.rank)
        if not ranks or [d.rank for d in ranks] != list(range(len(ranks[0].layout.ranks))):
            raise LayoutError(f"{len(ranks)} descriptors are not one of each rank of the prefill instance")
        if len({d.instance for d in ranks}) != 1 or any(d.layout != ranks[0].layout for d in ranks):
            raise LayoutError("the descriptors are of different prefill instances")
        # An engine may get another Sender, with which there would be no agreement.
        key: _Key = (ranks[0].instance, *(d.address.incarnation for d in ranks))
        seconds = 2 * self.engine.liveness if timeout is None else timeout
        with self.lock:
            known = self._links.get(key)
            if known is not None and known.connected:
                return known
            # One lock an instance: whoever waits for one that does not answer must not hold up the others.
            turn = self._connecting.setdefault(key, _Turn())
            turn.users += 1
        try:
            if not turn.lock.acquire(timeout=seconds):
                raise ConnectTimeout(f"prefill instance {ranks[0].instance} has not answered for {seconds:g} s")
            try:
                known = self._links.get(key)
                if known is not None and known.connected:
                    return known
                link = self._handshake(ranks, seconds)
                with self.lock:
                    self._links = {k: link for k, link in self._links.items() if link.connected}
                    self._links[key] = link
                return link
            finally:
                turn.lock.release()
        finally:
            with self.lock:
                turn.users -= 1
                if turn.users == 0:  # not before: two handshakes at once would take each other's answers
                    del self._connecting[key]

    async def connect_async(self, instance: Sequence[bytes | RankDescriptor], timeout: float | None = None) -> Link:
        """As :meth:`connect`, without blocking the event loop."""
        return await asyncio.to_thread(self.connect, instance, timeout)

    def _handshake(self, ranks: Sequence[RankDescriptor], timeout: float) -> Link:
        source = ranks[0].layout
        everyone = [plan(source, layout, index) for index, layout in enumerate(self.instance.ranks)]
        layout = messages.pack(msgspec.msgpack.encode(self.layout))
        regions = tuple(bytes(region.descriptor) for region in self.regions)
        waiting: list[tuple[RankDescriptor, Peer, RankPlan, threading.Event, list[messages.Message]]] = []
        try:
            for descriptor, rank_plan in zip(ranks, everyone[self.rank], strict=True):
                if rank_plan is None:
                    if informing_rank(descriptor.rank, everyone) != self.rank:
                        continue
                    rank_plan = idle_plan(descriptor.rank, source.ranks[descriptor.rank], self.layout, self.rank)
                peer = self.engine.connect(descriptor.address, timeout)
                answered: tuple[threading.Event, list[messages.Message]] = (threading.Event(), [])
                self._answers[peer.id] = answered
                self._watch(peer)
                hello = messages.Hello(messages.VERSION, self.rank, layout, regions, rank_plan.digest)
                self.channel.send(peer, hello)
                waiting.append((descriptor, peer, rank_plan, *answered))
            sources = []
            for descriptor, peer, rank_plan, event, answers in waiting:
                if not event.wait(timeout):
                    raise ConnectTimeout(
                        f"prefill rank {descriptor.rank} ({peer.name}) does not answer: is it a Sender?"
                    )
                answer = answers[0] if answers else None
                if isinstance(answer, messages.Refused):
                    raise LayoutError(f"prefill rank {descriptor.rank} ({peer.name}) refuses: {answer.reason}")
                if not isinstance(answer, messages.Welcome):
                    raise ConnectError(f"prefill rank {descriptor.rank} ({peer.name}) was lost in the handshake")
                if answer.digest != rank_plan.digest:
                    raise LayoutError(f"prefill rank {descriptor.rank} ({peer.name}) has computed another plan")
                served = sum(plans[descriptor.rank] is not None for plans in everyone) or 1
                sources.append(Source(descriptor.rank, peer, rank_plan, served))
        finally:
            for _, peer, *_ in waiting:
                self._answers.pop(peer.id, None)
        return Link(ranks[0].instance, sources)

    def _watch(self, peer: Peer) -> None:
        with self.lock:
            if peer.id in self._watched:
                return
            self._watched.add(peer.id)
        peer.lost.add_done_callback(lambda _: self._on_peer_lost(peer))

    # ---- tickets -----------------------------------------------------------------------------------------------------
    def prepare(
        self,
        link: Link,
        request_id: str,
        block_ids: Sequence[int] | npt.NDArray[Any],
        num_tokens: int,
        *,
        first_token: int = 0,
        tail: RegionSlice | None = None,
        checksum: bool = False,
        timeout: float = 120.0,
        answer_timeout: float = 30.0,
    ) -> Ticket:
        """Asks a prefill instance for the KV of a request; the ticket ends when all of it is here.

        Args:
            link: from :meth:`connect`.
            request_id: the name under which the prefill instance computes it.
            block_ids: our blocks by position, from token 0 on; those before ``first_token`` are not touched.
            num_tokens: tokens whose KV is wanted, counted from token 0.
            first_token: the first one wanted, where a prefix is here already; a multiple of ``link.unit_tokens``.
            tail: memory for what the prefiller sends besides (last hidden state, logits); one arrival more.
            checksum: have every page verified before the ticket ends.
            timeout: seconds until the ticket fails by itself, queues included; ``math.inf``: it does not. It still ends
                when the prefiller says so, or is lost, or stays silent.
            answer_timeout: seconds for all prefill ranks to say that the request is there, in their queue or under way.

        Raises:
            ValueError: blocks that are not ours, doubled, or too few; a name of more than 1,000 characters.
            PeerLostError: the link is lost: connect() again.
            SlotsExhausted: ``max_tickets`` are open.
        """
        check_name(request_id)
        blocks = np.asarray(block_ids)
        if blocks.size == 0:
            blocks = blocks.astype(np.uint32)
        if blocks.ndim != 1 or blocks.dtype.kind not in "iu":
            raise ValueError("block_ids must be a list of integers")
        if not 0 <= first_token <= num_tokens or num_tokens < 1:
            raise ValueError(f"tokens {first_token}..{num_tokens} are no range")
        if first_token % link.unit_tokens:
            raise ValueError(f"first_token {first_token} is no multiple of {link.unit_tokens}, the unit of transfer")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        if not answer_timeout > 0:
            raise ValueError(f"answer_timeout must be positive, not {answer_timeout}")
        needed = -(-num_tokens // self.layout.block_tokens)
        if len(blocks) < needed:
            raise ValueError(
                f"{num_tokens} tokens need {needed} blocks of {self.layout.block_tokens}, not {len(blocks)}"
            )
        first_block = first_token // self.layout.block_tokens
        wanted = blocks[first_block:needed]
        if wanted.size and not (int(wanted.min()) >= 0 and int(wanted.max()) < self.layout.num_blocks):
            raise ValueError(f"block ids must be 0..{self.layout.num_blocks - 1}")
        if len(np.unique(wanted)) != len(wanted):
            raise ValueError("block_ids names a block twice")
        with self.lock:
            if self.closed:
                raise RailwireError("the receiver is closed")
            if not link.connected:
                raise PeerLostError(f"prefill instance {link.instance} is lost: connect() again", reason="peer_lost")
            wants = Wanted(request_id, wanted, first_block, first_token, num_tokens, tail, checksum)
            ticket = Ticket(
                self, self.slots, next(self._ids), link, wants,
                answer_timeout=answer_timeout, drain_timeout=self.drain_timeout,
                fence=self.fence, forget=self._forget,
            )  # fmt: skip
            self.tickets[ticket.id] = ticket
            ticket.start(timeout)
            return ticket

    def _forget(self, ticket: Ticket) -> None:
        del self.tickets[ticket.id]

    def announce(self, link: Link, request_id: str) -> None:
        """Tells a prefill instance that we will ask for this request once there is room for it: its push then waits for
        us for its ``queue_timeout``, and no longer than this connection lasts, instead of for its ``ticket_timeout``.
        :meth:`prepare` or :meth:`decline` must follow. Returns at once; a lost instance is no error.

        Raises:
            ValueError: a name of more than 1,000 characters.
        """
        check_name(request_id)
        for source in link.sources:
            self.channel.send(source.peer, messages.Coming(request_id))

    def decline(self, link: Link, request_id: str, reason: str = "the decoder does not need it") -> None:
        """Tells a prefill instance that no ticket will come for this request, so that it lets go of the source pages
        now instead of after its ``ticket_timeout``. Its push ends with PushCancelled. Returns at once; a lost
        instance is no error."""
        for source in link.sources:
            self.channel.send(source.peer, messages.Decline(request_id, reason[: messages.MAX_REASON]))

    @property
    def open_tickets(self) -> int:
        """Tickets whose pages may still be written."""
        with self.lock:
            return len(self.tickets)

    def close(self, timeout: float = 10.0) -> None:
        """Cancels all tickets and waits until their pages are reusable, at most ``timeout`` seconds."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            open_ones = list(self.tickets.values())
        for ticket in open_ones:
            ticket.cancel("the receiver is closing")
        for ticket in open_ones:
            try:
                ticket.reusable.wait(timeout)
            except TimeoutError:
                break
        self.channel.receiver = None
        self.clock.close()

    # ---- what comes in -----------------------------------------------------------------------------------------------
    def _on_message(self, peer: Peer, message: Any) -> None:
        if isinstance(message, messages.Welcome | messages.Refused):
            answered = self._answers.get(peer.id)
            if answered is not None:
                answered[1].append(message)
                answered[0].set()
            return
        with self.lock:
            ticket = self.tickets.get(message.ticket)
            if ticket is None:
                return  # it has ended: an answer that crossed with ours
            if isinstance(message, messages.Accepted):
                ticket.feed(Accepted(peer.id))
            elif isinstance(message, messages.Ended):
                ticket.feed(Ended(peer.id, message.reason[: messages.MAX_REASON]))
            elif isinstance(message, messages.Sums):
                ticket.on_sums(peer, message)

    def _on_peer_lost(self, peer: Peer) -> None:
        answered = self._answers.get(peer.id)
        if answered is not None:
            answered[0].set()
        with self.lock:
            self._watched.discard(peer.id)
            draining = any(ticket.waits_for(peer) for ticket in self.tickets.values())
        if draining:
            self.fence(peer)

    # ---- fences ------------------------------------------------------------------------------------------------------
    def fence(self, peer: Peer) -> None:
        """Makes sure that this peer writes no more, and tells the tickets that wait for that."""
        with self.lock:
            if peer.id in self._fencing or (self.closed and self.engine.closed):
                return
            self._fencing.add(peer.id)
        try:
            peer.close_async(self.drain_timeout).add_done_callback(lambda fence: self._fenced(peer, fence.exception()))
        except RailwireError as error:
            self._fenced(peer, error)

    def _fenced(self, peer: Peer, error: RailwireError | None) -> None:
        with self.lock:
            self._fencing.discard(peer.id)
            waiting = [ticket for ticket in self.tickets.values() if ticket.waits_for(peer)]
            for ticket in waiting:
                ticket.feed(Fenced(peer.id) if error is None else NotFenced(peer.id, str(error)))
        if error is not None and waiting and not self.closed:
            # A stopped process may go on: only its death, or its word, ends this.
            self.clock.after(min(1.0, self.drain_timeout), lambda: self.fence(peer))


def check_name(request_id: str) -> None:
    """Raises ValueError for a request's name that no message carries."""
    if len(request_id) > messages.MAX_NAME:
        raise ValueError(f"a request's name has at most {messages.MAX_NAME} characters, not {len(request_id)}")
