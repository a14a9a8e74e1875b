"""One receiver of versions of weights, as a pure machine: see ``lead_machine`` for the protocol."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from railwire.weights.messages import Abort, Aborted, Begin, Broken, Landed, Publish, Published, Refused


class Reply(msgspec.Struct, frozen=True):
    message: Any


class Expect(msgspec.Struct, frozen=True):
    """Count so many pages; then landed(). ``Ready`` is sent by the shell, with the immediate."""

    attempt: int
    arrivals: dict[str, int]


class Drop(msgspec.Struct, frozen=True):
    """Forget what has landed, after ``cut`` can no longer write (None: nobody of this attempt); then dropped()."""

    attempt: int
    cut: tuple[str, ...] | None


class Apply(msgspec.Struct, frozen=True):
    """Make what has landed the weights that are served, as ``version``."""

    version: int


class Ask(msgspec.Struct, frozen=True):
    """The lead is gone: read what it has recorded; then verdict(). If it lives after all, it has lost us, and goes on
    without us: what we serve is a whole version either way."""

    version: int
    attempt: int


ReceiverAction = Reply | Expect | Drop | Apply | Ask
State = Literal["idle", "receiving", "landed", "dropping", "asking"]


class ReceiverMachine:
    """One receiver.

    Args:
        digest: of the plan that was made for it.
        in_place: writes land in the weights that are served: from Begin on they are nobody's version.
    """

    def __init__(self, digest: bytes, *, in_place: bool) -> None:
        self.digest = digest
        self.in_place = in_place
        self.state: State = "idle"
        self.version: int | None = None
        """Of the weights that may be served; None: they are no version at all."""
        self.newest = -1
        self._attempt = -1
        self._coming = -1
        self._answer = False

    def begin(self, message: Begin) -> list[ReceiverAction]:
        if self.state != "idle":
            return [Reply(Refused(message.attempt, f"is {self.state} version {self._coming}"))]
        if message.digest != self.digest:
            theirs, ours = message.digest.hex()[:8], self.digest.hex()[:8]
            return [Reply(Refused(message.attempt, f"the trainers' plan is {theirs}, its own {ours}"))]
        if message.version <= self.newest:
            return [Reply(Refused(message.attempt, f"version {message.version} does not follow {self.newest}"))]
        self.state, self._attempt, self._coming = "receiving", message.attempt, message.version
        if self.in_place:
            self.version = None
        return [Expect(message.attempt, message.arrivals)]

    def landed(self, attempt: int, checksum: int | None = None) -> list[ReceiverAction]:
        if self.state != "receiving" or attempt != self._attempt:
            return []
        self.state = "landed"
        return [Reply(Landed(attempt, checksum))]

    def broken(self, attempt: int, reason: str) -> list[ReceiverAction]:
        """It will not land. The lead will abort."""
        if self.state != "receiving" or attempt != self._attempt:
            return []
        return [Reply(Broken(attempt, reason))]

    def publish(self, message: Publish) -> list[ReceiverAction]:
        if self.state != "landed" or message.attempt != self._attempt or message.version != self._coming:
            return []
        return [*self._apply(), Reply(Published(message.attempt))]

    def abort(self, message: Abort) -> list[ReceiverAction]:
        if message.attempt != self._attempt or self.state not in ("receiving", "landed"):
            return [Reply(Aborted(message.attempt))] if self.state == "idle" else []
        self.state, self._answer = "dropping", True
        return [Drop(message.attempt, message.cut)]

    def lead_lost(self) -> list[ReceiverAction]:
        if self.state == "receiving":
            self.state, self._answer = "dropping", False
            return [Drop(self._attempt, None)]
        if self.state == "landed":
            self.state = "asking"
            return [Ask(self._coming, self._attempt)]
        self._answer = False
        return []

    def verdict(self, published: bool) -> list[ReceiverAction]:
        if self.state != "asking":
            return []
        if published:
            return self._apply()
        self.state, self._answer = "dropping", False
        return [Drop(self._attempt, None)]

    def dropped(self) -> list[ReceiverAction]:
        if self.state != "dropping":
            return []
        self.state = "idle"
        return [Reply(Aborted(self._attempt))] if self._answer else []

    def _apply(self) -> list[ReceiverAction]:
        self.state = "idle"
        self.version = self.newest = self._coming
        return [Apply(self._coming)]
