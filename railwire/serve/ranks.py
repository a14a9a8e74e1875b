"""The ranks of one instance, all in this process: one engine and one Sender or Receiver for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from railwire.engine import TransferEngine
from railwire.errors import RailwireError
from railwire.kvcache.errors import TicketError
from railwire.kvcache.link import Link
from railwire.kvcache.push import Push
from railwire.kvcache.receiver import Receiver
from railwire.kvcache.sender import Sender
from railwire.kvcache.ticket import Ticket
from railwire.runner import Runner
from railwire.serve.config import WorkerConfig


def open_engines(config: WorkerConfig, runner: Runner, role: str) -> list[tuple[TransferEngine, list[Any]]]:
    """An engine per rank, with the rank's KV memory registered."""
    ranks = []
    for rank in range(len(runner.layout().ranks)):
        engine = TransferEngine(
            config.device,
            list(config.nics) or "auto",
            secret=config.secret or None,
            liveness=config.liveness,
            name=f"{role}:{config.port or 'auto'}:{rank}",
        )
        ranks.append((engine, [engine.register(buffer) for buffer in runner.regions(rank)]))
    return ranks


class SenderRanks:
    """Opens the push of a request on every rank."""

    def __init__(self, config: WorkerConfig, runner: Runner, instance_id: str) -> None:
        layout = runner.layout()
        opened = open_engines(config, runner, "prefill")
        self.engines = [engine for engine, _ in opened]
        self.senders = [
            Sender(engine, layout, rank, regions, instance_id=instance_id, ticket_timeout=config.ticket_timeout)
            for rank, (engine, regions) in enumerate(opened)
        ]
        self.layers = [{storage.layer for storage in rank.layers} for rank in layout.ranks]

    @property
    def descriptors(self) -> tuple[bytes, ...]:
        return tuple(sender.descriptor for sender in self.senders)

    def open(self, request_id: str, num_tokens: int) -> RankPushes:
        return RankPushes([s.open(request_id, num_tokens) for s in self.senders], self.layers)

    def refuse(self, request_id: str, reason: str) -> None:
        for sender in self.senders:
            sender.refuse(request_id, reason)

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        for engine in self.engines:
            engine.close()


class RankPushes:
    """The push of one request, on all ranks."""

    def __init__(self, pushes: Sequence[Push], layers: Sequence[set[int]]) -> None:
        self.pushes = pushes
        self._layers = layers

    def append_blocks(self, blocks: Sequence[int]) -> None:
        for push in self.pushes:
            push.append_blocks(blocks)

    def layer_ready(self, layer: int, end_token: int) -> None:
        for push, layers in zip(self.pushes, self._layers, strict=True):
            if layer in layers:
                push.layer_ready(layer, end_token)

    def all_ready(self, end_token: int) -> None:
        """Every layer is there up to ``end_token``: a prefix from the cache."""
        for layer in sorted(set().union(*self._layers)):
            self.layer_ready(layer, end_token)

    @property
    def failed(self) -> bool:
        """Whether going on is of no use."""
        return any(push.done.exception() is not None for push in self.pushes)

    def abort(self, reason: str) -> None:
        for push in self.pushes:
            push.abort(reason)

    async def drained(self) -> BaseException | None:
        """Waits until no rank's pages are read any more; the first failure, if there was one."""
        results = await asyncio.gather(*(_ended(push.done) for push in self.pushes), return_exceptions=True)
        return next((result for result in results if isinstance(result, BaseException)), None)

    @property
    def nbytes(self) -> int:
        return sum(push.nbytes for push in self.pushes)

    def on_done(self, callback: Callable[[], object]) -> None:
        """Calls back, on any thread, for each rank that ends."""
        for push in self.pushes:
            push.done.add_done_callback(lambda _: callback())

    def timeline(self, until: float) -> dict[str, Any]:
        """Per layer when it was ready, posted and landed (monotonic seconds), and the share of bytes landed by
        ``until``."""
        layers: dict[int, dict[str, float]] = {}
        total = hidden = 0.0
        for push in self.pushes:
            for layer, times in push.timeline.layers.items():
                nothing = {"layer": layer, "ready": 0.0, "posted": 0.0, "landed": 0.0, "bytes": 0}
                entry = layers.setdefault(layer, nothing)
                for key, value in (("ready", times.ready), ("posted", times.posted), ("landed", times.landed)):
                    entry[key] = max(entry[key], value)
                entry["bytes"] += times.nbytes
            nbytes = sum(times.nbytes for times in push.timeline.layers.values())
            total += nbytes
            hidden += nbytes * push.timeline.hidden(until)
        return {"layers": [layers[key] for key in sorted(layers)], "hidden": hidden / total if total else 1.0}


