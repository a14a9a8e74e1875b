"""The decode side in a worker: tickets for the requests that wait for their KV.

A request that stands in the scheduler's queue is announced to its prefiller. An announcement is worth no more than the
connection that it went over: it is repeated over the next one, which is made at once where the old one breaks.

A request that has been scheduled: connecting -> waiting (its ticket is out) -> quiet (nobody can write its pages any
more) -> reported, once. A cancel at any of these only hastens the next.

What is to be said to one prefiller (announcements, tickets, declines) stands in a queue of its own, served in order by
one thread of a pool: handshakes never hold up a step, a prefiller that does not answer holds up no other's requests,
and no announcement comes after its ticket.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from vllm.logger import init_logger

from railwire.errors import RailwireError
from railwire.integrations.vllm.sending import expand
from railwire.integrations.vllm.stats import RailwireStats
from railwire.kvcache import Link, Receiver, Ticket, TicketCancelled

if TYPE_CHECKING:
    from railwire.integrations.vllm.steps import Announce, Decline, Receive, Step

log = init_logger("vllm.railwire")

_PREFILLERS = 64  # at a time that do not answer; those that do take a thread for a moment only

_Ranks = tuple[bytes, ...]


class _Job(NamedTuple):
    """Something to be said to a prefiller."""

    run: Callable[[Link], None]
    failed: Callable[[BaseException], None]
    """Instead of ``run``, when it cannot be reached."""


def _unreachable(error: BaseException) -> None:
    # The tickets will fail, too; until then the prefiller waits as for any decoder.
    log.info("railwire: a prefiller cannot be told who comes: %s", error)


_NOTHING_MORE = _Job(lambda link: None, _unreachable)


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
        # By prefiller, the requests that stand in the queue here, each with the link over which it has been told so.
        self._coming: dict[_Ranks, dict[str, Link | None]] = {}
        self._watched: dict[_Ranks, Link] = {}
        self._closed = False
        # By prefiller, what is to be said to it. It is in here as long as a thread serves it.
        self._jobs: dict[_Ranks, list[_Job]] = {}
        self._pool = ThreadPoolExecutor(_PREFILLERS, thread_name_prefix="railwire-connect")

    def begin(self, step: Step) -> None:
        for announce in step.announces.values():
            self._announce(announce)
        for wanted in step.receives:
            self._receive(wanted)
        for request_id, reason in step.cancels.items():
            self._cancel(request_id, reason)
        for decline in step.declines:
            self._decline(decline)

    # ---- by prefiller ------------------------------------------------------------------------------------------------
    def _submit(self, ranks: _Ranks, job: _Job) -> None:
        with self._lock:
            queue = self._jobs.get(ranks)
            if queue is not None:
                queue.append(job)
                return
            self._jobs[ranks] = [job]
        self._pool.submit(self._serve, ranks)

    def _serve(self, ranks: _Ranks) -> None:
        """On a thread of the pool, until nothing is left to be said to this prefiller."""
        while True:
            link: Link | None = None
            error: BaseException | None = None
            try:
                link = self.receiver.connect(ranks)
            except BaseException as failure:
                error = failure
                if not isinstance(failure, RailwireError | ValueError):
                    log.exception("railwire: a prefiller cannot be connected")
            if link is not None:
                self._tell_who_comes(ranks, link)
            with self._lock:
                # With what has come in the meantime: a handshake in vain is not repeated for each of them.
                jobs, self._jobs[ranks] = self._jobs[ranks], []
            for job in jobs:
                try:
                    if link is not None:
                        job.run(link)
                    elif error is not None:
                        job.failed(error)
                except BaseException:  # the others must not be lost with it
                    log.exception("railwire: a prefiller cannot be told")
            with self._lock:
                if not self._jobs[ranks]:
                    del self._jobs[ranks]
                    return

    # ---- announcements and declines ----------------------------------------------------------------------------------
    def _announce(self, announce: Announce) -> None:
        ranks = announce.prefiller.ranks
        with self._lock:
            self._coming.setdefault(ranks, {})[announce.transfer_id] = None
        self._submit(ranks, _NOTHING_MORE)  # a connection is all that it takes

    def _comes(self, ranks: _Ranks, transfer_id: str) -> None:
        """What is said next says more than an announcement."""
        with self._lock:
            coming = self._coming.get(ranks, {})
            coming.pop(transfer_id, None)
            if not coming:
                self._coming.pop(ranks, None)

    def _tell_who_comes(self, ranks: _Ranks, link: Link) -> None:
        with self._lock:
            coming = self._coming.get(ranks, {})
            untold = [transfer_id for transfer_id, told in coming.items() if told is not link]
            coming.update(dict.fromkeys(untold, link))
            watch = bool(untold) and self._watched.get(ranks) is not link
            if watch:
                self._watched[ranks] = link
        for transfer_id in untold:
            self.receiver.announce(link, transfer_id)
        if watch:
            for source in link.sources:
                source.peer.lost.add_done_callback(lambda _: self._lost(ranks, link))

    def _lost(self, ranks: _Ranks, link: Link) -> None:
        with self._lock:
            if self._watched.get(ranks) is not link:
                return  # another rank of it was lost before
            del self._watched[ranks]
            if self._closed or ranks not in self._coming:
                return
        self._submit(ranks, _NOTHING_MORE)

    def _decline(self, decline: Decline) -> None:
        def failed(error: BaseException) -> None:
            # Its own time-out lets the prefiller go.
            log.info("railwire: cannot decline %s: %s", decline.transfer_id, error)

        job = _Job(lambda link: self.receiver.decline(link, decline.transfer_id, decline.reason), failed)
        self._comes(decline.prefiller.ranks, decline.transfer_id)
        self._submit(decline.prefiller.ranks, job)

    # ---- tickets -----------------------------------------------------------------------------------------------------
    def _receive(self, wanted: Receive) -> None:
        receiving = _Receiving(wanted)
        with self._lock:
            self._open[wanted.request_id] = receiving
        job = _Job(lambda link: self._fetch(link, receiving), lambda error: self._ended(receiving, error))
        self._comes(wanted.prefiller.ranks, wanted.transfer_id)
        self._submit(wanted.prefiller.ranks, job)

    def _fetch(self, link: Link, receiving: _Receiving) -> None:
        wanted = receiving.wanted
        try:
            with self._lock:
                if receiving.cancelled is not None:
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
        except BaseException as error:
            if not isinstance(error, RailwireError | ValueError):
                log.exception("railwire: request %s cannot be fetched", wanted.request_id)
            # No ticket went out: nobody knows these pages. The prefiller, which may have been told of us, would wait.
            try:
                self.receiver.decline(link, wanted.transfer_id, str(error))
            finally:
                self._ended(receiving, error)
            return
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
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.receiver.close()
