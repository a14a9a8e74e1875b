"""One receiver of versions of weights, as a pure machine: see ``lead_machine`` for the protocol.

Between updates it may *catch up*: other receivers, the holders, write the published version into its memory. It becomes
the version that is served once everything has landed and each holder has said that it *gave*: that its memory was of
that version from the first byte to the last. An update that begins meanwhile goes first: the holders are cut off, as
after any failure, before the update is taken part in.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from railwire.weights.messages import Abort, Aborted, Begin, Broken, Has, Landed, Publish, Published, Refused


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


class Fetch(msgspec.Struct, frozen=True):
    """Have the holders write, and count; then gave() for each of them, and caught()."""

    attempt: int


class Differs(msgspec.Struct, frozen=True):
    """What the holders have written is not what has landed; Drop follows."""


ReceiverAction = Reply | Expect | Drop | Apply | Ask | Fetch | Differs
State = Literal["idle", "receiving", "landed", "dropping", "asking", "catching"]


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
        self.coming = -1
        """Version that is received, or was last."""
        self._answer = False
        self._coming_here = False
        self._here = False  # the version was published by these trainers
        self.catching = -1
        """Attempt to catch up; no update's."""
        self.holders: set[str] = set()
        """Of whom it is not known yet that they gave."""
        self._all_landed = False
        self._sum = 0
        self._was_catching = False  # what is being dropped is no update
        self._next: Begin | None = None  # an update that waits for it

    # ---- an update ---------------------------------------------------------------------------------------------------
    def begin(self, message: Begin) -> list[ReceiverAction]:
        if self.state == "catching" or self._was_catching:
            self._next = message
            return self._end_catching() if self.state == "catching" else []
        if self.state != "idle":
            return [Reply(Refused(message.attempt, f"is {self.state} version {self.coming}"))]
        if message.digest != self.digest:
            theirs, ours = message.digest.hex()[:8], self.digest.hex()[:8]
            return [Reply(Refused(message.attempt, f"the trainers' plan is {theirs}, its own {ours}"))]
        if message.again and self._here and message.version == self.version:
            return [Reply(Has(message.attempt))]
        if message.version <= self.newest:
            return [Reply(Refused(message.attempt, f"version {message.version} does not follow {self.newest}"))]
        self.state, self._attempt, self.coming = "receiving", message.attempt, message.version
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
        if self.state != "landed" or message.attempt != self._attempt or message.version != self.coming:
            return []
        self._here = True
        return [*self._apply(), Reply(Published(message.attempt))]

    def abort(self, message: Abort) -> list[ReceiverAction]:
        if self.state == "catching" or self._was_catching:
            if self._next is not None and self._next.attempt == message.attempt:
                self._next = None
            return [Reply(Aborted(message.attempt))]  # nothing of an update has begun here
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
            return [Ask(self.coming, self._attempt)]
        self._answer, self._next = False, None
        return []

    def verdict(self, published: bool) -> list[ReceiverAction]:
        if self.state != "asking":
            return []
        if published:
            self._here = True
            return self._apply()
        self.state, self._answer = "dropping", False
        return [Drop(self._attempt, None)]

    def dropped(self) -> list[ReceiverAction]:
        if self.state != "dropping":
            return []
        self.state = "idle"
        if self._was_catching:
            self._was_catching, begin, self._next = False, self._next, None
            return self.begin(begin) if begin is not None else []
        return [Reply(Aborted(self._attempt))] if self._answer else []

    # ---- catching up -------------------------------------------------------------------------------------------------
    def lacks(self, version: int) -> bool:
        """Whether that version, which is published, would be a gain."""
        return version > self.newest or (self.version is None and version == self.newest)

    def catch(self, version: int, attempt: int, holders: frozenset[str], *, here: bool) -> list[ReceiverAction]:
        """These receivers hold a published version.

        Args:
            attempt: a number of the caller's, another one each time.
            here: it was published by the trainers that this machine takes part with.
        """
        if self.state != "idle" or not self.lacks(version):
            return []
        self.state, self.coming, self._coming_here = "catching", version, here
        self.catching = attempt
        self.holders, self._all_landed, self._sum = set(holders), False, 0
        if self.in_place:
            self.version = None
        return [Fetch(attempt)]

    def gave(self, holder: str, attempt: int, checksum: int) -> list[ReceiverAction]:
        if self.state != "catching" or attempt != self.catching or holder not in self.holders:
            return []
        self.holders.discard(holder)
        self._sum += checksum
        return self._caught_up()

    def caught(self, attempt: int, checksum: int) -> list[ReceiverAction]:
        """Everything has landed."""
        if self.state != "catching" or attempt != self.catching or self._all_landed:
            return []
        self._all_landed = True
        self._sum -= checksum
        return self._caught_up()

    def not_caught(self, attempt: int) -> list[ReceiverAction]:
        """A holder declined, or is lost, or takes too long."""
        if self.state != "catching" or attempt != self.catching:
            return []
        return self._end_catching()

    def _caught_up(self) -> list[ReceiverAction]:
        if not self._all_landed or self.holders:
            return []
        if self._sum % (1 << 64):
            return [Differs(), *self._end_catching()]
        self._here = self._coming_here
        return self._apply()

    def _end_catching(self) -> list[ReceiverAction]:
        self.state, self._answer, self._was_catching = "dropping", False, True
        return [Drop(self._attempt, None)]

    def _apply(self) -> list[ReceiverAction]:
        self.state = "idle"
        self.version = self.newest = self.coming
        return [Apply(self.coming)]
