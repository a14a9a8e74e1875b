"""The decode side in a worker: tickets for the requests that wait for their KV.

A request that stands in the scheduler's queue is announced to its prefiller; that is all, nothing is kept of it.

A request that has been scheduled: connecting (on a thread of the pool: handshakes never hold up a step) -> waiting (its
ticket is out) -> quiet (nobody can write its pages any more) -> reported, once. A cancel at any of these only hastens
the next.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from railwire.errors import RailwireError
from railwire.integrations.vllm.sending import expand
from railwire.integrations.vllm.stats import RailwireStats
from railwire.kvcache import Link, Receiver, Ticket, TicketCancelled

if TYPE_CHECKING:
    from railwire.integrations.vllm.options import Prefiller
    from railwire.integrations.vllm.steps import Announce, Decline, Receive, Step

log = init_logger("vllm.railwire")

_CONNECTORS = 8  # handshakes at a time; known prefillers take none

_Ranks = tuple[bytes, ...]


class _Receiving:
    def __init__(self, wanted: Receive) -> None:
        self.wanted = wanted
        self.began = time.monotonic()
        self.ticket: Ticket | None = None
        self.cancelled: str | None = None


class Receiving:
    """``begin`` and ``finished`` are called by vLLM's worker thread.

    Args:
        kernel_blocks: blocks of the tensors per block of the scheduler.
        answer_timeout, timeout: seconds, of each ticket, see ``receiver.prepare()``.
    """

    def __init__(
        self,
        receiver: Receiver,
        kernel_blocks: int,
        stats: RailwireStats,
        checksum: bool,
        answer_timeout: float,
        timeout: float,
    ) -> None:
        self.receiver = receiver
        self.kernel_blocks = kernel_blocks
        self.stats = stats
        self.checksum = checksum
        self.answer_timeout = answer_timeout
        self.timeout = timeout
        self._lock = threading.Lock()
        self._open: dict[str, _Receiving] = {}
        self._quiet: dict[str, BaseException | None] = {}
        # By prefiller, transfer ids by request: to be announced when the handshake is done.
        self._announcing: dict[_Ranks, dict[str, str]] = {}
        self._pool = ThreadPoolExecutor(_CONNECTORS, thread_name_prefix="railwire-connect")

    def begin(self, step: Step) -> None:
        for request_id, announce in step.announces.items():
            self._announce(request_id, announce)
        for wanted in step.receives:
            self._not_queued(wanted.request_id, wanted.prefiller)
            receiving = _Receiving(wanted)
            with self._lock:
                self._open[wanted.request_id] = receiving
            self._pool.submit(self._fetch, receiving)
        for request_id, reason in step.cancels.items():
            self._cancel(request_id, reason)
        for decline in step.declines:
            self._not_queued(decline.request_id, decline.prefiller)
            self._pool.submit(self._decline, decline)

    # ---- announcements -----------------------------------------------------------------------------------------------
    def _announce(self, request_id: str, announce: Announce) -> None:
        ranks = announce.prefiller.ranks
        with self._lock:
            waiting = self._announcing.get(ranks)
            if waiting is not None:
                waiting[request_id] = announce.transfer_id
                return
            self._announcing[ranks] = {request_id: announce.transfer_id}
        # One thread a prefiller: a queue full of requests for one that is dead must not hold up handshakes with others.
        self._pool.submit(self._announce_all, ranks)

    def _announce_all(self, ranks: _Ranks) -> None:
        link: Link | None = None
        try:
            link = self.receiver.connect(ranks)
        except (RailwireError, ValueError) as error:
            # Their tickets will fail with the same; until then the prefiller waits as for any decoder.
            log.info("railwire: requests cannot be announced: %s", error)
        finally:
            with self._lock:
                waiting = self._announcing.pop(ranks)
                if link is not None:
                    for transfer_id in waiting.values():
                        self.receiver.announce(link, transfer_id)

    def _not_queued(self, request_id: str, prefiller: Prefiller) -> None:
        """From here on there is no announcement any more: the prefiller must not get one after the ticket."""
        with self._lock:
            self._announcing.get(prefiller.ranks, {}).pop(request_id, None)

    # ---- tickets -----------------------------------------------------------------------------------------------------
    def _fetch(self, receiving: _Receiving) -> None:
        wanted = receiving.wanted
        try:
            link = self.receiver.connect(wanted.prefiller.ranks)
            with self._lock:
                if receiving.cancelled is not None:
                    # No ticket has told the prefiller; it would wait for one.
                    self.receiver.decline(link, wanted.transfer_id, receiving.cancelled)
                    raise TicketCancelled(receiving.cancelled, request_id=wanted.transfer_id)
                receiving.ticket = ticket = self.receiver.prepare(
                    link,
                    wanted.transfer_id,
                    expand(wanted.blocks, self.kernel_blocks),
                    wanted.num_tokens,
                    first_token=wanted.first_token,
                    checksum=self.checksum,
                    timeout=self.timeout,
                    answer_timeout=self.answer_timeout,
                )
        except (RailwireError, ValueError) as error:
            self._ended(receiving, error)  # no ticket went out: nobody knows these pages
        except BaseException as error:
            log.exception("railwire: request %s cannot be fetched", wanted.request_id)
            self._ended(receiving, error)
        else:
            # The pages are ours again when `reusable` has ended, which may be after the ticket.
            ticket.add_done_callback(
                lambda _: ticket.reusable.add_done_callback(lambda _: self._ended(receiving, ticket.exception()))
            )

    def _ended(self, receiving: _Receiving, error: BaseException | None) -> None:
        request_id = receiving.wanted.request_id
        if error is None and receiving.ticket is not None:
            arrival = receiving.ticket.wait(0)
            self.stats.received(arrival.nbytes, time.monotonic() - receiving.began)
        elif isinstance(error, TicketCancelled):
            self.stats.count("cancelled_receives")
        else:
            self.stats.count("failed_receives")
            log.warning("railwire: request %s: %s", request_id, error)
        with self._lock:
            del self._open[request_id]
            self._quiet[request_id] = error

    def _cancel(self, request_id: str, reason: str) -> None:
        with self._lock:
            receiving = self._open.get(request_id)
            if receiving is None:
                return  # reported, or about to be
            receiving.cancelled = reason
            ticket = receiving.ticket
        if ticket is not None:
            ticket.cancel(reason)

    def _decline(self, decline: Decline) -> None:
        try:
            self.receiver.decline(self.receiver.connect(decline.prefiller.ranks), decline.transfer_id, decline.reason)
        except (RailwireError, ValueError) as error:
            # Its own time-out lets the prefiller go.
            log.info("railwire: cannot decline %s: %s", decline.transfer_id, error)

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose pages nobody can write any more, and those of them that did not get their KV. Each once."""
        with self._lock:
            quiet, self._quiet = self._quiet, {}
        return set(quiet), {request_id for request_id, error in quiet.items() if error is not None}

    @property
    def open_requests(self) -> int:
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.receiver.close()
