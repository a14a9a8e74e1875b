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

import torch

from railwire.errors import FenceError, RailwireError
from railwire.weights import messages, receiver_machine
from railwire.weights.checksum import pages_sum
from railwire.weights.cohort import CohortInfo, ReceiverInfo, pack, unpack
from railwire.weights.errors import PlanError, RendezvousError
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
    ) -> None:
        if mode not in ("staged", "in_place"):
            raise ValueError(f'mode is "staged" or "in_place", not {mode!r}')
        self.name = name
        self._engine, self._rendezvous, self._describe = engine, rendezvous, describe
        self._in_place = mode == "in_place"
        self._on_begin, self._on_publish, self._timeout = on_begin, on_publish, timeout
        self._live = live
        self._layouts: dict[str, tuple[object, ...]] = {}
        self._serving = threading.RLock()
        self._changed = threading.Condition()
        self._version: int | None = None
        self._closed = False
        self._error: Exception | None = None
        self._epoch = 0
        self._left = False
        self._lead: Peer | None = None
        self._machine: ReceiverMachine | None = None
        self._part: Plan | None = None
        self._expectation: Expectation | None = None
        self._imm = 0
        self._destination: Destination | None = None
        self._checkpoint: bytes = b""
        self._shadows: list[torch.Tensor] = []
        self._extents: list[list[tuple[int, int]]] = []
        self._descriptors: tuple[bytes, ...] = ()
        self._regions: list[object] = []
        self._writers: dict[str, Peer] = {}
        self.seconds = 0.0
        """From Begin to the publishing of the newest version."""
        self._began = 0.0
        self._check = False
        self._loop = Loop(f"railwire-weights-{name}", self._look)
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
        self._loop.close()

    # ---- joining -----------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Joins the newest life of the trainers, if it is not joined yet."""
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
        self._loop.set_deadline(_LOOK)

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
        assert self._destination is not None
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
            self._destination.table.encode(), self._descriptors,
        )  # fmt: skip
        self._rendezvous.put(f"{epoch}/receivers/{slot}", pack(info))
        version, newest = self._version, self._machine.newest if self._machine else -1
        self._epoch, self._lead, self._part = epoch, lead, None
        self._machine = ReceiverMachine(b"", in_place=self._in_place)
        self._machine.version, self._machine.newest = version, newest
        self._slot = slot
        machine = self._machine
        lead.lost.add_done_callback(lambda why: self._loop.soon(lambda: self._lead_lost(machine)))

    def _prepare(self, checkpoint: bytes) -> None:
        import msgspec

        try:
            names = msgspec.msgpack.decode(checkpoint, type=dict[str, tuple[tuple[int, ...], str]])
            shapes = {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in names.items()}
        except (msgspec.DecodeError, msgspec.ValidationError, AttributeError) as error:
            raise PlanError(f"not a checkpoint's description: {error}") from error
        destination = self._describe(shapes)
        destination.table = msgspec.structs.replace(destination.table, rank=self.name)
        destination.table.check()
        self._layouts = {name: _layout(tensor) for name, tensor in destination.parameters.items()}
        buffers = destination.storages.buffers
        self._shadows = buffers if self._in_place else [torch.zeros_like(buffer) for buffer in buffers]
        regions = [self._engine.register(buffer) for buffer in self._shadows]
        self._descriptors = tuple(bytes(region.descriptor) for region in regions)
        self._extents = extents(destination)
        self._regions, self._destination, self._checkpoint = list(regions), destination, checkpoint

    def _plan(self, begin: messages.Begin) -> None:
        """The part of the plan that writes here, from the store; checked before the first byte."""
        assert self._machine is not None
        if self._part is not None and self._machine.digest == begin.digest:
            return
        cohort = unpack(self._rendezvous.get(f"{self._epoch}/receivers/{self._slot}/cohort", 10.0), CohortInfo)
        assert isinstance(cohort, CohortInfo)
        part = Plan.load(self._rendezvous.get(f"{self._epoch}/receivers/{self._slot}/plan", 10.0))
        check_part(part, cohort.receivers.index(self._slot), self._extents)
        self._part, self._machine.digest = part, cohort.digest

    def _check_live(self) -> None:
        """Raises PlanError, naming each tensor that no longer lies where it was described."""
        assert self._destination is not None
        now = self._destination.parameters if self._live is None else self._live()
        problems = []
        for name, layout in self._layouts.items():
            if name not in now:
                problems.append(f"{name}: is gone since the plan was made")
            elif _layout(now[name]) != layout:
                problems.append(f"{name}: has been replaced, moved or packed since the plan was made")
        if problems:
            raise PlanError(problems)

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
        if machine is None or self._lead is None or peer.incarnation != self._lead.incarnation:
            return
        if isinstance(message, messages.Begin):
            try:
                self._check_live()
                self._plan(message)
            except (RailwireError, ValueError) as error:
                self._reply(messages.Refused(message.attempt, str(error)))
                return
            self._check = message.checksum
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
        if machine.version is None and self._version is not None:
            with self._changed:
                self._version = None
                self._changed.notify_all()

    def _reply(self, message: object) -> None:
        if self._lead is not None:
            with contextlib.suppress(RailwireError):
                self._engine.send(self._lead, messages.encode(message))  # type: ignore[arg-type]

    def _expect(self, machine: ReceiverMachine, attempt: int, arrivals: dict[str, int]) -> None:
        self._began = time.monotonic()
        if self._in_place:
            with self._serving:
                machine.version = self._version = None
        if self._on_begin is not None:
            self._on_begin(machine._coming)
        assert self._part is not None
        total = len(self._part.dst_offsets)
        try:
            if sum(arrivals.values()) != total:
                raise PlanError(f"the lead announces {sum(arrivals.values())} pages, the plan has {total}")
            writers = {key for key, count in arrivals.items() if count}
            self._writers = await_peers(self._engine, writers, self._engine.liveness)
            self._imm = self._engine.new_imm()
            counter = self._engine.counter(self._imm)
            counter.reset()
            self._expectation = counter.expect(total, list(self._writers.values()) or None, self._timeout)
        except (RailwireError, ValueError, TimeoutError) as error:
            self._reply(messages.Refused(attempt, str(error)))
            return
        self._reply(messages.Ready(attempt, self._imm))

        def ended(expectation: Expectation) -> None:
            error = expectation.exception()
            if error is None:
                self._loop.soon(
                    lambda: self._do(machine, machine.landed(attempt, self._sum() if self._check else None))
                )
            else:
                self._loop.soon(lambda: self._do(machine, machine.broken(attempt, str(error))))

        self._expectation.add_done_callback(ended)

    def _sum(self) -> int:
        """Checksum of everything that the plan writes here."""
        part, total = self._part, 0
        assert part is not None
        memories = [shadow.cpu().numpy() for shadow in self._shadows]
        for row in part.batches.tolist():
            region, run_bytes, runs, stride, first, count = row[4], row[5], row[6], row[8], row[9], row[10]
            places = part.dst_offsets[first : first + count]
            total += pages_sum(memories[region], places, runs, run_bytes, stride, region, places)
        return total % (1 << 64)

    def _apply(self, version: int) -> None:
        with self._serving:
            if not self._in_place:
                assert self._destination is not None
                for live, shadow, pieces in zip(
                    self._destination.storages.buffers, self._shadows, self._extents, strict=True
                ):
                    for begin, end in pieces:
                        live[begin:end].copy_(shadow[begin:end])
            self._version = version
            self.seconds = time.monotonic() - self._began
            if self._on_publish is not None:
                self._on_publish(version)
        with self._changed:
            self._changed.notify_all()

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
        self._do(machine, machine.dropped())

    def _ask(self, machine: ReceiverMachine, version: int, attempt: int) -> None:
        try:
            published = self._rendezvous.has(f"{self._epoch}/decision/{version}.{attempt}")
        except RendezvousError as error:
            log.error("receiver %s: %s: version %d is dropped", self.name, error, version)
            published = False
        self._do(machine, machine.verdict(published))


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def extents(destination: Destination) -> list[list[tuple[int, int]]]:
    """By region, the bytes that the checkpoint fills, as few intervals as there are."""
    from railwire.weights.tables import ITEMSIZE

    found: list[list[tuple[int, int]]] = [[] for _ in destination.storages.buffers]
    for held in destination.table.held:
        runs = [(held.offset, ITEMSIZE[held.dtype])]
        for extent, stride in sorted(zip(held.size, held.strides, strict=True), key=lambda pair: pair[1]):
            if extent == 1:
                continue
            if len(runs) == 1 and stride == runs[0][1]:
                runs = [(runs[0][0], stride * extent)]
            else:
                runs = [(begin + i * stride, length) for i in range(extent) for begin, length in runs]
        found[held.region] += [(begin, begin + length) for begin, length in runs]
    merged = []
    for intervals in found:
        kept: list[tuple[int, int]] = []
        for begin, end in sorted(set(intervals)):
            if kept and begin <= kept[-1][1]:
                kept[-1] = (kept[-1][0], max(end, kept[-1][1]))
            else:
                kept.append((begin, end))
        merged.append(kept)
    return merged


def check_part(part: Plan, number: int, wanted: list[list[tuple[int, int]]]) -> None:
    """Raises PlanError unless the pages fill exactly the wanted bytes of this receiver, each once."""
    import numpy as np

    got: list[list[tuple[int, int]]] = [[] for _ in wanted]
    for row in part.batches.tolist():
        _, rank, _, _, region, run_bytes, runs, _, stride, first, count = row
        if rank != number or not 0 <= region < len(wanted):
            raise PlanError("the plan's part is another receiver's")
        begin = part.dst_offsets[first : first + count, None] + np.arange(runs) * stride
        got[region] += [(b, b + run_bytes) for b in begin.reshape(-1).tolist()]
    for region, intervals in enumerate(got):
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(intervals):
            if merged and begin < merged[-1][1]:
                raise PlanError(f"the plan writes bytes {begin}.. of region {region} twice")
            if merged and begin == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        if merged != wanted[region]:
            raise PlanError(f"the plan does not fill region {region} as it is wanted")
