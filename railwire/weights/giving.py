"""A receiver gives what it holds to one that catches up. Imports torch.

Each gift is written by a thread of its own, so that a slow peer delays nobody. Before the memory that is given from
changes, the receiver calls :meth:`Giver.stop`: gifts that have not ended are declined. What they still write the other
side never serves, for it has not been told that all of it was of the version.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from railwire.errors import RailwireError
from railwire.memory import MemoryRegion, RemoteRegion
from railwire.weights import messages
from railwire.weights.cohort import ReceiverInfo, unpack
from railwire.weights.errors import PlanError
from railwire.weights.memory import Storages
from railwire.weights.plan import Plan
from railwire.weights.rendezvous import Rendezvous
from railwire.weights.source import Source
from railwire.weights.tables import RankTable
from railwire.weights.writing import Target, Work, Writer

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer

log = logging.getLogger("railwire.weights")
_GIFTS = 4  # at a time


class _Gift:
    def __init__(self) -> None:
        self.stopped = False
        self.thread: threading.Thread | None = None


class Giver:
    """Everything but the writing happens on the receiver's loop.

    Args:
        soon: runs something on that loop.
        table, buffers, regions: what lies in the memory that is given from, and how it is registered.
    """

    def __init__(
        self, engine: TransferEngine, rendezvous: Rendezvous, soon: Callable[[Callable[[], object]], None],
        table: RankTable, buffers: Sequence[torch.Tensor], regions: Sequence[MemoryRegion],
    ) -> None:  # fmt: skip
        self._engine, self._rendezvous, self._soon = engine, rendezvous, soon
        storages = Storages()
        storages.buffers = list(buffers)
        self._source = Source(table, storages, {}, {})
        self._regions = regions
        self._gifts: set[_Gift] = set()

    def give(self, peer: Peer, message: messages.Fetch, epoch: int | None) -> None:
        """Args:
        epoch: in which both take part; None: the version that is asked for does not lie here.
        """
        try:
            if epoch is None:
                raise PlanError(f"does not hold version {message.version} now")
            if len(self._gifts) >= _GIFTS:
                raise PlanError(f"gives to {_GIFTS} others already")
            writer, work = self._prepare(peer, message, epoch)
        except (RailwireError, ValueError, IndexError) as error:
            self._say(peer, messages.Declined(message.attempt, str(error)[:300]))
            return
        gift = _Gift()
        gift.thread = threading.Thread(
            target=self._write, args=(gift, peer, message, writer, work), name="railwire-weights-gift", daemon=True
        )
        self._gifts.add(gift)
        gift.thread.start()

    def stop(self) -> None:
        """The memory is about to change."""
        for gift in list(self._gifts):
            gift.stopped = True

    def close(self, timeout: float = 2.0) -> None:
        """From another thread than the loop's."""
        self.stop()
        for gift in list(self._gifts):
            if gift.thread is not None:
                gift.thread.join(timeout)

    def _prepare(self, peer: Peer, message: messages.Fetch, epoch: int) -> tuple[Writer, Work]:
        info = unpack(self._rendezvous.get(f"{epoch}/receivers/{message.slot}"), ReceiverInfo)
        assert isinstance(info, ReceiverInfo)
        if info.incarnation != peer.incarnation.hex():
            raise PlanError(f"slot {message.slot} is not that of who asks")
        plan = Plan.load(self._rendezvous.get(f"{epoch}/receivers/{message.slot}/catch/{message.index}"))
        if plan.digest != message.digest:
            raise PlanError("the plan in the store is another one")
        if plan.units or not len(plan.batches) or (plan.batches[:, [0, 3]] < 0).any():
            raise PlanError("is no plan of writes from here")
        writer = Writer(self._engine, self._source, 0, checksum=message.checksum, regions=self._regions)
        target = Target("", tuple(RemoteRegion.from_bytes(descriptor) for descriptor in info.descriptors))
        work = writer.bind(plan, message.index, [target])
        if len(work.direct) != len(plan.batches):
            raise PlanError("is no plan of writes from here")
        return writer, work

    def _write(self, gift: _Gift, peer: Peer, message: messages.Fetch, writer: Writer, work: Work) -> None:
        problem, checksum = "", 0
        try:
            outcome = writer.run((work,), {"": message.imm}, stopped=lambda: gift.stopped)
            problem, checksum = outcome.failed.get("", ""), outcome.checksums.get("", 0)
        except Exception as error:  # whatever it is, the other side must know
            problem = f"{type(error).__name__}: {error}"
        self._soon(lambda: self._ended(gift, peer, message.attempt, problem, checksum))

    def _ended(self, gift: _Gift, peer: Peer, attempt: int, problem: str, checksum: int) -> None:
        self._gifts.discard(gift)
        if gift.stopped:
            problem = "an update has begun"
        if problem:
            self._say(peer, messages.Declined(attempt, problem[:300]))
        else:
            self._say(peer, messages.Gave(attempt, checksum))

    def _say(self, peer: Peer, message: messages.Gave | messages.Declined) -> None:
        if isinstance(message, messages.Declined):
            log.info("declined to give %s its version: %s", peer.name, message.reason)
        with contextlib.suppress(RailwireError):  # it is lost, and knows
            self._engine.send(peer, messages.encode(message))
