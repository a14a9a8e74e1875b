"""What the two ends of a KV-cache transfer say to each other, over the engine's messages.

Receiver (decode) to sender (prefill): ``Hello``, ``Coming``, ``Request``, ``Blocks``, ``Cancel``, ``Decline``.
Sender to receiver: ``Welcome``, ``Refused``, ``Accepted``, ``Ended``, ``Sums``. The engine delivers messages between
two incarnations in order and once.
"""

from __future__ import annotations

import zlib
from typing import Annotated

import msgspec

from railwire.errors import DescriptorError
from railwire.wire import UNREADABLE

VERSION = 3
MAGIC = b"RWKV"
MAX_LAYOUT_BYTES = 8 << 20
BLOCKS_PER_MESSAGE = 12_000  # of 4 bytes each: a message has at most 60 KiB
SUMS_PER_MESSAGE = 6_000  # of 8 bytes each
MAX_REASON = 2_000
MAX_NAME = 1_000  # characters of the name of a request (the prefiller remembers many) or of an instance
CANCELLED = "cancelled"  # the reason of an end that the receiver has asked for


class Hello(msgspec.Struct, tag="hello", frozen=True, array_like=True):
    """A receiver introduces itself: its layout (packed), its regions, and the plan it has computed."""

    version: int
    rank: int
    layout: bytes
    regions: tuple[bytes, ...]
    digest: bytes


class Welcome(msgspec.Struct, tag="welcome", frozen=True, array_like=True):
    """The sender has computed the same plan."""

    digest: bytes


class Refused(msgspec.Struct, tag="refused", frozen=True, array_like=True):
    """The sender cannot serve this receiver."""

    digest: bytes
    reason: str


class Coming(msgspec.Struct, tag="coming", frozen=True, array_like=True):
    """The receiver will ask for this request, as soon as it has room for it: a ticket or ``Decline`` follows, or this
    connection ends."""

    request_id: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]


class Request(msgspec.Struct, tag="request", frozen=True, array_like=True):
    """A ticket: where the pages of a request go, and which immediate counts them.

    ``instance`` is whom the ticket is for. ``blocks`` are the destination blocks from position
    ``first_block`` on, little-endian uint32, continued in ``Blocks`` until ``num_blocks`` have come. ``destinations``
    is the number of tickets that the sender gets for this request, one per destination rank that it serves.
    """

    ticket: int
    instance: str
    request_id: str
    imm: int
    first_token: int
    num_tokens: int
    first_block: int
    num_blocks: int
    blocks: bytes
    destinations: int
    tail: bytes  # descriptor of the slice that the tail data goes to; empty: none asked of this sender
    checksum: bool


class Blocks(msgspec.Struct, tag="blocks", frozen=True, array_like=True):
    """More destination blocks of a ticket."""

    ticket: int
    blocks: bytes


class Cancel(msgspec.Struct, tag="cancel", frozen=True, array_like=True):
    """The receiver wants no more: answered by ``Ended`` once nothing of it can land any more."""

    ticket: int


class Decline(msgspec.Struct, tag="decline", frozen=True, array_like=True):
    """The receiver will send no ticket for this request: it has the KV already, or wants it no more."""

    request_id: str
    reason: str


class Accepted(msgspec.Struct, tag="accepted", frozen=True, array_like=True):
    """The sender has the request of this ticket, in its queue or under way: the ticket ends with its pages or with
    ``Ended``, however long that takes."""

    ticket: int


class Ended(msgspec.Struct, tag="ended", frozen=True, array_like=True):
    """Nothing of this ticket is under way any more, and nothing of it will land. The negative completion of a ticket
    that failed, and the answer to ``Cancel``."""

    ticket: int
    reason: str


class Sums(msgspec.Struct, tag="sums", frozen=True, array_like=True):
    """Checksums of what was sent, little-endian uint64 from unit ``first`` on."""

    ticket: int
    first: int
    sums: bytes


Message = Hello | Welcome | Refused | Coming | Request | Blocks | Cancel | Decline | Accepted | Ended | Sums

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return MAGIC + _encoder.encode(message)


def is_ours(data: bytes) -> bool:
    """Whether a message of the engine belongs to the KV-cache protocol."""
    return data[:4] == MAGIC


def decode(data: bytes) -> Message:
    """Raises DescriptorError for anything that is not a message of this protocol."""
    if not is_ours(data):
        raise DescriptorError("not a KV-cache message")
    try:
        message: Message = _decoder.decode(data[4:])
    except UNREADABLE as error:
        raise DescriptorError(f"a KV-cache message that cannot be read: {error}") from error
    return message


def pack(data: bytes) -> bytes:
    """Layouts repeat themselves layer after layer: packed they fit into one message."""
    return zlib.compress(data, 6)


def unpack(data: bytes) -> bytes:
    """Raises DescriptorError for what is no packed layout, or one beyond 8 MiB."""
    unpacker = zlib.decompressobj()
    try:
        result = unpacker.decompress(data, MAX_LAYOUT_BYTES)
    except zlib.error as error:
        raise DescriptorError(f"a packed layout that cannot be read: {error}") from error
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise DescriptorError("a packed layout that is cut off or larger than 8 MiB")
    return result
