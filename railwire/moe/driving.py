"""What drives the machine of one rank: carries its actions out, tells it what has come, and what has not in time."""

from __future__ import annotations

import time
from typing import Any

from railwire.errors import RailwireError
from railwire.moe import actions as p
from railwire.moe.actions import Phase, Wait
from railwire.moe.carrying import Carrier
from railwire.moe.errors import MaskedOutError, MoeError, RankLostError
from railwire.moe.fencing import Fencing
from railwire.moe.geometry import GRANT_MAGIC, HeaderError
from railwire.moe.protocol import Machine
from railwire.moe.waiting import Waiting
from railwire.moe.wires import Sent, Wires, host_bytes


class Driver:
    """Attributes: ``reasons``: why each masked rank is. ``shrink``: go on without ranks that are missing."""

    def __init__(self, machine: Machine, carrier: Carrier, wires: Wires, timeout: float, shrink: bool) -> None:
        self._machine = machine
        self._carrier = carrier
        self._wires = wires
        self._shrink = shrink
        self.waiting = Waiting(wires, timeout)
        self._fencing = Fencing(wires)
        self.reasons: dict[int, str] = {}

    def run(self, actions: list[p.Action]) -> None:
        """Carries out what the machine has asked for, and watches for what it awaits then."""
        machine, carrier, wires = self._machine, self._carrier, self._wires
        slots = [action for action in actions if isinstance(action, p.SendSlot)]
        if slots and machine.phase is not Phase.OUT:
            carrier.send_slots(slots, machine.generation)
        for action in actions:
            if machine.phase is Phase.OUT:
                return
            match action:
                case p.SendOverflow():
                    self._write(action.rank, carrier.send_overflow, action, machine.generation)
                case p.SendGrant(rank, offset, rows):  # behind what has taken the rows that lay there
                    self._write(rank, wires.send_grant, rank, machine.generation, offset, rows)
                    self._carrier.stats["second_rounds"] += 1
                case p.Plan(counts):
                    carrier.plan(counts, machine)
                case p.TakeSlot(rank, rows):
                    carrier.take_slot(rank, rows, machine.slot_rows)
                case p.TakeOverflow():
                    carrier.take_overflow(action, machine.slot_rows)
                case p.Blank():
                    if carrier.result is not None and machine.phase is not Phase.COMBINE:
                        carrier.blank(action)
                case p.Fence(rank, reason):
                    self._fence(rank, reason)
        self.watch()

    def _write(self, rank: int, write: Any, *args: Any) -> None:
        """A write that fails at the call means that the rank is lost: its expectation will say so."""
        try:
            write(*args)
        except RailwireError as error:
            if rank not in self._machine.masked:
                self._miss(rank, str(error))

    # ---- waiting -----------------------------------------------------------------------------------------------------
    def watch(self) -> None:
        """Expects what the machine awaits."""
        self.waiting.watch(self._machine.awaiting, self._machine.generation)

    def work(self, phase: Phase) -> None:
        """Until the phase has ended."""
        began = time.monotonic()
        beat_at = began + self.waiting.timeout / 2
        machine, waiting = self._machine, self.waiting
        waiting.begin()
        while machine.phase is phase:
            for wait, rank, error in waiting.ended():
                if error is not None:
                    self._miss(rank, str(error))
                else:
                    self._carrier.stats["wait_seconds"][rank] += time.monotonic() - began
                    self._came(wait, rank)
            if machine.phase is not phase:
                break
            now = time.monotonic()
            if now > beat_at:
                beat_at = now + self.waiting.timeout / 4
                self._wires.beat(machine.peers)
            self._look_at_fences()
            for rank, reason in waiting.overdue(now):
                self._miss(rank, reason)
            if waiting and machine.phase is phase:
                waiting.pause(now, bool(self._fencing))
            elif machine.phase is phase:
                self._wait_for_a_fence()
        if machine.phase is Phase.OUT:
            waiting.drop()
            raise MaskedOutError(
                f"the others go on without rank {self._machine.rank}, which was late: reform() takes it back"
            )
        if phase is Phase.DISPATCH:
            self._carrier.finish_dispatch()

    def _came(self, wait: Wait, rank: int) -> None:
        """What a rank owed us is here."""
        machine, g = self._machine, self._carrier.geometry
        if wait is Wait.HEADER:
            at = g.slot(rank, self._machine.rank, machine.slot_rows)
            try:
                words = host_bytes(self._wires.dispatch_recv[at : at + g.header]).view("uint32")
                header = g.decode_header(words, self._machine.rank)
            except HeaderError as bad:
                self.run(machine.missing(rank, f"what it sent is wrong: {bad}"))
                return
            self.run(machine.header(rank, header))
        elif wait is Wait.GRANT:
            magic, generation, offset, rows = self._wires.read_grant(rank)
            if magic != GRANT_MAGIC:
                self._miss(rank, "it lends nothing")
                return
            self.run(machine.grant(rank, generation, offset, rows))
        elif wait is Wait.OVERFLOW:
            self.run(machine.overflow(rank))
        else:
            self.run(machine.combined(rank))

    def _miss(self, rank: int, reason: str) -> None:
        """A rank gives no sign. Perhaps because it goes on without us: then it has said so."""
        if self._wires.is_masked_by(rank):
            self._machine.masked_out()
            return
        self.run(self._machine.missing(rank, reason))

    # ---- fences ------------------------------------------------------------------------------------------------------
    def _fence(self, rank: int, reason: str) -> None:
        self.reasons[rank] = reason
        name = self._wires.peer_name(rank)
        if not self._shrink:
            self._machine.masked_out()
            self.waiting.drop()
            raise RankLostError(
                f"rank {rank} ({name}) is missing in generation {self._machine.generation}: {reason}; "
                "make a new group, or use shrink=True to go on without such ranks",
                rank=rank,
                generation=self._machine.generation,
            )
        if self._fencing.begin(rank, self._machine.generation, min(max(self.waiting.timeout, 0.05), 1.0)):
            self._machine.fenced(rank)

    def _look_at_fences(self) -> None:
        for rank in self._fencing.ended():
            self.run(self._machine.fenced(rank))

    def _wait_for_a_fence(self) -> None:
        """Nothing is awaited and yet the phase goes on: all overflow rows are lent to ranks that are being cut off."""
        if not self._fencing:
            self._machine.masked_out()
            raise MoeError(f"overflow rows stay lent to ranks that cannot be cut off: {self._fencing.impossible}")
        self._fencing.pause()

    def wait_for_fences(self) -> None:
        """Until no masked rank can write here any more. MoeError: one still can."""
        end = time.monotonic() + 10.0
        beat_at = time.monotonic()
        while self._fencing and time.monotonic() < end:
            if time.monotonic() > beat_at:  # the others may be further, and wait for us
                beat_at += self.waiting.timeout / 4
                self._wires.beat(self._machine.peers)
            self._wait_for_a_fence()
            self._look_at_fences()
        if self._machine.unfenced:
            ranks = sorted(self._machine.unfenced)
            raise MoeError(
                f"ranks {ranks} are masked and may still write here ({self._fencing.impossible}): end their processes"
            )

    # ---- our own writes ----------------------------------------------------------------------------------------------
    def wait_until_written(self) -> None:
        """Until nothing is read from the combine send region any more; a write that failed means that its rank is
        missing."""
        sent = self._wires.combining
        while sent:
            one = sent.pop(0)
            try:
                one.transfer.wait()
            except RailwireError as error:
                for rank in self._wires.failed(one.ranks, error):
                    if rank not in self._machine.masked:
                        self._miss(rank, str(error))
        if self._machine.phase is Phase.OUT:
            raise MaskedOutError(f"the others go on without rank {self._machine.rank}")

    def settle(self, sent: list[Sent]) -> None:
        """As above, for writes whose effect has been seen already or no longer matters."""
        while sent:
            try:
                sent.pop().transfer.wait()
            except RailwireError:
                pass
