"""Versions of weights as two pure machines: no clocks, threads, sockets. The shells (``lead``, ``receiver``) carry out
their actions and feed them events; a test walks all they can meet. Here: the lead; ``receiver_machine`` is the other.

One update, as the lead sees it: all trainers have *arrived* with the same version; all receivers are *ready* (they
have checked version and plan, and count); all trainers have *written*, all receivers have *landed* everything; the
decision is *recorded*; all receivers have *published*. Until the decision, anything that fails aborts the version:
trainers stop and say when they are quiet, then receivers cut off those who did not, and drop what has landed. After
it, nothing aborts.

A receiver that is lost leaves the update, which goes on without it. A trainer that is lost ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from railwire.weights.messages import Abort, Begin, End, Go, Prepare, Publish, Stop, Wrote


class ToReceiver(msgspec.Struct, frozen=True):
    name: str
    message: Any


class ToTrainer(msgspec.Struct, frozen=True):
    rank: int
    message: Any


class Decide(msgspec.Struct, frozen=True):
    """Record, where every receiver can read it, that this version is published; answer with decided()."""

    version: int
    attempt: int


class Dismiss(msgspec.Struct, frozen=True):
    """A receiver that did not answer in time is left out: close its connection, so that it knows and can join again."""

    name: str


class Done(msgspec.Struct, frozen=True):
    """The update has ended; the machine is idle again."""

    version: int
    problems: tuple[str, ...]


LeadAction = ToReceiver | ToTrainer | Decide | Dismiss | Done
Phase = Literal["idle", "arriving", "beginning", "writing", "deciding", "publishing", "stopping", "aborting"]


class Lead:
    """The machine of the one trainer that leads.

    Args:
        trainers: incarnation (hex) by rank.
    """

    def __init__(self, trainers: Mapping[int, str], *, checksum: bool = False) -> None:
        self._checksum = checksum
        self._sums: dict[str, int] = {}  # what was written less what has landed: 0 in the end
        self.trainers = dict(trainers)
        self.receivers: dict[str, bytes] = {}
        """Members: name -> digest of the plan that writes to it."""
        self.arrivals: dict[str, dict[str, int]] = {}
        self.phase: Phase = "idle"
        self.published = -1
        self.version = -1
        self.attempt = 0
        self.lost: dict[int, str] = {}
        self._waiting: set[Any] = set()  # whom the phase waits for
        self._writing: set[int] = set()
        self._landing: set[str] = set()
        self._taking_part: set[str] = set()
        self._imms: dict[str, int] = {}
        self._problems: list[str] = []
        self._unquiet: dict[int, tuple[str, ...]] = {}  # by trainer, where something of it may still land
        self._doubts: dict[str, str] = {}
        self.cohorts: tuple[int, ...] = ()
        self.current: set[str] = set()
        """Members that have the published version."""
        self._only_new = False

    # ---- membership --------------------------------------------------------------------------------------------------
    def join(self, name: str, digest: bytes, arrivals: Mapping[str, int]) -> None:
        """A receiver takes part from the next update on."""
        self.receivers[name] = digest
        self.arrivals[name] = dict(arrivals)

    def receiver_lost(self, name: str) -> list[LeadAction]:
        """It has left, or died: the update goes on without it."""
        self.receivers.pop(name, None)
        self.arrivals.pop(name, None)
        self.current.discard(name)
        if name not in self._taking_part:
            return []
        self._taking_part.discard(name)
        self._landing.discard(name)
        self._imms.pop(name, None)
        if self.phase in ("beginning", "publishing", "aborting"):
            self._waiting.discard(name)
        return self._go_on()

    def trainer_lost(self, rank: int, reason: str) -> list[LeadAction]:
        self.lost.setdefault(rank, reason)
        if self.phase == "idle":
            return []
        self._writing.discard(rank)
        if self.phase in ("deciding", "publishing", "aborting"):
            return self._go_on()  # what it had to do has been done
        return self._fail(f"trainer rank {rank} is lost: {reason}")

    # ---- an update ---------------------------------------------------------------------------------------------------
    def start(self, version: int, *, only_new: bool = False) -> list[LeadAction]:
        """The lead's own user wants to publish ``version``; with ``only_new`` the one that is published, to those
        receivers that do not have it."""
        assert self.phase == "idle"
        self.version = version
        self.attempt += 1
        self._problems, self._unquiet, self._imms, self._doubts = [], {}, {}, {}
        self._taking_part, self._landing, self._writing = set(), set(), set()
        self._only_new = only_new
        self._sums = {}
        if only_new and version != self.published:
            return self._finish(f"version {version} is not the published one, {self.published}")
        if not only_new and version <= self.published:
            return self._finish(f"version {version} does not follow {self.published}, which is published")
        if self.lost:
            return self._finish(*(f"trainer rank {rank} is lost: {why}" for rank, why in sorted(self.lost.items())))
        self.phase = "arriving"
        self._waiting = set(self.trainers)
        return [ToTrainer(rank, Prepare(version, self.attempt, self.cohorts)) for rank in sorted(self.trainers)]

    def arrived(self, rank: int, version: int, attempt: int, problem: str = "") -> list[LeadAction]:
        if self.phase != "arriving" or rank not in self._waiting or attempt != self.attempt:
            return []
        if problem:
            return self._finish(f"trainer rank {rank}: {problem}")
        if version != self.version:
            return self._finish(f"trainer rank {rank} is about to publish version {version}, not {self.version}")
        self._waiting.discard(rank)
        return self._go_on()

    def ready(self, name: str, attempt: int, imm: int) -> list[LeadAction]:
        if not self._expected(name, attempt, "beginning"):
            return []
        self._imms[name] = imm
        self._waiting.discard(name)
        return self._go_on()

    def has(self, name: str, attempt: int) -> list[LeadAction]:
        """It has caught up with the version that it was to be welcomed with."""
        if not self._only_new or not self._expected(name, attempt, "beginning"):
            return []
        self._waiting.discard(name)
        self._taking_part.discard(name)
        self.current.add(name)
        return self._go_on()

    def refused(self, name: str, attempt: int, reason: str) -> list[LeadAction]:
        """Refusal before, or a failure after, a receiver has become ready."""
        if attempt != self.attempt or name not in self._taking_part:
            return []
        if self.phase not in ("beginning", "writing", "stopping"):
            return []
        self._waiting.discard(name)
        self._landing.discard(name)
        return self._fail(f"receiver {name}: {reason}")

    def wrote(self, rank: int, message: Wrote) -> list[LeadAction]:
        if message.attempt != self.attempt or rank not in self._writing:
            return []
        self._writing.discard(rank)
        self._unquiet[rank] = message.unquiet
        for name, value in message.checksums.items():
            self._sums[name] = self._sums.get(name, 0) + value
        # A receiver that lives finds out itself that something failed; one that does not is about to be lost.
        self._doubts |= {name: f"trainer rank {rank}: {why}" for name, why in message.failed.items() if name}
        if "" in message.failed and self.phase == "writing":
            return self._fail(f"trainer rank {rank}: {message.failed['']}")
        return self._go_on()

    def landed(self, name: str, attempt: int, checksum: int | None = None) -> list[LeadAction]:
        if attempt == self.attempt and name in self._landing:
            self._landing.discard(name)
            self._sums[name] = self._sums.get(name, 0) - (checksum or 0)
        return self._go_on() if self.phase == "writing" else []

    def decided(self, committed: bool) -> list[LeadAction]:
        """The answer to Decide: False if it could not be recorded."""
        if self.phase != "deciding":
            return []
        if not committed:
            return self._fail("the decision could not be recorded in the store")
        self.published = self.version
        self.current = self._taking_part | (self.current if self._only_new else set())
        self.phase = "publishing"
        self._waiting = set(self._taking_part)
        return [
            *(ToReceiver(name, Publish(self.version, self.attempt)) for name in sorted(self._taking_part)),
            *self._go_on(),
        ]

    def published_by(self, name: str, attempt: int) -> list[LeadAction]:
        if not self._expected(name, attempt, "publishing"):
            return []
        self._waiting.discard(name)
        return self._go_on()

    def aborted(self, name: str, attempt: int) -> list[LeadAction]:
        if not self._expected(name, attempt, "aborting"):
            return []
        self._waiting.discard(name)
        return self._go_on()

    def timed_out(self) -> list[LeadAction]:
        """The update takes too long. Whoever is waited for is named; receivers that do not answer are dropped."""
        if self.phase == "arriving":
            return self._finish(*(f"trainer rank {rank} did not call update()" for rank in sorted(self._waiting)))
        if self.phase in ("beginning", "publishing", "aborting"):
            names = sorted(self._waiting)
            actions: list[LeadAction] = [Dismiss(name) for name in names]
            if self.phase == "beginning":
                for name in names:
                    self.receivers.pop(name, None)
                    self.arrivals.pop(name, None)
                    self.current.discard(name)
                    self._taking_part.discard(name)
                return [*actions, *self._fail(*(f"receiver {name} did not answer in time" for name in names))]
            for name in names:
                actions += self.receiver_lost(name)
            return actions
        if self.phase == "writing":
            late = [f"trainer rank {rank} did not finish writing in time" for rank in sorted(self._writing)]
            for name in sorted(self._landing):
                why = self._doubts.get(name, "")
                late.append(f"receiver {name} did not get everything in time{': ' * bool(why)}{why}")
            return self._fail(*late)
        if self.phase == "stopping":
            everybody = tuple(self._taking_part)
            self._unquiet |= dict.fromkeys(self._writing, everybody)
            self._writing = set()
            return self._go_on()
        return []

    # ---- how phases follow -------------------------------------------------------------------------------------------
    def _expected(self, name: str, attempt: int, phase: Phase) -> bool:
        return attempt == self.attempt and self.phase == phase and name in self._waiting

    def _go_on(self) -> list[LeadAction]:
        if self.phase == "arriving" and not self._waiting:
            self.phase = "beginning"
            self._taking_part = set(self.receivers) - (self.current if self._only_new else set())
            self._waiting = set(self._taking_part)
            begin: list[LeadAction] = [
                ToReceiver(
                    name,
                    Begin(
                        self.version,
                        self.attempt,
                        self.receivers[name],
                        self.arrivals[name],
                        self._checksum,
                        self._only_new,
                    ),
                )
                for name in sorted(self._taking_part)
            ]
            return [*begin, *self._go_on()]
        if self.phase == "beginning" and not self._waiting:
            self.phase = "writing"
            self._writing = set(self.trainers)
            self._landing = set(self._taking_part)
            return [ToTrainer(rank, Go(self.version, self.attempt, dict(self._imms))) for rank in sorted(self.trainers)]
        if self.phase == "writing" and not self._writing and not self._landing:
            wrong = [name for name in sorted(self._taking_part) if self._sums.get(name, 0) % (1 << 64)]
            if self._checksum and wrong:
                return self._fail(*(f"receiver {name}: the checksum of what has landed is wrong" for name in wrong))
            self.phase = "deciding"
            return [Decide(self.version, self.attempt)]
        if self.phase == "stopping" and not self._writing:
            self.phase = "aborting"
            self._waiting = set(self._taking_part)
            abort: list[LeadAction] = [
                ToReceiver(name, Abort(self.attempt, self._cut(name))) for name in sorted(self._taking_part)
            ]
            return [*abort, *self._go_on()]
        if self.phase in ("publishing", "aborting") and not self._waiting:
            return self._finish()
        return []

    def _cut(self, name: str) -> tuple[str, ...]:
        """Trainers that a receiver must cut off: nobody has confirmed that they are quiet."""
        ranks = set(self.lost) | {rank for rank, names in self._unquiet.items() if name in names}
        return tuple(self.trainers[rank] for rank in sorted(ranks))

    def _fail(self, *problems: str) -> list[LeadAction]:
        self._problems += problems
        if self.phase == "stopping":
            return self._go_on()
        stop: list[LeadAction] = [ToTrainer(rank, Stop(self.attempt)) for rank in sorted(self._writing)]
        self.phase = "stopping"
        return [*stop, *self._go_on()]

    def _finish(self, *problems: str) -> list[LeadAction]:
        self._problems += problems
        self.phase = "idle"
        self._waiting, self._taking_part = set(), set()
        ended = tuple(self._problems)
        tell: list[LeadAction] = [
            ToTrainer(rank, End(self.version, self.attempt, ended))
            for rank in sorted(self.trainers)
            if rank not in self.lost
        ]
        return [*tell, Done(self.version, ended)]
