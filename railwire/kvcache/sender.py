"""The prefill side: answers receivers, matches their tickets with requests, and pushes layer by layer."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from railwire.errors import DescriptorError, RailwireError
from railwire.kvcache.deadlines import cancel
from railwire.kvcache.delivery import Delivery, Destination
from railwire.kvcache.errors import PushError
from railwire.kvcache.geometry.idle import DIGEST, idle_plan
from railwire.kvcache.geometry.layout import InstanceLayout, LayoutError, RankLayout
from railwire.kvcache.geometry.plan import plan
from railwire.kvcache.protocol import messages
from railwire.kvcache.protocol.announced import Announced
from railwire.kvcache.protocol.delivery import Expected, Stop
from railwire.kvcache.protocol.descriptor import RankDescriptor
from railwire.kvcache.protocol.push import AwaitDecoder, Decline, DoWithout
from railwire.kvcache.push import Push
from railwire.kvcache.side import Side
from railwire.kvcache.slots import MAX_SLOTS
from railwire.memory import RemoteRegion
from railwire.wire import UNREADABLE

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.memory import MemoryRegion
    from railwire.peer import Peer

# An honest receiver has as many tickets open as it has slots, over blocks of its own that no two of them share. Twice
# that is taken: it may use both again before we have seen that a ticket has ended.
_MAX_TICKETS = 2 * MAX_SLOTS
_REMEMBERED = 4096  # requests that were aborted before their ticket came, or declined before they were opened


@dataclass
class Load:
    """Of one decoder: what its open tickets hold here."""

    tickets: int = 0
    blocks: int = 0


class Sender(Side):
    """Pushes KV pages to any number of decode instances, that come and go.

    Args:
        engine: of this rank; the sender takes over its messages.
        instance: layouts of all ranks of this prefill instance.
        rank: which of them this is.
        regions: registered memory in the order in which the layout counts it.
        instance_id: the same for all ranks of the instance, and new for each of its lives; random if None (right for
            an instance of one rank).
        ticket_timeout: seconds that a ticket waits for a request of which nothing is known here, see :meth:`expect`,
            and an open request for its tickets, if no decoder has announced itself for it, see ``receiver.announce()``.
        queue_timeout: the same of an open request for which a decoder has announced itself: in its queue it may depend
            on blocks that requests in our own queue need, and these on those that are held here.

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
        instance_id: str | None = None,
        ticket_timeout: float = 30.0,
        queue_timeout: float = 480.0,
    ) -> None:
        super().__init__(engine, instance, rank, regions, "railwire-kv-sender")
        self.instance_id = instance_id or secrets.token_hex(8)
        self.ticket_timeout = ticket_timeout
        self.queue_timeout = queue_timeout
        self.refused_tickets = 0
        self._destinations: dict[int, Destination] = {}
        self._newest: dict[int, int] = {}  # per peer: the highest ticket id so far; ids only grow
        self._deliveries: dict[tuple[int, int], Delivery] = {}
        self._unmatched: dict[str, list[Delivery]] = {}
        self._pushes: dict[str, Push] = {}
        self._announced = Announced()
        self._aborted: OrderedDict[str, str] = OrderedDict()
        self._declined: OrderedDict[str, str] = OrderedDict()
        self._absent: OrderedDict[str, set[int]] = OrderedDict()  # peers that declined what is not open yet
        self._load: dict[int, Load] = {}  # per peer: its open tickets
        if self.channel.sender is not None:
            raise RailwireError("this engine has a sender already")
        self.channel.sender = self._on_message

    @property
    def descriptor(self) -> bytes:
        """What receivers need to find this rank: carry it to them any way you like."""
        return bytes(RankDescriptor(self.instance_id, self.rank, self.engine.address, self.instance))

    # ---- requests ----------------------------------------------------------------------------------------------------
    def expect(self, request_id: str) -> None:
        """The request stands in this instance's queue: tickets for it, those that have come and those to come, wait
        until it is opened or refused, however long that takes, and their decoders are told so. One of the two must
        follow. Nothing, if it is open already, or the sender is closed."""
        with self.lock:
            if self.closed or request_id in self._pushes:
                return
            self._announced.queue(request_id)
            self._aborted.pop(request_id, None)  # another life of this name
            for delivery in self._unmatched.get(request_id, ()):
                delivery.feed(Expected())

    def open(self, request_id: str, num_tokens: int) -> Push:
        """Begins the push of a request, before or after its tickets have come.

        Args:
            num_tokens: tokens whose KV this prefill makes, those of a cached prefix included.

        Raises:
            ValueError: the request is being pushed already, or has no tokens.
        """
        if num_tokens < 1:
            raise ValueError(f"a request has at least one token, not {num_tokens}")
        with self.lock:
            if self.closed:
                raise RailwireError("the sender is closed")
            if request_id in self._pushes:
                raise ValueError(f"request {request_id} is being pushed already")
            push = Push(
                self, request_id, num_tokens,
                ticket_timeout=self.ticket_timeout, absent=self._absent.pop(request_id, set()),
                remember=self._remember, forget=self._forget_push,
            )  # fmt: skip
            self._pushes[request_id] = push
            self._aborted.pop(request_id, None)
            self._announced.unqueue(request_id)
            for delivery in self._unmatched.pop(request_id, []):
                push.attach(delivery)
            declined = self._declined.pop(request_id, None)
            if declined is not None:
                push.feed(Decline(declined))
            elif not push.status.tickets:
                self._await_decoder(push)
            return push

    def layer_ready(self, layer: int, items: Iterable[tuple[Push, int]]) -> None:
        """The KV of tokens 0..``end_token`` of this layer is complete, for each (push, end_token): pushes what has not
        been pushed. Tokens of a cached prefix go with the first call.

        Raises:
            ValueError: a layer that this rank does not hold, or tokens whose blocks have not been named.
        """
        with self.lock:
            for push, end_token in items:
                push.layer_ready(layer, end_token)

    def refuse(self, request_id: str, reason: str) -> None:
        """The request will not be computed here: its tickets, those that have come and those to come, fail with this
        reason."""
        with self.lock:
            push = self._pushes.get(request_id)
            if push is not None:
                push.abort(reason)
                return
            self._remember(request_id, reason)
            self._announced.over(request_id)
            for delivery in self._unmatched.pop(request_id, []):
                delivery.feed(Stop(reason))

    @property
    def open_pushes(self) -> int:
        with self.lock:
            return len(self._pushes)

    @property
    def open_tickets(self) -> int:
        with self.lock:
            return len(self._deliveries)

    @property
    def announced(self) -> int:
        """What is known to come: requests that are expected, and decoders that have announced themselves, one for each
        rank and request."""
        with self.lock:
            return len(self._announced)

    def close(self, timeout: float = 10.0) -> None:
        """Aborts what is under way, and waits until it has drained, at most ``timeout`` seconds."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            pushes = list(self._pushes.values())
            waiting = [delivery for group in self._unmatched.values() for delivery in group]
            self._unmatched.clear()
            self._announced.clear()
        for push in pushes:
            push.abort("the prefiller is closing")
        with self.lock:
            for delivery in waiting:
                delivery.feed(Stop("the prefiller is closing"))
        for push in pushes:
            try:
                push.done.wait(timeout)
            except TimeoutError:
                break
            except RailwireError:
                pass
        self.channel.sender = None
        self.clock.close()

    # ---- for pushes and deliveries, under the lock -------------------------------------------------------------------
    def _remember(self, request_id: str, reason: str) -> None:
        self._aborted[request_id] = reason
        while len(self._aborted) > _REMEMBERED:
            self._aborted.popitem(last=False)

    def _await_decoder(self, push: Push) -> None:
        """Of a push without tickets: from now on, as long as what is known of decoders says."""
        seconds = self.queue_timeout if self._announced.anybody(push.request_id) else self.ticket_timeout
        push.feed(AwaitDecoder(seconds))

    def _nobody_comes(self, push: Push, reason: str) -> None:
        if not push.status.tickets:
            self._remember(push.request_id, reason)  # a ticket that comes all the same is answered at once
            push.feed(Decline(reason))

    def _on_coming(self, peer: Peer, request_id: str) -> None:
        if peer.id not in self._destinations:
            raise DescriptorError("an announcement before the handshake")
        if self.closed or request_id in self._aborted or request_id in self._declined:
            return  # its ticket will be told
        push = self._pushes.get(request_id)
        tickets = self._unmatched.get(request_id, []) if push is None else push.deliveries
        if tickets and (push is not None or any(ticket.destination.peer.id == peer.id for ticket in tickets)):
            return  # late: what has come is not coming, and a push that has tickets waits for nobody else
        first = not self._announced.anybody(request_id)
        if self._announced.come(peer.id, request_id) and first and push is not None:
            self._await_decoder(push)

    def _on_decline(self, peer: Peer, request_id: str, reason: str) -> None:
        self._announced.came(peer.id, request_id)
        push = self._pushes.get(request_id)
        if push is not None:
            push.feed(DoWithout(peer.id))
        elif peer.id in self._destinations:
            self._absent.setdefault(request_id, set()).add(peer.id)
            while len(self._absent) > _REMEMBERED:
                self._absent.popitem(last=False)
        if self._announced.anybody(request_id):
            return  # the word of one rank, or decoder; others are still coming
        if push is not None:
            self._nobody_comes(push, reason)
            return
        self._declined[request_id] = reason
        while len(self._declined) > _REMEMBERED:
            self._declined.popitem(last=False)

    def _forget_push(self, push: Push) -> None:
        if self._pushes.get(push.request_id) is push:
            del self._pushes[push.request_id]
            self._announced.over(push.request_id)

    def _forget_delivery(self, delivery: Delivery) -> None:
        known = self._deliveries.pop(delivery.key, None)
        load = self._load.get(delivery.destination.peer.id)
        if known is not None and load is not None:
            load.tickets -= 1
            load.blocks -= delivery.request.num_blocks
        group = self._unmatched.get(delivery.request.request_id)
        if group and delivery in group:
            group.remove(delivery)
            if not group:
                del self._unmatched[delivery.request.request_id]

    # ---- what comes in -----------------------------------------------------------------------------------------------
    def _on_message(self, peer: Peer, message: Any) -> None:
        with self.lock:
            if isinstance(message, messages.Hello):
                self._on_hello(peer, message)
            elif isinstance(message, messages.Request):
                self._on_request(peer, message)
            elif isinstance(message, messages.Coming):
                self._on_coming(peer, message.request_id)
            elif isinstance(message, messages.Blocks):
                delivery = self._deliveries.get((peer.id, message.ticket))
                if delivery is not None and delivery.add_blocks(message.blocks):
                    self._match(delivery)
            elif isinstance(message, messages.Decline):
                self._on_decline(peer, message.request_id, message.reason[: messages.MAX_REASON])
            elif isinstance(message, messages.Cancel):
                delivery = self._deliveries.get((peer.id, message.ticket))
                if delivery is None:
                    # It has ended, or it never was: either way nothing of it can land.
                    self.channel.send(peer, messages.Ended(message.ticket, messages.CANCELLED))
                else:
                    delivery.feed(Stop(messages.CANCELLED, by_receiver=True))

    def _on_hello(self, peer: Peer, hello: messages.Hello) -> None:
        try:
            if hello.version != messages.VERSION:
                raise LayoutError(f"protocol version {hello.version}, here it is {messages.VERSION}")
            layout = msgspec.msgpack.decode(messages.unpack(hello.layout), type=RankLayout)
            rank_plan = plan(self.instance, layout, hello.rank)[self.rank]
            if rank_plan is None and hello.digest == DIGEST:
                rank_plan = idle_plan(self.rank, self.layout, layout, hello.rank)
            if rank_plan is None:
                raise LayoutError(f"rank {self.rank} has nothing that rank {hello.rank} of the decoder needs")
            if rank_plan.digest != hello.digest:
                raise LayoutError("the two sides have computed different plans: do both run the same Railwire?")
            regions = [RemoteRegion.from_bytes(region) for region in hello.regions]
            if any(region.incarnation != peer.incarnation for region in regions):
                raise LayoutError("regions of another engine")
            # The decoder may close this connection to take its pages back, and connect anew.
            regions = [region.over(peer) for region in regions]
            if len(regions) != len(layout.region_bytes) or any(
                region.nbytes < nbytes for region, nbytes in zip(regions, layout.region_bytes, strict=True)
            ):
                raise LayoutError("regions that are not what the layout says")
        except (LayoutError, DescriptorError, *UNREADABLE) as error:
            self.channel.send(peer, messages.Refused(hello.digest, str(error)[: messages.MAX_REASON]))
            return
        known = self._destinations.get(peer.id)
        self._destinations[peer.id] = Destination(peer, layout, tuple(regions), rank_plan)
        if known is None:
            peer.lost.add_done_callback(lambda reason: self._on_peer_lost(peer, reason))
        self.channel.send(peer, messages.Welcome(rank_plan.digest))

    def _on_request(self, peer: Peer, request: messages.Request) -> None:
        if request.ticket <= self._newest.get(peer.id, 0):
            self.refused_tickets += 1
            raise DescriptorError(f"ticket {request.ticket} was presented twice")
        self._newest[peer.id] = request.ticket
        announced = self._announced.came(peer.id, request.request_id)
        self._take_ticket(peer, request)
        push = self._pushes.get(request.request_id)
        if announced and push is not None and not push.status.tickets:
            self._await_decoder(push)  # it was turned away, or is not whole yet: nobody need come again

    def _take_ticket(self, peer: Peer, request: messages.Request) -> None:
        destination = self._destinations.get(peer.id)
        try:
            if self.closed:
                raise PushError("the prefiller is closing", request_id=request.request_id)
            if destination is None:
                raise DescriptorError("a ticket before the handshake")
            if request.instance != self.instance_id:
                raise DescriptorError(f"the ticket is for instance {request.instance}, this is {self.instance_id}")
            load = self._load.setdefault(peer.id, Load())
            if load.tickets >= _MAX_TICKETS or load.blocks > 2 * destination.layout.num_blocks:
                raise DescriptorError(
                    f"{load.tickets} tickets over {load.blocks} blocks are open, more than this decoder can have"
                )
            delivery = Delivery(self, destination, request, self._forget_delivery)
            if request.request_id in self._aborted:
                raise PushError(self._aborted[request.request_id], request_id=request.request_id)
        except (DescriptorError, PushError) as error:
            self.refused_tickets += 1
            self.channel.send(peer, messages.Ended(request.ticket, str(error)[: messages.MAX_REASON]))
            return
        self._deliveries[peer.id, request.ticket] = delivery
        load.tickets += 1
        load.blocks += request.num_blocks
        if delivery.complete:
            self._match(delivery)
            return
        text = f"its list of blocks has not come within {self.ticket_timeout:g} s"
        delivery.deadline = self.clock.after(self.ticket_timeout, lambda: self._unmatched_too_long(delivery, text))

    def _match(self, delivery: Delivery) -> None:
        """Its list of blocks is whole."""
        cancel(delivery.deadline)
        request = delivery.request
        push = self._pushes.get(request.request_id)
        if push is not None:
            push.attach(delivery)
            return
        self._unmatched.setdefault(request.request_id, []).append(delivery)
        if self._announced.queued(request.request_id):
            delivery.feed(Expected())
            return
        text = f"the prefiller got no request {request.request_id} within {self.ticket_timeout:g} s"
        delivery.deadline = self.clock.after(self.ticket_timeout, lambda: self._unmatched_too_long(delivery, text))

    def _unmatched_too_long(self, delivery: Delivery, text: str) -> None:
        with self.lock:
            if delivery.source is None:
                delivery.feed(Stop(text))

    def _on_peer_lost(self, peer: Peer, reason: str) -> None:
        with self.lock:
            self._destinations.pop(peer.id, None)
            self._newest.pop(peer.id, None)
            self._load.pop(peer.id, None)
            for request_id in self._announced.lost(peer.id):
                push = self._pushes.get(request_id)
                if push is not None:
                    self._nobody_comes(push, f"decoder {peer.name}, which was coming for it, is lost: {reason}")
            for delivery in [d for (peer_id, _), d in self._deliveries.items() if peer_id == peer.id]:
                delivery.feed(Stop(f"decoder {peer.name} is lost: {reason}", by_receiver=True))
