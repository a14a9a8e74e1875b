"""A receiver looks for others that hold the published version, and has them write it. All on the receiver's loop, but
for connecting.

Resting until the store names a version that this receiver lacks; *connecting* to receivers that once held one; *asking*
them what they hold now; *fetching* from those who hold it. What may be served afterwards is not decided here but by
:class:`~railwire.weights.receiver_machine.ReceiverMachine`. Who holds a version never asks, so of two receivers only
one connects.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from railwire.errors import RailwireError
from railwire.weights import messages
from railwire.weights.cohort import PublishedInfo, ReceiverInfo, table_of, unpack
from railwire.weights.errors import PlanError, RendezvousError, WeightsError
from railwire.weights.peer_plan import holds_all, peer_plan
from railwire.weights.plan import Plan
from railwire.weights.rendezvous import Rendezvous
from railwire.weights.tables import RankTable

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer

log = logging.getLogger("railwire.weights")
_PAUSE = 1.0  # seconds between two attempts
_ALIKE = 4  # holders of the same boxes that share the work
_MOST = 64  # holders that are asked at a time
_LIVES = 4  # earlier lives of the trainers whose last version still counts


class Version(NamedTuple):
    """A published version: the life of the trainers, and its number."""

    epoch: int
    number: int
    checksum: bool = False


class Place(NamedTuple):
    """Where a receiver takes part."""

    epoch: int
    slot: int


class Fetching(NamedTuple):
    """Holders that have been chosen, and what each of them writes."""

    attempt: int
    version: Version
    plan: Plan
    writers: Mapping[str, Peer]
    """By incarnation (hex), those of whom something is wanted."""


class _Holder(NamedTuple):
    slot: int
    info: ReceiverInfo
    table: RankTable


class Catcher:
    """One receiver's search.

    Args:
        soon: runs something on the receiver's loop.
        lacks: whether a published version's number would be a gain.
        fetch: called when the holders are chosen: counts, then calls :meth:`request`.
    """

    def __init__(
        self, engine: TransferEngine, rendezvous: Rendezvous, name: str, soon: Callable[[Callable[[], object]], None],
        lacks: Callable[[int], bool], fetch: Callable[[Fetching], object],
    ) -> None:  # fmt: skip
        self._engine, self._rendezvous, self._name, self._soon = engine, rendezvous, name, soon
        self._lacks, self._fetch = lacks, fetch
        self._phase: Literal["resting", "connecting", "asking", "fetching"] = "resting"
        self._attempt = 0
        self._after = 0.0  # when it may be tried, or is given up
        self._wide = False  # ask all, not only those who have the same boxes
        self._failures: dict[int, int] = {}  # by slot
        self._known: dict[int, _Holder] = {}  # by their numbers in the store
        self._peers: dict[str, tuple[_Holder, Peer]] = {}  # by incarnation (hex)
        self._answers: dict[str, tuple[int, int]] = {}
        self._indices: dict[str, tuple[int, bytes]] = {}  # whose part of the plan
        self._version = Version(0, -1)
        self._place = Place(0, 0)
        self._table = RankTable("", (), ())

    # ---- the receiver's ----------------------------------------------------------------------------------------------
    def look(self, place: Place, table: RankTable) -> None:
        """Called every now and then while the receiver has nothing to do."""
        if self._phase == "asking" and time.monotonic() > self._after:
            self._choose()  # with those who have answered
        if self._phase != "resting" or time.monotonic() < self._after:
            return
        if place != self._place:
            self._known, self._failures = {}, {}
        self._place, self._table = place, table
        try:
            version = self.published(place.epoch)
            if version is None or not self._lacks(version.number):
                return
            holders = self._holders(place)
        except (RendezvousError, PlanError) as error:
            log.debug("receiver %s: cannot catch up: %s", self._name, error)
            return self._rest()
        if not holders:
            return self._rest()
        self._version, self._phase = version, "connecting"
        self._attempt += 1
        threading.Thread(
            target=self._connect, args=(self._attempt, holders), name="railwire-weights-connect", daemon=True
        ).start()

    def took(self, peer: Peer, message: messages.Holds) -> None:
        """A holder's answer."""
        key = peer.incarnation.hex()
        if self._phase != "asking" or message.attempt != self._attempt or key not in self._peers:
            return
        self._answers[key] = (message.epoch, message.version)
        if self._answers.keys() == self._peers.keys():
            self._choose()

    def request(self, imm: int) -> None:
        """Everything is ready to be written."""
        for key, (index, digest) in self._indices.items():
            _, peer = self._peers[key]
            self._send(
                peer,
                messages.Fetch(
                    self._attempt,
                    self._place.slot,
                    index,
                    digest,
                    self._version.epoch,
                    self._version.number,
                    imm,
                    self._version.checksum,
                ),
            )

    def failed(self, reason: str, keys: Collection[str] = ()) -> None:
        """Why nothing comes of it. Holders that are lost, and those (incarnations), are asked after others."""
        log.info("receiver %s has not caught up with version %d: %s", self._name, self._version.number, reason)
        for incarnation, (holder, peer) in self._peers.items():
            if incarnation in keys or peer.state != "connected":
                self._note(holder)

    def end(self) -> None:
        """It has been fetched, or will not be: an update has begun, or somebody failed."""
        if self._phase != "resting":
            self._rest()

    # ---- steps -------------------------------------------------------------------------------------------------------
    def _rest(self, *, wide: bool = False) -> None:
        self._wide = wide
        self._phase, self._after = "resting", time.monotonic() + _PAUSE
        peers, self._peers, self._answers, self._indices = self._peers, {}, {}, {}
        self._close(peers)

    def _close(self, peers: Mapping[str, tuple[_Holder, Peer]]) -> None:
        for _, peer in peers.values():
            if peer.state == "connected":
                with contextlib.suppress(RailwireError):
                    peer.close_async()

    def _note(self, holder: _Holder) -> None:
        """A failure: it comes later."""
        self._failures[holder.slot] = self._failures.get(holder.slot, 0) + 1

    def published(self, epoch: int) -> Version | None:
        """The newest version that the store names."""
        for life in range(epoch, max(0, epoch - _LIVES), -1):
            if self._rendezvous.has(f"{life}/published"):
                info = unpack(self._rendezvous.get(f"{life}/published"), PublishedInfo)
                assert isinstance(info, PublishedInfo)
                return Version(life, info.version, info.checksum)
        return None

    def _holders(self, place: Place) -> list[_Holder]:
        """Whom to ask."""
        count = self._rendezvous.count(f"{place.epoch}/holders")
        for number in range(max(0, count - _MOST) + 1, count + 1):
            key = f"{place.epoch}/holders/{number}"
            if number in self._known or not self._rendezvous.has(key):
                continue
            slot = int.from_bytes(self._rendezvous.get(key)[:8], "big")
            info = unpack(self._rendezvous.get(f"{place.epoch}/receivers/{slot}"), ReceiverInfo)
            assert isinstance(info, ReceiverInfo)
            self._known[number] = _Holder(slot, info, table_of(info))
        ours = self._engine.incarnation.hex()  # an earlier place of ours is none
        found = [holder for _, holder in sorted(self._known.items(), reverse=True) if holder.info.incarnation != ours]
        found.sort(key=lambda holder: self._failures.get(holder.slot, 0))  # stable: then the newest first
        alike = [] if self._wide else [holder for holder in found if holds_all(holder.table, self._table)]
        return alike[:_ALIKE] or found[:_MOST]

    def _connect(self, attempt: int, holders: Sequence[_Holder]) -> None:
        """On a thread of its own."""
        peers: dict[str, tuple[_Holder, Peer]] = {}
        missing = []
        for holder in holders:
            try:
                peer = self._engine.connect(holder.info.address, self._engine.liveness)
                peers[peer.incarnation.hex()] = (holder, peer)
            except (RailwireError, ValueError):
                missing.append(holder)
        self._soon(lambda: self._connected(attempt, peers, missing))

    def _connected(self, attempt: int, peers: dict[str, tuple[_Holder, Peer]], missing: Sequence[_Holder]) -> None:
        for holder in missing:
            self._note(holder)
        if self._phase != "connecting" or attempt != self._attempt:
            return self._close(peers)
        if not peers:
            return self._rest(wide=not self._wide)
        self._peers, self._phase = peers, "asking"
        self._after = time.monotonic() + self._engine.liveness
        for _, peer in peers.values():
            self._send(peer, messages.Which(self._attempt))

    def _choose(self) -> None:
        """Those who hold the version that the store names; what else they say they hold does not count."""
        chosen = [key for key, answer in self._answers.items() if answer == self._version[:2]]
        holders = [self._peers[key][0] for key in chosen]
        try:
            if not holders:
                raise PlanError("no receiver that was asked holds it")
            plan = peer_plan([holder.table for holder in holders], self._table)
            needed = [index for index, count in enumerate(plan.arrivals()[:, 0]) if count]
            self._indices = {}
            for index in needed:
                part = plan.only(index)
                self._rendezvous.put(f"{self._place.epoch}/receivers/{self._place.slot}/catch/{index}", part.encode())
                self._indices[chosen[index]] = (index, part.digest)
        except WeightsError as error:
            self.failed(str(error))
            return self._rest(wide=not self._wide)
        self._phase = "fetching"
        writers = {key: self._peers[key][1] for key in self._indices}
        self._fetch(Fetching(self._attempt, self._version, plan, writers))

    def _send(self, peer: Peer, message: messages.Which | messages.Fetch) -> None:
        with contextlib.suppress(RailwireError):  # its loss follows
            self._engine.send(peer, messages.encode(message))
