"""Random fault schedules: whatever fails, every page comes back, and none that came back is written again.

A state machine drives a decoder and two prefillers on a network that reorders and delays. Between the steps of
ordinary requests it aborts, cancels, fails work requests, stops and kills prefillers, and starts new ones. Free pages
hold a canary.

``RAILWIRE_FAULT_SCHEDULES`` sets the number of schedules (``make test-faults`` runs 10,000).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kv_bed import UNTOUCHED, Decoder, Prefiller, same, sim_nics

from railwire import RailwireError
from railwire.kvcache import Push, Ticket, paged_instance
from railwire.testing import SimulatedFabric

SCHEDULES = int(os.environ.get("RAILWIRE_FAULT_SCHEDULES", "60"))
LAYERS, BLOCKS, BLOCK_TOKENS = 2, 16, 4
LAYOUT = paged_instance(
    stages=[range(LAYERS)],
    model="m",
    num_blocks=BLOCKS,
    block_tokens=BLOCK_TOKENS,
    kv_heads=1,
    head_bytes=16,
    kv="last",
    placement="one",
)
PAGE = LAYOUT.ranks[0].layers[0].storages[0].page_stride
LIVENESS = 0.25


def pages_of(decoder: Decoder, block: int) -> list[np.ndarray[Any, Any]]:
    """The bytes of one block in every layer."""
    memory = decoder.regions[0][0].array
    found = []
    for layer in LAYOUT.ranks[0].layers:
        base = min(storage.offset for storage in layer.storages)
        found.append(memory[base + block * PAGE : base + (block + 1) * PAGE])
    return found


@dataclass
class Worker:
    """A prefiller and its page pool."""

    name: str
    prefiller: Prefiller
    free: set[int] = field(default_factory=lambda: set(range(BLOCKS)))
    alive: bool = True
    frozen: bool = False
    gone: bool = False
    """Its process has ended: there is nobody to ask any more."""

    def idle(self) -> bool:
        sender = self.prefiller.senders[0]
        return sender.open_pushes == sender.open_tickets == sender.announced == 0


@dataclass
class Coming:
    """A request that the decoder has announced, and has not asked for yet."""

    worker: Worker
    request_id: str
    push: Push | None = None
    src: list[int] = field(default_factory=list)


@dataclass
class Job:
    worker: Worker
    ticket: Ticket
    tokens: int
    dst: list[int]
    push: Push | None = None
    src: list[int] = field(default_factory=list)
    end: int = 0
    given_back: bool = False
    source_back: bool = False

    def state(self) -> str:
        """For the message of a failure."""
        deliveries = [] if self.push is None else [(d.state, d.under_way, d.reason) for d in self.push.deliveries]
        return f"{self.ticket}, reusable {self.ticket.reusable.done()}, {self.push} {deliveries} on {self.worker.name}"


def choose(pick: int, jobs: list[Job]) -> Job | None:
    """What is drawn must not depend on what the threads have done meanwhile; what it means may."""
    return jobs[pick % len(jobs)] if jobs else None


class Faults(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**31),
        delay=st.sampled_from([0.0, 500.0, 20_000.0]),
        proves=st.booleans(),
        patience=st.sampled_from([0.01, LIVENESS]),
    )
    def begin(self, seed: int, delay: float, proves: bool, patience: float) -> None:
        """``patience``: short enough, and the decoder cuts off prefillers that were only slow, again and again."""
        self.fabric = SimulatedFabric(
            seed=seed, reorder=True, max_delay_us=delay, completion_proves_landing=proves, link_depth=4
        )
        self.made = 0
        self.patience = patience
        self.decoder = Decoder(LAYOUT, sim_nics(self.fabric, "d", 1), drain_timeout=patience, max_tickets=8)
        self.free = set(range(BLOCKS))
        self.workers = [self._worker(), self._worker()]
        self.jobs: list[Job] = []
        self.coming: list[Coming] = []
        self.ids = 0

    def _worker(self) -> Worker:
        self.made += 1
        name = f"p{self.made}-"
        nics = sim_nics(self.fabric, name, 1)
        return Worker(f"{name}0.0", Prefiller(LAYOUT, nics, fill=self.made, ticket_timeout=1.0))

    # ---- ordinary life -----------------------------------------------------------------------------------------------
    @rule(which=st.integers(0, 1), tokens=st.integers(1, 12), skip=st.booleans())
    def request(self, which: int, tokens: int, skip: bool) -> None:
        worker = self.workers[which]
        count = -(-tokens // BLOCK_TOKENS)
        if len(self.free) < count or len(self.jobs) >= 8 or not worker.alive:
            return
        dst = [self.free.pop() for _ in range(count)]
        self.ids += 1
        first = BLOCK_TOKENS if skip and tokens > BLOCK_TOKENS else 0
        try:
            receiver = self.decoder.receivers[0]
            link = receiver.connect(worker.prefiller.descriptors, timeout=LIVENESS)
            ticket = receiver.prepare(link, f"r{self.ids}", dst, tokens, first_token=first, timeout=2.0)
        except RailwireError:
            self.free.update(dst)  # nothing has gone out
            return
        self.jobs.append(Job(worker, ticket, tokens, dst))

    def _unbegun(self) -> list[Job]:
        """Without those of workers that are gone, whose tickets may take a moment yet to end."""
        return [job for job in self.jobs if job.push is None and not job.worker.gone]

    @rule(pick=st.integers(0, 999))
    def prefill_begins(self, pick: int) -> None:
        job = choose(pick, self._unbegun())
        if job is None:
            return
        worker, count = job.worker, -(-job.tokens // BLOCK_TOKENS)
        if len(worker.free) < count:
            return
        job.src = [worker.free.pop() for _ in range(count)]
        job.push = worker.prefiller.open(job.ticket.request_id, job.tokens, job.src)[0]

    @rule(pick=st.integers(0, 999))
    def prefill_is_queued(self, pick: int) -> None:
        """It will be begun, or refused at the end."""
        job = choose(pick, self._unbegun())
        if job is not None:
            job.worker.prefiller.senders[0].expect(job.ticket.request_id)

    @rule(which=st.integers(0, 1), tokens=st.integers(1, 12), begun=st.booleans())
    def decoder_announces(self, which: int, tokens: int, begun: bool) -> None:
        worker, count = self.workers[which], -(-tokens // BLOCK_TOKENS)
        if len(worker.free) < count or len(self.coming) >= 4 or not worker.alive:
            return
        self.ids += 1
        coming = Coming(worker, f"r{self.ids}")
        try:
            receiver = self.decoder.receivers[0]
            receiver.announce(receiver.connect(worker.prefiller.descriptors, timeout=LIVENESS), coming.request_id)
        except RailwireError:
            return
        if begun:
            coming.src = [worker.free.pop() for _ in range(count)]
            coming.push = worker.prefiller.open(coming.request_id, tokens, coming.src)[0]
        self.coming.append(coming)

    @rule(pick=st.integers(0, 999))
    def decoder_declines(self, pick: int) -> None:
        if self.coming:
            self._declines(self.coming[pick % len(self.coming)])

    def _declines(self, coming: Coming) -> None:
        receiver = self.decoder.receivers[0]
        with receiver.lock:
            links = list(receiver._links.values())
        for link in links:  # what is not connected has been forgotten there, or is about to be
            if link.instance == coming.worker.prefiller.senders[0].instance_id:
                receiver.decline(link, coming.request_id)
        if coming.push is None:
            self.coming.remove(coming)

    @rule(pick=st.integers(0, 999), share=st.floats(0, 1), layers=st.sampled_from([[0], [0, 1]]))
    def computed(self, pick: int, share: float, layers: list[int]) -> None:
        job = choose(pick, [job for job in self.jobs if job.push is not None])
        if job is None:
            return
        job.end = max(job.end, round(share * job.tokens))
        for layer in layers:
            assert job.push is not None
            job.push.layer_ready(layer, job.end)

    @rule(which=st.integers(0, 1), tokens=st.integers(1, 12), share=st.floats(0.3, 1), wait=st.sampled_from([0, 30]))
    def request_under_way(self, which: int, tokens: int, share: float, wait: int) -> None:
        """Straight to where it is dangerous: its pages are on their way."""
        before = len(self.jobs)
        self.request(which, tokens, False)
        if len(self.jobs) == before:
            return
        job = self.jobs[-1]
        self.prefill_begins(self._unbegun().index(job))
        if job.push is None:
            return
        time.sleep(wait / 1e3)  # the ticket reaches the prefiller
        job.end = round(share * tokens)
        for layer in range(LAYERS):
            job.push.layer_ready(layer, job.end)

    @rule(milliseconds=st.sampled_from([0, 1, 5, 20]))
    def time_passes(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1e3)

    # ---- faults ------------------------------------------------------------------------------------------------------
    @rule(pick=st.integers(0, 999))
    def decoder_cancels(self, pick: int) -> None:
        job = choose(pick, self.jobs)
        if job is not None:
            job.ticket.cancel()

    @rule(pick=st.integers(0, 999))
    def prefiller_aborts(self, pick: int) -> None:
        job = choose(pick, [job for job in self.jobs if job.push is not None])
        if job is None:
            return
        assert job.push is not None
        job.push.abort("aborted")

    @rule(which=st.integers(0, 1), status=st.sampled_from(["remote_access", "unreachable", "local", "other"]))
    def work_request_fails(self, which: int, status: Any) -> None:
        self.fabric.fail_next(self.workers[which].name, 1, status)

    @rule(which=st.integers(0, 1))
    def prefiller_stops_or_goes_on(self, which: int) -> None:
        worker = self.workers[which]
        if not worker.alive:
            return
        worker.frozen = not worker.frozen
        (self.fabric.freeze if worker.frozen else self.fabric.thaw)(worker.name)

    @rule(which=st.integers(0, 1))
    def decoder_gives_it_up(self, which: int) -> None:
        """As if it had not been heard for too long; the next request connects anew."""
        receiver = self.decoder.receivers[0]
        instance = self.workers[which].prefiller.senders[0].instance_id
        with receiver.lock:
            links = [link for link in receiver._links.values() if link.instance == instance]
        for link in links:
            receiver.fence(link.sources[0].peer)

    @rule(which=st.integers(0, 1), tokens=st.integers(1, 12))
    def cut_off_while_it_stops(self, which: int, tokens: int) -> None:
        """Going on, it knows nothing of that, has pages in hand, and is connected to anew."""
        worker = self.workers[which]
        if not worker.alive or worker.frozen or self.patience == LIVENESS:
            return
        self.fabric.freeze(worker.name)
        self.decoder_gives_it_up(which)
        time.sleep(4 * self.patience)
        self.pages_come_back_and_stay_untouched()
        self.fabric.thaw(worker.name)
        self.request(which, tokens, False)
        for job in self.jobs:
            if job.worker is worker and job.push is not None:
                for layer in range(LAYERS):
                    job.push.layer_ready(layer, job.tokens)

    @rule(which=st.integers(0, 1))
    def prefiller_dies(self, which: int) -> None:
        worker = self.workers[which]
        if worker.alive:
            if worker.frozen:  # a NIC that is frozen for ever gives no work request back: that is no death of a process
                worker.frozen = False
                self.fabric.thaw(worker.name)
            self.fabric.kill(worker.name)
            worker.alive = False

    @rule(which=st.integers(0, 1))
    def prefiller_restarts(self, which: int) -> None:
        if not self.workers[which].alive and self.made < 5:
            self._gone(self.workers[which])
            self.workers[which] = self._worker()

    # ---- what must hold ----------------------------------------------------------------------------------------------
    @invariant()
    def pages_come_back_and_stay_untouched(self) -> None:
        if not hasattr(self, "jobs"):
            return
        for job in list(self.jobs):
            self._take_back(job)
        for coming in list(self.coming):
            self._take_back_announced(coming)
        for block in self.free:
            for page in pages_of(self.decoder, block):
                assert (page == UNTOUCHED).all(), f"block {block} was given back, and written"

    def _take_back_announced(self, coming: Coming) -> None:
        if coming.push is not None and coming.push.done.done():
            coming.worker.free.update(coming.src)
            self.coming.remove(coming)

    def _take_back(self, job: Job) -> None:
        if job.ticket.reusable.done() and not job.given_back:
            if job.ticket.done() and job.ticket.exception() is None:
                tokens = range(job.ticket.first_token, job.tokens)
                # The source may have been given back and is not written here, so it still holds what was sent.
                assert same(job.worker.prefiller, self.decoder, job.src, job.dst, tokens)
            for block in job.dst:
                for page in pages_of(self.decoder, block):
                    page[:] = UNTOUCHED
            self.free.update(job.dst)
            job.given_back = True
        if job.push is not None and job.push.done.done() and not job.source_back:
            job.worker.free.update(job.src)
            job.source_back = True
        if job.given_back and (job.source_back or job.push is None):
            self.jobs.remove(job)
            if job.push is None:  # whoever has it in a queue takes it out
                job.worker.prefiller.senders[0].refuse(job.ticket.request_id, "its ticket has ended")

    def _gone(self, worker: Worker) -> None:
        """A worker's process has ended: its pages went with it."""
        for job in self.jobs:
            if job.worker is worker and not job.source_back and job.push is not None:
                job.push.abort("gone")
        for coming in self.coming:
            if coming.worker is worker and coming.push is not None:
                coming.push.abort("gone")
        worker.gone = True
        worker.prefiller.close()

    def teardown(self) -> None:
        if not hasattr(self, "jobs"):
            return
        try:
            for worker in self.workers:
                if worker.frozen and worker.alive:
                    self.fabric.thaw(worker.name)
            for job in self.jobs:
                if job.push is None:
                    job.worker.prefiller.senders[0].refuse(job.ticket.request_id, "the end")
                else:
                    job.push.abort("the end")
            for coming in list(self.coming):
                if coming.worker.alive:
                    self._declines(coming)
                elif coming.push is not None:
                    coming.push.abort("the end")
                else:
                    self.coming.remove(coming)
            self._until(lambda: not self.jobs and not self.coming, "every ticket and push ends")
            self._until(self.decoder.idle, "every slot comes back")
            assert self.free == set(range(BLOCKS))
            for worker in self.workers:
                assert worker.free == set(range(BLOCKS))
                self._until(worker.idle, "senders are empty")
        finally:
            for worker in self.workers:
                worker.prefiller.close()
            self.decoder.close()
            self.fabric.close()

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(2000):  # 10 s; counted, because a machine that stands still for longer is no failure of ours
            self.pages_come_back_and_stay_untouched()
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError(f"{what}: {[job.state() for job in self.jobs]}")


TestFaults = Faults.TestCase
TestFaults.settings = settings(
    max_examples=SCHEDULES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
