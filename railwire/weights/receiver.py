"""A receiver of weights: says what it wants, counts what lands, publishes whole versions. Imports torch.

``staged``: updates land in a copy beside the weights that are served; publishing copies them over, under a lock that
serving holds (:meth:`Receiver.serving`). ``in_place``: they land in the weights themselves; serving must rest from the
first write until the version is published, and after a failure until the next one is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import msgspec
import torch

from railwire.errors import FenceError, RailwireError
from railwire.weights import messages, receiver_machine
from railwire.weights.catching import Place
from railwire.weights.cohort import CohortInfo, ReceiverInfo, pack, unpack
from railwire.weights.errors import PlanError, RendezvousError
from railwire.weights.exchange import Exchange, Seat
from railwire.weights.landing import Landing, check_part, decode_checkpoint
from railwire.weights.loop import Loop
from railwire.weights.meeting import await_peers
from railwire.weights.plan import Plan
from railwire.weights.receiver_machine import ReceiverMachine
from railwire.weights.recording import Destination
from railwire.weights.rendezvous import Rendezvous

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer
    from railwire.transfer import Expectation

log = logging.getLogger("railwire.weights")

Checkpoint = Mapping[str, "tuple[tuple[int, ...], torch.dtype]"]
Describe = Callable[[Checkpoint], Destination]
_LOOK = 0.25  # seconds between two looks for new trainers


class Receiver:
    """Takes part in every update from when it has joined until :meth:`close`. Joins again by itself when the trainers
    have restarted.

    Args:
        engine: of this rank; the receiver takes over its messages.
        name: unique among the receivers.
        describe: called with the checkpoint's names, shapes and dtypes, returns what is wanted: see
            :func:`railwire.weights.recording.record`.
        mode: see above.
        on_begin, on_publish: called on the receiver's thread before the first byte may land, and when a version has
            become the one that is served (under the lock).
        live: gives the engine's tensors as they are now, by the names that ``describe`` used; None: those that it gave.
            One that has been replaced, moved or packed since then refuses the next update, by name: what would be
            written is what nobody serves. Looked at before each update.
        timeout: seconds that an update may take.
        catch_up: get the published version from other receivers as soon as this one has joined, without the trainers;
            and give it to others. For all receivers alike.
        watch_values: a live tensor whose values have changed since the last update (shuffled by the engine, scaled)
            refuses the next one, by name. Looks at 4096 elements of each tensor, twice an update.
    """

    def __init__(
        self,
        engine: TransferEngine,
        rendezvous: Rendezvous,
        name: str,
        describe: Describe,
        *,
        mode: Literal["staged", "in_place"] = "staged",
        on_begin: Callable[[int], object] | None = None,
        on_publish: Callable[[int], object] | None = None,
        live: Callable[[], Mapping[str, torch.Tensor]] | None = None,
        timeout: float = 300.0,
        catch_up: bool = False,
        watch_values: bool = False,
    ) -> None:
        if mode not in ("staged", "in_place"):
            raise ValueError(f'mode is "staged" or "in_place", not {mode!r}')
        self.name = name
        self._engine, self._rendezvous, self._describe = engine, rendezvous, describe
        self._in_place = mode == "in_place"
        self._on_begin, self._on_publish, self._timeout = on_begin, on_publish, timeout
        self._live, self._watch_values = live, watch_values
        self._serving = threading.RLock()
        self._changed = threading.Condition()
        self._version: int | None = None
        self._closed, self._left = False, False
        self._error: Exception | None = None
        self._epoch = 0
        self._lead: Peer | None = None
        self._machine: ReceiverMachine | None = None
        self._part: Plan | None = None
        self._expectation: Expectation | None = None
        self._landing: Landing | None = None
        self._checkpoint: bytes = b""
        self._writers: dict[str, Peer] = {}
        self.seconds = 0.0
        """From Begin to the publishing of the newest version."""
        self._began = 0.0
        self._check, self._begun = False, False  # checksums; an update, in this place
        self._slot = 0
        self._served = self._coming = (0, -1)  # life of the trainers, and version: of what is served, of what lands
        self._exchange: Exchange | None = None
        self._loop = Loop(f"railwire-weights-{name}", self._look)
        if catch_up:
            self._exchange = Exchange(
                engine, rendezvous, name, self._loop.soon, self._seat, self._do, self._open, self._count,
                timeout + engine.liveness,
            )  # fmt: skip
        engine.on_message(self._on_message)
        self._loop.soon(lambda: self._loop.set_deadline(0))

    # ---- for the user ------------------------------------------------------------------------------------------------
    @property
    def version(self) -> int | None:
        """Of the weights that may be served; None: there are none yet, or an update in place failed."""
        return self._version

    def wait(self, version: int, timeout: float = 60.0) -> int:
        """Blocks until a version of at least this number may be served; returns its number.

        Raises:
            TimeoutError; PlanError and others if this receiver cannot take part; ClosedError.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error or self._closed or (self._version is not None and self._version >= version), timeout
            )
            if self._error is not None:
                raise self._error
            if not done or self._version is None:
                raise TimeoutError(f"version {version} was not published within {timeout:g} s; it is {self._version}")
            return self._version

    @contextlib.contextmanager
    def serving(self) -> Iterator[int | None]:
        """Holds the weights still: no version is published inside. Gives the version."""
        with self._serving:
            yield self._version

    def close(self) -> None:
        """Leaves: the trainers go on without it."""
        self._closed = True
        with self._changed:
            self._changed.notify_all()
        if self._lead is not None and self._lead.state == "connected":
            with contextlib.suppress(RailwireError):
                self._lead.close()
        if self._exchange is not None:
            self._exchange.close()
        self._loop.close()

    # ---- joining -----------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Joins the newest life of the trainers, if it is not joined yet."""
        self._loop.set_deadline(_LOOK)
        if self._closed:
            return
        try:
            self._join()
        except RendezvousError as error:
            log.debug("receiver %s: %s", self.name, error)
        except (PlanError, RailwireError) as error:
            log.error("receiver %s cannot take part: %s", self.name, error)
            with self._changed:
                self._error = error
                self._changed.notify_all()
        if self._exchange is not None and not self._closed:
            self._exchange.look(self._version is None or not self._begun)

    def _join(self) -> None:
        epoch = self._rendezvous.count("epoch")
        again = epoch == self._epoch
        if (again and not self._left) or not self._rendezvous.has(f"{epoch}/checkpoint"):
            return
        if self._machine is not None and self._machine.state != "idle":
            return  # the old life's update must have ended; its lead's loss ends it
        checkpoint = self._rendezvous.get(f"{epoch}/checkpoint")
        if checkpoint != self._checkpoint:
            self._prepare(checkpoint)
        assert self._landing is not None
        try:
            lead = self._engine.connect(self._rendezvous.get(f"{epoch}/lead"), self._engine.liveness)
        except RailwireError:
            if again:
                return  # the trainers are gone; their next life is another epoch
            raise
        self._left = False
        slot = self._rendezvous.number(f"{epoch}/receivers")
        info = ReceiverInfo(
            self.name, bytes(self._engine.address), self._engine.incarnation.hex(),
            self._landing.destination.table.encode(), self._landing.descriptors,
        )  # fmt: skip
        self._rendezvous.put(f"{epoch}/receivers/{slot}", pack(info))
        version, newest = self._version, self._machine.newest if self._machine else -1
        self._epoch, self._lead, self._part = epoch, lead, None
        self._machine = ReceiverMachine(b"", in_place=self._in_place)
        self._machine.version, self._machine.newest = version, newest
        self._slot, self._begun = slot, False
        machine = self._machine
        lead.lost.add_done_callback(lambda why: self._loop.soon(lambda: self._lead_lost(machine)))
        if self._exchange is not None:
            self._exchange.joined()

    def _prepare(self, checkpoint: bytes) -> None:
        destination = self._describe(decode_checkpoint(checkpoint))
        destination.table = msgspec.structs.replace(destination.table, rank=self.name)
        destination.table.check()
        landing = Landing(
            self._engine,
            destination,
            self._live,
            in_place=self._in_place,
            given=self._exchange is not None,
            watched=self._watch_values,
        )
        if self._exchange is not None:
            self._exchange.give_from(landing)
        self._landing, self._checkpoint = landing, checkpoint

    def _plan(self, begin: messages.Begin) -> None:
        """The part of the plan that writes here, from the store; checked before the first byte."""
        assert self._machine is not None
        if self._part is not None and self._machine.digest == begin.digest:
            return
        cohort = unpack(self._rendezvous.get(f"{self._epoch}/receivers/{self._slot}/cohort", 10.0), CohortInfo)
        assert isinstance(cohort, CohortInfo)
        part = Plan.load(self._rendezvous.get(f"{self._epoch}/receivers/{self._slot}/plan", 10.0))
        assert self._landing is not None
        check_part(part, cohort.receivers.index(self._slot), self._landing.extents)
        self._part, self._machine.digest = part, cohort.digest

    # ---- events ------------------------------------------------------------------------------------------------------
    def _on_message(self, peer: Peer, data: bytes) -> None:
        try:
            message = messages.decode(data)
        except ValueError as error:
            log.warning("receiver %s: dropped a message of %s: %s", self.name, peer.name, error)
            return
        self._loop.soon(lambda: self._handle(peer, message))

    def _handle(self, peer: Peer, message: object) -> None:
        machine = self._machine
        if isinstance(message, messages.BETWEEN_RECEIVERS):
            if self._exchange is not None:
                self._exchange.message(peer, message)
            return
        if machine is None or self._lead is None or peer.incarnation != self._lead.incarnation:
            return
        if isinstance(message, messages.Begin):
            try:
                assert self._landing is not None
                self._landing.check_live()
                self._plan(message)
            except (RailwireError, ValueError) as error:
                self._reply(messages.Refused(message.attempt, str(error)))
                return
            self._check, self._begun = message.checksum, True
            self._do(machine, machine.begin(message))
        elif isinstance(message, messages.Publish):
            self._do(machine, machine.publish(message))
        elif isinstance(message, messages.Abort):
            self._do(machine, machine.abort(message))

    def _lead_lost(self, machine: ReceiverMachine) -> None:
        if machine is self._machine:
            self._left = True  # if it lives, it has left us out: join again
            self._do(machine, machine.lead_lost())
        self._look()

    def _do(self, machine: ReceiverMachine, actions: list[receiver_machine.ReceiverAction]) -> None:
        for action in actions:
            match action:
                case receiver_machine.Reply(message):
                    self._reply(message)
                case receiver_machine.Expect(attempt, arrivals):
                    self._expect(machine, attempt, arrivals)
                case receiver_machine.Apply(version):
                    self._apply(version)
                case receiver_machine.Drop(attempt, cut):
                    self._drop(machine, cut)
                case receiver_machine.Ask(version, attempt):
                    self._ask(machine, version, attempt)
                case receiver_machine.Fetch() | receiver_machine.Differs():
                    assert self._exchange is not None
                    self._exchange.do(machine, action)
        if machine.version is None and self._version is not None:
            with self._changed:
                self._version = None
                self._changed.notify_all()

    def _reply(self, message: object) -> None:
        if self._lead is not None:
            with contextlib.suppress(RailwireError):
                self._engine.send(self._lead, messages.encode(message))  # type: ignore[arg-type]

    def _expect(self, machine: ReceiverMachine, attempt: int, arrivals: dict[str, int]) -> None:
        if self._exchange is not None:
            self._exchange.end()
        self._open(machine, (self._epoch, machine.coming))
        assert self._part is not None
        part, total = self._part, len(self._part.dst_offsets)
        try:
            if sum(arrivals.values()) != total:
                raise PlanError(f"the lead announces {sum(arrivals.values())} pages, the plan has {total}")
            writers = {key for key, count in arrivals.items() if count}
            imm, expectation = self._count(total, await_peers(self._engine, writers, self._engine.liveness))
        except (RailwireError, ValueError, TimeoutError) as error:
            self._reply(messages.Refused(attempt, str(error)))
            return
        self._reply(messages.Ready(attempt, imm))
        landing = self._landing
        assert landing is not None

        def ended(expectation: Expectation) -> None:
            error = expectation.exception()
            if error is None:
                self._loop.soon(
                    lambda: self._do(machine, machine.landed(attempt, landing.checksum(part) if self._check else None))
                )
            else:
                self._loop.soon(lambda: self._do(machine, machine.broken(attempt, str(error))))

        expectation.add_done_callback(ended)

    def _open(self, machine: ReceiverMachine, coming: tuple[int, int]) -> None:
        """What has landed is about to be overwritten."""
        assert self._landing is not None
        self._began, self._coming = time.monotonic(), coming
        if self._exchange is not None:
            self._exchange.stop_giving()
        self._landing.open()
        if self._in_place:
            with self._serving:
                machine.version = self._version = None
        if self._on_begin is not None:
            self._on_begin(coming[1])

    def _count(self, total: int, writers: Mapping[str, Peer]) -> tuple[int, Expectation]:
        """Expects so many pages, at a new immediate."""
        self._writers = dict(writers)
        imm = self._engine.new_imm()
        counter = self._engine.counter(imm)
        counter.reset()
        self._expectation = counter.expect(total, list(writers.values()) or None, self._timeout)
        return imm, self._expectation

    def _seat(self) -> Seat | None:
        if self._machine is None or self._landing is None:
            return None
        return Seat(Place(self._epoch, self._slot), self._machine, self._landing, self._served)

    def _apply(self, version: int) -> None:
        with self._serving:
            assert self._landing is not None
            self._landing.publish()
            self._version, self._served = version, self._coming
            self.seconds = time.monotonic() - self._began
            if self._on_publish is not None:
                self._on_publish(version)
            self._landing.watch()
        with self._changed:
            self._changed.notify_all()
        if self._exchange is not None:
            self._exchange.published()

    def _drop(self, machine: ReceiverMachine, cut: tuple[str, ...] | None) -> None:
        """After this nobody of this attempt writes any more."""
        if self._expectation is not None:
            self._expectation.cancel()
        for incarnation, peer in self._writers.items():
            if (cut is None or incarnation in cut) and peer.state == "connected":
                try:
                    peer.close()
                except FenceError as error:
                    log.error("receiver %s leaves: %s", self.name, error)
                    with self._changed:
                        self._error = error
                        self._changed.notify_all()
                    self._closed = True
                    return
                except RailwireError:
                    pass  # it was lost meanwhile, which is as good
        if self._exchange is not None:
            self._exchange.end()
        self._do(machine, machine.dropped())

    def _ask(self, machine: ReceiverMachine, version: int, attempt: int) -> None:
        try:
            published = self._rendezvous.has(f"{self._epoch}/decision/{version}.{attempt}")
        except RendezvousError as error:
            log.error("receiver %s: %s: version %d is dropped", self.name, error, version)
            published = False
        self._do(machine, machine.verdict(published))
