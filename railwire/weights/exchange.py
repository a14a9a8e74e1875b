"""Receivers give each other what is published: binds a receiver's machine and memory to its
:class:`~railwire.weights.catching.Catcher` and :class:`~railwire.weights.giving.Giver`. On the receiver's loop.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from railwire.errors import RailwireError
from railwire.weights import messages, receiver_machine
from railwire.weights.catching import Catcher, Fetching, Place
from railwire.weights.errors import PlanError, RendezvousError
from railwire.weights.giving import Giver
from railwire.weights.landing import Landing
from railwire.weights.receiver_machine import ReceiverMachine
from railwire.weights.rendezvous import Rendezvous

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer
    from railwire.transfer import Expectation

log = logging.getLogger("railwire.weights")


class Seat(NamedTuple):
    """What the exchange sees of its receiver.

    Attributes:
        served: the life of the trainers, and the version, of what was published here last.
    """

    place: Place
    machine: ReceiverMachine
    landing: Landing
    served: tuple[int, int]


class Exchange:
    """Args:
    soon: runs something on the receiver's loop.
    seat: None until the receiver has joined.
    run: carries out the machine's actions.
    open: the memory is about to be overwritten with (life, version).
    count: expects pages of these peers, at a new immediate, which is returned too.
    timeout: seconds that catching up may take.
    """

    def __init__(
        self, engine: TransferEngine, rendezvous: Rendezvous, name: str, soon: Callable[[Callable[[], object]], None],
        seat: Callable[[], Seat | None],
        run: Callable[[ReceiverMachine, list[receiver_machine.ReceiverAction]], object],
        open: Callable[[ReceiverMachine, tuple[int, int]], object],
        count: Callable[[int, Mapping[str, Peer]], tuple[int, Expectation]],
        timeout: float,
    ) -> None:  # fmt: skip
        self._engine, self._rendezvous, self._name, self._soon = engine, rendezvous, name, soon
        self._seat, self._run, self._open, self._count, self._timeout = seat, run, open, count, timeout
        self._catcher = Catcher(engine, rendezvous, name, soon, self._lacks, self._fetch)
        self._giver: Giver | None = None
        self._fetching: Fetching | None = None
        self._until = 0.0
        self._listed = Place(0, 0)  # where this receiver is known to hold a version

    # ---- the receiver's ----------------------------------------------------------------------------------------------
    def give_from(self, landing: Landing) -> None:
        """There is (other) memory to give from."""
        self.stop_giving()
        table = landing.destination.table
        self._giver = Giver(self._engine, self._rendezvous, self._soon, table, landing.buffers, landing.regions)

    def joined(self) -> None:
        """The receiver has a place. What it serves from an earlier life of the trainers it can give, if it is still
        the newest."""
        seat = self._seat()
        if seat is None or seat.machine.version is None:
            return
        try:
            published = self._catcher.published(seat.place.epoch)
        except (RendezvousError, PlanError) as error:  # of the store: the receiver takes part all the same
            log.warning("receiver %s: %s: nobody will catch up from it", self._name, error)
            return
        if published is not None and published[:2] == seat.served:
            self._list(seat.place)

    def look(self, wanted: bool) -> None:
        """Called every now and then.

        Args:
            wanted: no update will bring this receiver what it lacks.
        """
        seat = self._seat()
        if seat is None:
            return
        if seat.machine.state == "catching":
            if time.monotonic() > self._until:
                self._failed(seat.machine, seat.machine.catching, "it takes too long")
        elif seat.machine.state == "idle" and wanted:
            self._catcher.look(seat.place, seat.landing.destination.table)

    def stop_giving(self) -> None:
        """The memory is about to change."""
        if self._giver is not None:
            self._giver.stop()

    def published(self) -> None:
        """The receiver serves a version, however it got it."""
        self.end()
        seat = self._seat()
        if seat is not None and self._listed != seat.place:
            self._list(seat.place)

    def end(self) -> None:
        """Nothing is to be caught up with now."""
        self._catcher.end()

    def close(self) -> None:
        if self._giver is not None:
            self._giver.close()

    def message(self, peer: Peer, message: object) -> None:
        """From another receiver."""
        seat = self._seat()
        if seat is None:
            return
        machine, key = seat.machine, peer.incarnation.hex()
        match message:
            case messages.Which(attempt):
                served = seat.served if self._can_give(seat) else (0, -1)
                with contextlib.suppress(RailwireError):
                    self._engine.send(peer, messages.encode(messages.Holds(attempt, *served)))
            case messages.Holds():
                self._catcher.took(peer, message)
            case messages.Fetch():
                assert self._giver is not None
                can = (message.epoch, message.version) == seat.served and self._can_give(seat)
                self._giver.give(peer, message, seat.place.epoch if can else None)
            case messages.Gave(attempt, checksum):
                self._run(machine, machine.gave(key, attempt, checksum))
            case messages.Declined(attempt, reason):
                if key in machine.holders:
                    self._failed(machine, attempt, f"{peer.name}: {reason}", key)

    def do(self, machine: ReceiverMachine, action: receiver_machine.Fetch | receiver_machine.Differs) -> None:
        """What the machine wants."""
        fetching = self._fetching
        assert fetching is not None
        if isinstance(action, receiver_machine.Differs):
            self._catcher.failed("the checksum of what has landed is wrong", fetching.writers.keys())
            return
        seat, attempt, plan = self._seat(), action.attempt, fetching.plan
        assert seat is not None
        landing = seat.landing
        try:
            self._open(machine, fetching.version[:2])
            imm, expectation = self._count(len(plan.dst_offsets), fetching.writers)
        except (RailwireError, ValueError) as error:
            self._failed(machine, attempt, str(error))
            return
        self._catcher.request(imm)

        def landed() -> None:
            checksum = landing.checksum(plan) if fetching.version.checksum else 0
            self._run(machine, machine.caught(attempt, checksum))

        def ended(expectation: Expectation) -> None:
            error = expectation.exception()
            self._soon(landed if error is None else lambda: self._failed(machine, attempt, str(error)))

        expectation.add_done_callback(ended)

    # ---- steps -------------------------------------------------------------------------------------------------------
    def _lacks(self, version: int) -> bool:
        seat = self._seat()
        return seat is not None and seat.machine.lacks(version)

    def _fetch(self, fetching: Fetching) -> None:
        """The catcher has found holders."""
        seat = self._seat()
        assert seat is not None
        try:
            seat.landing.check_live()
        except PlanError as error:
            self._catcher.failed(str(error))
            self._catcher.end()
            return
        self._fetching, self._until = fetching, time.monotonic() + self._timeout
        epoch, number, _ = fetching.version
        writers = frozenset(fetching.writers)
        actions = seat.machine.catch(number, fetching.attempt, writers, here=epoch == seat.place.epoch)
        if not actions:
            self._catcher.end()
        self._run(seat.machine, actions)

    def _failed(self, machine: ReceiverMachine, attempt: int, reason: str, key: str = "") -> None:
        if machine.state == "catching" and machine.catching == attempt:
            self._catcher.failed(reason, {key})
            self._run(machine, machine.not_caught(attempt))

    def _can_give(self, seat: Seat) -> bool:
        machine = seat.machine
        return machine.state == "idle" and machine.version is not None and seat.landing.holds_published()

    def _list(self, place: Place) -> None:
        """Says in the store that this receiver holds a version."""
        try:
            number = self._rendezvous.number(f"{place.epoch}/holders")
            self._rendezvous.put(f"{place.epoch}/holders/{number}", place.slot.to_bytes(8, "big"))
            self._listed = place
        except RendezvousError as error:
            log.warning("receiver %s: %s: nobody will catch up from it", self._name, error)