class ReceiverRanks:
    """Links and tickets of every rank."""

    def __init__(self, config: WorkerConfig, runner: Runner) -> None:
        layout = runner.layout()
        opened = open_engines(config, runner, "decode")
        self.engines = [engine for engine, _ in opened]
        self.receivers = [Receiver(engine, layout, rank, regions) for rank, (engine, regions) in enumerate(opened)]
        self._checksum = config.checksum
        self._answer_timeout = config.ticket_timeout

    async def connect(self, descriptors: Sequence[bytes], timeout: float) -> list[Link]:
        return list(await asyncio.gather(*(r.connect_async(descriptors, timeout) for r in self.receivers)))

    def announce(self, links: Sequence[Link], request_id: str) -> None:
        """Tells the prefiller that tickets will follow once there is room, or decline()."""
        for receiver, link in zip(self.receivers, links, strict=True):
            receiver.announce(link, request_id)

    def decline(self, links: Sequence[Link], request_id: str, reason: str) -> None:
        for receiver, link in zip(self.receivers, links, strict=True):
            receiver.decline(link, request_id, reason)

    def prepare(
        self,
        links: Sequence[Link],
        request_id: str,
        blocks: Sequence[int],
        first_token: int,
        num_tokens: int,
        timeout: float,
    ) -> RankTickets:
        tickets: list[Ticket] = []
        try:
            for receiver, link in zip(self.receivers, links, strict=True):
                ticket = receiver.prepare(
                    link,
                    request_id,
                    blocks,
                    num_tokens,
                    first_token=first_token,
                    checksum=self._checksum,
                    timeout=timeout,
                    answer_timeout=self._answer_timeout,
                )
                tickets.append(ticket)
        except BaseException:
            # Those that went out must come back before anybody frees the blocks.
            RankTickets(tickets).cancel("another rank's ticket could not be sent")
            if tickets:
                raise _Partly(tickets) from None
            raise
        return RankTickets(tickets)

    @property
    def open_tickets(self) -> int:
        return sum(receiver.open_tickets for receiver in self.receivers)

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        for engine in self.engines:
            engine.close()


class _Partly(RailwireError):
    """Some ranks' tickets are out, others could not be sent."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        super().__init__("the tickets could not be sent to all ranks")
        self.tickets = RankTickets(tickets)


class RankTickets:
    """The tickets of one request, of all ranks."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self.tickets = tickets

    async def arrived(self) -> tuple[float, int]:
        """Waits for all pages of all ranks; seconds and bytes.

        Raises:
            TicketError: of the first that failed; the others have been cancelled.
        """
        try:
            arrivals = await asyncio.gather(*(_ended(ticket) for ticket in self.tickets))
        except TicketError as error:
            self.cancel(f"another rank's ticket failed: {error}")
            raise
        return max(arrival.seconds for arrival in arrivals), sum(arrival.nbytes for arrival in arrivals)

    def cancel(self, reason: str) -> None:
        for ticket in self.tickets:
            ticket.cancel(reason)

    async def reusable(self) -> None:
        """Waits until nobody can write the pages any more."""
        await asyncio.gather(*(_ended(ticket.reusable) for ticket in self.tickets))


async def _ended(outcome: Any) -> Any:
    return await outcome


def partial_tickets(error: BaseException) -> RankTickets | None:
    """Tickets that went out although ``prepare()`` failed; their pages come back when they are reusable."""
    return error.tickets if isinstance(error, _Partly) else None
