"""The messages of the version protocol, and how they travel (msgpack). The machines that send and take them are
``lead_machine`` and ``receiver_machine``; what they mean together stands in the former.
"""

from __future__ import annotations

from typing import Any

import msgspec


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# ---- lead to receivers, and back -------------------------------------------------------------------------------------
class Begin(_Message, frozen=True):
    """``arrivals``: how many pages each trainer (by incarnation, hex) writes. ``again``: the version is published
    already, and goes to those who do not have it."""

    version: int
    attempt: int
    digest: bytes
    arrivals: dict[str, int]
    checksum: bool = False
    again: bool = False


class Ready(_Message, frozen=True):
    attempt: int
    imm: int


class Refused(_Message, frozen=True):
    attempt: int
    reason: str


class Has(_Message, frozen=True):
    """Instead of Ready, where Begin said ``again``: has caught up meanwhile."""

    attempt: int


class Landed(_Message, frozen=True):
    """``checksum``: of what has landed, where Begin asked for it."""

    attempt: int
    checksum: int | None = None


class Broken(_Message, frozen=True):
    attempt: int
    reason: str


class Publish(_Message, frozen=True):
    version: int
    attempt: int


class Published(_Message, frozen=True):
    attempt: int


class Abort(_Message, frozen=True):
    """``cut``: incarnations (hex) of trainers that have not confirmed that they are quiet."""

    attempt: int
    cut: tuple[str, ...]


class Aborted(_Message, frozen=True):
    attempt: int


# ---- lead to trainers, and back --------------------------------------------------------------------------------------
class Prepare(_Message, frozen=True):
    """A trainer's answer is Arrived, once it has the plans of these cohorts and connections to their receivers."""

    version: int
    attempt: int
    cohorts: tuple[int, ...]


class Arrived(_Message, frozen=True):
    """``version``: what this rank's own user wants to publish. ``problem``: why this rank cannot take part."""

    version: int
    attempt: int
    problem: str = ""


class Go(_Message, frozen=True):
    """``imms``: by receiver, the immediate of its counter."""

    version: int
    attempt: int
    imms: dict[str, int]


class Wrote(_Message, frozen=True):
    """``failed``: receivers to which something failed, with the reason. Nothing is under way any more, but to
    ``unquiet``."""

    attempt: int
    failed: dict[str, str]
    unquiet: tuple[str, ...] = ()
    checksums: dict[str, int] = {}


class Stop(_Message, frozen=True):
    """Ends a trainer's writing; it answers with Wrote."""

    attempt: int


class End(_Message, frozen=True):
    """How the update ended: no problems, it is published."""

    version: int
    attempt: int
    problems: tuple[str, ...]


# ---- between receivers: catching up ---------------------------------------------------------------------------------
class Which(_Message, frozen=True):
    """To a receiver that may hold a version; it answers with Holds."""

    attempt: int


class Holds(_Message, frozen=True):
    """``epoch``: the life of the trainers in which the version was published. -1: nothing that could be given now."""

    attempt: int
    epoch: int
    version: int


class Fetch(_Message, frozen=True):
    """Write your part of the plan that lies in the store under the asking receiver's ``slot``; answered with Gave or
    Declined.

    Attributes:
        index: of the holder in that plan.
        digest: of its part.
        epoch, version: what is asked for.
        imm: of the counter.
    """

    attempt: int
    slot: int
    index: int
    digest: bytes
    epoch: int
    version: int
    imm: int
    checksum: bool = False


class Gave(_Message, frozen=True):
    """Everything has landed, and was of that version from the first byte to the last."""

    attempt: int
    checksum: int = 0


class Declined(_Message, frozen=True):
    attempt: int
    reason: str


Message = (
    Begin
    | Ready
    | Refused
    | Has
    | Landed
    | Broken
    | Publish
    | Published
    | Abort
    | Aborted
    | Prepare
    | Arrived
    | Go
    | Wrote
    | Stop
    | End
    | Which
    | Holds
    | Fetch
    | Gave
    | Declined
)

BETWEEN_RECEIVERS = (Which, Holds, Fetch, Gave, Declined)

_decoder = msgspec.msgpack.Decoder(Message)
MAGIC = b"RWW1"


def encode(message: _Message) -> bytes:
    return MAGIC + msgspec.msgpack.encode(message)


def decode(data: bytes) -> Any:
    """Raises ValueError for bytes that are no message of this protocol."""
    if data[:4] != MAGIC:
        raise ValueError("not a message of the weights protocol")
    try:
        return _decoder.decode(data[4:])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"a malformed message: {error}") from error
