"""The lead's shell: carries out what the :class:`~railwire.weights.lead_machine.Lead` machine says, in trainer rank 0.

It alone looks for new receivers, computes plans, and records decisions. Everything happens on its loop's thread.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from railwire.errors import RailwireError
from railwire.weights import lead_machine, messages
from railwire.weights.cohort import (
    CohortInfo,
    PublishedInfo,
    ReceiverInfo,
    TrainerInfo,
    member,
    name_of,
    pack,
    table_of,
    unpack,
)
from railwire.weights.errors import PlanError, RendezvousError, WeightsError
from railwire.weights.loop import Loop
from railwire.weights.meeting import await_peers
from railwire.weights.plan import Plan, compute
from railwire.weights.rendezvous import Rendezvous
from railwire.weights.tables import RankTable

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer

log = logging.getLogger("railwire.weights")


class LeadShell:
    """Made by trainer rank 0.

    Args:
        tell: delivers a message to the trainer of a rank.
        timeout: seconds that each phase of an update may take.
        plan: a plan that was saved; used where it fits those who take part.
    """

    def __init__(
        self,
        engine: TransferEngine,
        rendezvous: Rendezvous,
        epoch: int,
        world_size: int,
        tell: Callable[[int, messages.Message], None],
        *,
        timeout: float,
        allow_extra: bool,
        plan: Plan | None = None,
        checksum: bool = False,
    ) -> None:
        self._engine, self._rendezvous, self._epoch = engine, rendezvous, epoch
        self._tell, self._timeout, self._allow_extra, self._given = tell, timeout, allow_extra, plan
        self._checksum = checksum
        self.trainers: dict[int, TrainerInfo] = {}
        self._tables: list[RankTable] = []
        for rank in range(world_size):
            info = unpack(rendezvous.get(f"{epoch}/trainers/{rank}", timeout), TrainerInfo)
            assert isinstance(info, TrainerInfo)
            self.trainers[rank] = info
            self._tables.append(table_of(info))
        self.rank_of = {info.incarnation: rank for rank, info in self.trainers.items()}
        self._machine = lead_machine.Lead(
            {rank: info.incarnation for rank, info in self.trainers.items()}, checksum=checksum
        )
        self._peers: dict[str, Peer] = {}
        self._slots: set[int] = set()
        self._cohort_members: dict[int, set[str]] = {}
        self.plans: list[Plan] = []
        self._seen: tuple[str, int] = ("idle", 0)
        self._loop = Loop("railwire-weights-lead", self._late)
        checkpoint: dict[str, tuple[tuple[int, ...], str]] = {}
        for table in self._tables:
            checkpoint |= table.names
            checkpoint |= {name: table.names[to] for name, to in table.tied.items() if to in table.names}
        rendezvous.put(f"{epoch}/lead", bytes(engine.address))
        rendezvous.put(f"{epoch}/checkpoint", msgspec.msgpack.encode(checkpoint))

    # ---- for the lead's own trainer ----------------------------------------------------------------------------------
    def receivers(self) -> tuple[str, ...]:
        """Names of the receivers that take part."""
        return tuple(name_of(key) for key in self._machine.receivers)

    def await_receivers(self, count: int, timeout: float) -> None:
        """Raises RendezvousError unless so many have joined in time."""
        deadline = time.monotonic() + timeout
        while True:
            found = self._rendezvous.count(f"{self._epoch}/receivers")
            if sum(self._rendezvous.has(f"{self._epoch}/receivers/{slot}") for slot in range(1, found + 1)) >= count:
                return
            if time.monotonic() > deadline:
                raise RendezvousError(f"{found} of {count} receivers have joined within {timeout:g} s")
            time.sleep(0.05)

    def start(self, version: int, only_new: bool = False) -> None:
        """Begins an update. Its end is told to every trainer."""
        self._loop.soon(lambda: self._start(version, only_new))

    def peer_lost(self, incarnation: str, reason: str) -> None:
        def do() -> None:
            rank = self.rank_of.get(incarnation)
            if rank is not None:
                self._do(self._machine.trainer_lost(rank, reason))

        self._loop.soon(do)

    def message(self, peer: Peer | None, rank: int | None, message: messages.Message) -> None:
        """From a receiver or a trainer; ``rank`` where it is our own."""
        self._loop.soon(lambda: self._handle(peer, rank, message))

    def close(self) -> None:
        self._loop.close()

    # ---- on the loop -------------------------------------------------------------------------------------------------
    def _start(self, version: int, only_new: bool) -> None:
        try:
            self._welcome()
        except (WeightsError, RailwireError) as error:
            problem = f"receivers that joined cannot be planned for: {error}"
            for rank in self.trainers:
                self._tell(rank, messages.End(version, self._machine.attempt, (problem,)))
            return
        self._do(self._machine.start(version, only_new=only_new))

    def _welcome(self) -> None:
        """Plans for the receivers that have joined since the last update."""
        count = self._rendezvous.count(f"{self._epoch}/receivers")
        fresh: list[tuple[int, ReceiverInfo, Peer]] = []
        for slot in range(1, count + 1):
            if slot in self._slots or not self._rendezvous.has(f"{self._epoch}/receivers/{slot}"):
                continue
            self._slots.add(slot)
            try:
                info = unpack(self._rendezvous.get(f"{self._epoch}/receivers/{slot}"), ReceiverInfo)
                assert isinstance(info, ReceiverInfo)
                table_of(info)
                peer = await_peers(self._engine, [info.incarnation], self._engine.liveness)[info.incarnation]
            except (WeightsError, RailwireError) as error:
                log.warning("receiver in slot %d is left out: %s", slot, error)
                continue
            fresh = [one for one in fresh if one[1].name != info.name]  # it has come back meanwhile
            fresh.append((slot, info, peer))
        if not fresh:
            return
        try:
            plan = self._plan([table_of(info) for _, info, _ in fresh])
        except PlanError:
            self._slots -= {slot for slot, _, _ in fresh}  # who does not leave keeps the update from succeeding
            raise
        number = len(self.plans)
        cohort = CohortInfo(plan.digest, tuple(slot for slot, _, _ in fresh))
        for rank in self.trainers:
            self._rendezvous.put(f"{self._epoch}/cohorts/{number}/{rank}", plan.only(rank).encode())
        self._rendezvous.put(f"{self._epoch}/cohorts/{number}", pack(cohort))
        arrivals = plan.arrivals()
        for index, (slot, info, peer) in enumerate(fresh):
            self._rendezvous.put(f"{self._epoch}/receivers/{slot}/plan", plan.into(index).encode())
            self._rendezvous.put(f"{self._epoch}/receivers/{slot}/cohort", pack(cohort))
            name = member(info.name, slot)
            for other in [key for key in self._machine.receivers if name_of(key) == info.name]:
                self._do(self._machine.receiver_lost(other))  # an earlier life of it
            self._peers[name] = peer
            self._machine.join(
                name,
                plan.digest,
                {self.trainers[rank].incarnation: int(arrivals[rank, index]) for rank in self.trainers},
            )
            peer.lost.add_done_callback(
                lambda why, name=name, peer=peer: self._loop.soon(lambda: self._receiver_lost(name, peer))  # type: ignore[misc]
            )
        self.plans.append(plan)
        self._cohort_members[number] = {member(info.name, slot) for slot, info, _ in fresh}
        self._set_cohorts()

    def _plan(self, destinations: list[RankTable]) -> Plan:
        plan = self._given
        if plan is not None:
            self._given = None
            fresh = compute(self._tables, destinations, allow_extra=self._allow_extra, prove=False)
            if fresh.digest == plan.digest:
                return plan
            log.warning("the saved plan %s is of other trainers or receivers: made anew", plan.digest.hex()[:8])
        return compute(self._tables, destinations, allow_extra=self._allow_extra)

    def _set_cohorts(self) -> None:
        members = set(self._machine.receivers)
        self._machine.cohorts = tuple(n for n, names in self._cohort_members.items() if names & members)

    def _receiver_lost(self, name: str, peer: Peer) -> None:
        if self._peers.get(name) is peer:
            log.info("receiver %s has left: %s", name, peer.lost.wait(0))
            del self._peers[name]
            self._do(self._machine.receiver_lost(name))
            self._set_cohorts()

    def _dismiss(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        self._set_cohorts()
        if peer is not None:
            log.warning("receiver %s did not answer in time: it is left out until it joins again", name)
            with contextlib.suppress(RailwireError):
                peer.close_async()  # nobody waits: one that has stopped takes its time

    def _late(self) -> None:
        self._do(self._machine.timed_out())

    def _handle(self, peer: Peer | None, rank: int | None, message: messages.Message) -> None:
        machine = self._machine
        if rank is None and peer is not None:
            rank = self.rank_of.get(peer.incarnation.hex())
        if rank is not None:
            match message:
                case messages.Arrived(version, attempt, problem):
                    self._do(machine.arrived(rank, version, attempt, problem))
                case messages.Wrote():
                    self._do(machine.wrote(rank, message))
            return
        name = next((n for n, p in self._peers.items() if peer is not None and p.incarnation == peer.incarnation), None)
        if name is None:
            return
        match message:
            case messages.Ready(attempt, imm):
                self._do(machine.ready(name, attempt, imm))
            case messages.Has(attempt):
                self._do(machine.has(name, attempt))
            case messages.Refused(attempt, reason) | messages.Broken(attempt, reason):
                self._do(machine.refused(name, attempt, reason))
            case messages.Landed(attempt, checksum):
                self._do(machine.landed(name, attempt, checksum))
            case messages.Published(attempt):
                self._do(machine.published_by(name, attempt))
            case messages.Aborted(attempt):
                self._do(machine.aborted(name, attempt))

    def _do(self, actions: list[lead_machine.LeadAction]) -> None:
        for action in actions:
            match action:
                case lead_machine.ToReceiver(name, message):
                    peer = self._peers.get(name)
                    if peer is not None:
                        with contextlib.suppress(RailwireError):  # its loss follows
                            self._engine.send(peer, messages.encode(message))
                case lead_machine.ToTrainer(rank, message):
                    self._tell(rank, message)
                case lead_machine.Decide(version, attempt):
                    self._decide(version, attempt)
                case lead_machine.Dismiss(name):
                    self._dismiss(name)
                case lead_machine.Done():
                    pass
        machine = self._machine
        if (machine.phase, machine.attempt) != self._seen:
            self._seen = (machine.phase, machine.attempt)
            self._loop.set_deadline(None if machine.phase == "idle" else self._timeout)

    def _decide(self, version: int, attempt: int) -> None:
        try:
            self._rendezvous.put(f"{self._epoch}/decision/{version}.{attempt}", b"published")
            recorded = True
        except RendezvousError as error:
            log.error("version %d cannot be recorded: %s", version, error)
            recorded = False
        if recorded:
            with contextlib.suppress(RendezvousError):  # who wants to catch up waits for the next one
                self._rendezvous.put(f"{self._epoch}/published", pack(PublishedInfo(version, self._checksum)))
        self._do(self._machine.decided(recorded))
