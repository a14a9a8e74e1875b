"""A trainer rank: what its user calls at every step. Imports torch."""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from railwire.errors import RailwireError
from railwire.memory import RemoteRegion
from railwire.weights import messages
from railwire.weights.cohort import CohortInfo, ReceiverInfo, TrainerInfo, member, pack, unpack
from railwire.weights.errors import PlanError, RendezvousError, UpdateError, WeightsError
from railwire.weights.lead import LeadShell
from railwire.weights.meeting import await_peers
from railwire.weights.plan import Plan
from railwire.weights.rendezvous import Rendezvous
from railwire.weights.source import Rename, Source, describe
from railwire.weights.writing import Outcome, Span, Target, Work, Writer

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer

log = logging.getLogger("railwire.weights")


@dataclass(frozen=True)
class Report:
    """An update that was published, as this rank saw it.

    Attributes:
        seconds: from the call to the end, when every receiver serves the version.
        nbytes: that this rank wrote, by receiver.
        spans: this rank's timeline.
    """

    version: int
    seconds: float
    nbytes: Mapping[str, int]
    spans: list[Span] = field(repr=False)


class Trainer:
    """One trainer rank. All ranks make one, and call :meth:`update` alike.

    Args:
        engine: of this rank, which the trainer takes over the messages of.
        parameters: by name, or what :func:`railwire.weights.source.describe` or ``describe_boxes`` made of them.
        rank, world_size: None: those of ``torch.distributed``, or 0 of 1.
        epoch: number of this life of the trainer job, the same on all ranks, higher than that of an earlier life. None:
            rank 0 takes the next one, and tells the others over ``torch.distributed``.
        rename: from the trainer's names to the checkpoint's.
        staging_bytes: watermark of what is converted or gathered on the way.
        allow_extra: parameters that no receiver wants may stay at home.
        timeout: seconds that a phase of an update may take.
        plan: rank 0: one that was saved; made anew where it does not fit.
        checksum: compare what has landed with what was written, before a version is published; the same on all ranks.
            Costs reading everything once on either side, on a CPU.
    """

    def __init__(
        self,
        engine: TransferEngine,
        rendezvous: Rendezvous,
        parameters: Source | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        rank: int | None = None,
        world_size: int | None = None,
        epoch: int | None = None,
        rename: Rename | None = None,
        staging_bytes: int = 1 << 30,
        allow_extra: bool = False,
        timeout: float = 300.0,
        plan: Plan | None = None,
        checksum: bool = False,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = (torch.distributed.get_rank() if distributed else 0) if rank is None else rank
        size = (torch.distributed.get_world_size() if distributed else 1) if world_size is None else world_size
        if not 0 <= self.rank < size:
            raise ValueError(f"rank {self.rank} of {size} cannot be")
        self._engine, self._rendezvous, self._timeout = engine, rendezvous, timeout
        self.epoch = _epoch(rendezvous, self.rank, size, epoch, distributed)
        source = (
            parameters
            if isinstance(parameters, Source)
            else describe(f"trainer {self.rank}", parameters, rename=rename)
        )
        self._writer = Writer(engine, source, staging_bytes, checksum=checksum)
        self._inbox: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
        self._works: dict[int, Work] = {}
        self._addresses: dict[str, bytes] = {}
        self._lead: LeadShell | None = None
        self._lead_peer: Peer | None = None
        self._stopped = 0
        self._ended = ""  # why there will be no update any more
        info = TrainerInfo(self.rank, bytes(engine.address), engine.incarnation.hex(), source.table.encode())
        rendezvous.put(f"{self.epoch}/trainers/{self.rank}", pack(info))
        engine.on_message(self._on_message)
        if self.rank == 0:
            self._lead = LeadShell(
                engine,
                rendezvous,
                self.epoch,
                size,
                self._tell,
                timeout=timeout,
                allow_extra=allow_extra,
                plan=plan,
                checksum=checksum,
            )
            self._trainer_peers: dict[int, Peer] = {}
            self._await_trainers()
        else:
            self._lead_peer = engine.connect(rendezvous.get(f"{self.epoch}/lead", timeout), timeout)
            self._lead_peer.lost.add_done_callback(self._lead_lost)

    # ---- for the user ------------------------------------------------------------------------------------------------
    def await_receivers(self, count: int, timeout: float = 120.0) -> None:
        """Rank 0 waits until so many receivers have joined, since an update goes to those who are there."""
        if self._lead is not None:
            self._lead.await_receivers(count, timeout)

    def update(self, version: int, *, progress: Callable[[int, int], object] | None = None) -> Report:
        """Publishes the parameters as they are now. Collective over the trainers; returns when every receiver serves
        the version. The parameters must not change meanwhile.

        Args:
            version: higher than any that was published.
            progress: is called with this rank's bytes submitted and bytes in all.

        Raises:
            UpdateError: nobody serves the version; says which rank failed. The next update starts clean.
        """
        return self._update(version, progress, only_new=False)

    def welcome(self, version: int) -> Report:
        """Gives the published version to those receivers that have joined since. Collective, as :meth:`update`; the
        parameters must still be those of that version. Receivers that have it go on serving meanwhile.

        Raises:
            UpdateError: another version is published, or a rank failed.
        """
        return self._update(version, None, only_new=True)

    def _update(self, version: int, progress: Callable[[int, int], object] | None, *, only_new: bool) -> Report:
        began = time.monotonic()
        if self._ended:
            raise UpdateError(version, [self._ended])
        if self._lead is not None:
            self._lead.start(version, only_new)
        outcome = Outcome({}, (), {}, [])
        deadline = time.monotonic() + 6 * self._timeout
        while True:
            try:
                message = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise UpdateError(version, ["the lead says nothing: has rank 0 called update()?"]) from None
            match message:
                case messages.Prepare(_, attempt, cohorts):
                    self._prepare(attempt, version, cohorts)
                case messages.Go(_, attempt, imms):
                    outcome = self._write(attempt, imms, progress)
                case messages.Stop(attempt):
                    pass  # it came after we had finished
                case messages.End(ended, _, problems):
                    if 0 <= ended < version:
                        continue  # the lead has given up an earlier version, and is on its way to ours
                    if problems:
                        raise UpdateError(version, problems)
                    return Report(version, time.monotonic() - began, outcome.nbytes, outcome.spans)

    @property
    def receivers(self) -> tuple[str, ...]:
        """Rank 0: who takes part."""
        return self._lead.receivers() if self._lead is not None else ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Rank 0: of each cohort of receivers, to be looked at or saved."""
        return tuple(self._lead.plans) if self._lead is not None else ()

    @property
    def staging_high_water(self) -> int:
        """The most bytes that were converted or gathered at a time."""
        return self._writer.high_water

    def close(self) -> None:
        """Ends the lead's thread; the engine stays the user's."""
        self._engine.on_message(None)
        if self._lead is not None:
            self._lead.close()

    # ---- the update --------------------------------------------------------------------------------------------------
    def _prepare(self, attempt: int, version: int, cohorts: tuple[int, ...]) -> None:
        problem = ""
        try:
            for number in cohorts:
                if number not in self._works:
                    self._works[number] = self._load(number)
            for number in list(self._works):
                if number not in cohorts:
                    del self._works[number]
        except (WeightsError, RailwireError, ValueError) as error:
            problem = str(error)
        for work in self._works.values():
            for target in work.targets:
                # One that cannot be reached is found out by the receiver, or is about to be lost.
                with contextlib.suppress(RailwireError):
                    self._engine.connect(self._addresses[target.name], self._engine.liveness)
        self._answer(messages.Arrived(version, attempt, problem[:1000]))

    def _load(self, number: int) -> Work:
        cohort = unpack(self._rendezvous.get(f"{self.epoch}/cohorts/{number}", self._timeout), CohortInfo)
        assert isinstance(cohort, CohortInfo)
        plan = Plan.load(self._rendezvous.get(f"{self.epoch}/cohorts/{number}/{self.rank}", self._timeout))
        targets = []
        for slot in cohort.receivers:
            info = unpack(self._rendezvous.get(f"{self.epoch}/receivers/{slot}"), ReceiverInfo)
            assert isinstance(info, ReceiverInfo)
            key = member(info.name, slot)
            self._addresses[key] = info.address
            targets.append(Target(key, tuple(RemoteRegion.from_bytes(d) for d in info.descriptors)))
        return self._writer.bind(plan, self.rank, targets)

    def _write(self, attempt: int, imms: Mapping[str, int], progress: Callable[[int, int], object] | None) -> Outcome:
        outcome = self._writer.run(
            tuple(self._works.values()), imms, stopped=lambda: self._stopped >= attempt, progress=progress
        )
        failed = {name: why[:300] for name, why in outcome.failed.items()}
        self._answer(messages.Wrote(attempt, failed, outcome.unquiet, dict(outcome.checksums)))
        return outcome

    def _answer(self, message: messages.Message) -> None:
        if self._lead is not None:
            self._lead.message(None, self.rank, message)
        elif self._lead_peer is not None:
            with contextlib.suppress(RailwireError):
                self._engine.send(self._lead_peer, messages.encode(message))

    # ---- messages, on the dispatcher ---------------------------------------------------------------------------------
    def _on_message(self, peer: Peer, data: bytes) -> None:
        try:
            message = messages.decode(data)
        except ValueError as error:
            log.warning("trainer %d: dropped a message of %s: %s", self.rank, peer.name, error)
            return
        if self._lead is not None:
            self._lead.message(peer, None, message)
        elif self._lead_peer is not None and peer.incarnation == self._lead_peer.incarnation:
            self._take(message)

    def _take(self, message: messages.Message) -> None:
        if isinstance(message, messages.Stop):
            self._stopped = max(self._stopped, message.attempt)
        self._inbox.put(message)

    def _tell(self, rank: int, message: messages.Message) -> None:
        """The lead speaks to a trainer."""
        if rank == self.rank:
            self._take(message)
            return
        peer = self._trainer_peers.get(rank)
        if peer is not None:
            with contextlib.suppress(RailwireError):  # its loss follows
                self._engine.send(peer, messages.encode(message))

    def _await_trainers(self) -> None:
        lead = self._lead
        assert lead is not None
        ranks = {incarnation: rank for incarnation, rank in lead.rank_of.items() if rank}
        for incarnation, peer in await_peers(self._engine, ranks, self._timeout).items():
            self._trainer_peers[ranks[incarnation]] = peer
            peer.lost.add_done_callback(lambda why, key=incarnation: lead.peer_lost(key, why))  # type: ignore[misc]

    def _lead_lost(self, why: str) -> None:
        self._stopped = 1 << 62
        self._ended = f"rank 0, which leads, is lost: {why}"
        self._inbox.put(messages.End(-1, -1, (self._ended,)))


def _epoch(rendezvous: Rendezvous, rank: int, size: int, given: int | None, distributed: bool) -> int:
    if given is not None:
        if rank == 0:
            while rendezvous.count("epoch") < given:
                rendezvous.number("epoch")
        return given
    if size == 1:
        return rendezvous.number("epoch")
    if not distributed:
        raise RendezvousError("several trainer ranks without torch.distributed need epoch=")
    told = [rendezvous.number("epoch") if rank == 0 else 0]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


__all__ = ["PlanError", "Report", "Trainer"]
