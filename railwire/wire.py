"""What engines tell each other about themselves: addresses, descriptors and handshake frames, as msgpack.

Every message is a msgspec struct: decoding checks types, and the constraints here bound what a stranger can send.
Nothing is pickled.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from railwire.errors import DescriptorError

VERSION = 2

UNREADABLE = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""What msgspec and json raise for bytes that are not what they should be: the last for what is nested too deeply."""

Incarnation = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
U64 = Annotated[int, msgspec.Meta(ge=0)]
NicIndex = Annotated[int, msgspec.Meta(ge=0, lt=64)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Blob = Annotated[bytes, msgspec.Meta(max_length=1024)]
Key = Annotated[bytes, msgspec.Meta(max_length=256)]  # a NIC's, opaque; empty where the memory is not registered


class NicAddress(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One NIC of an engine: what kind it is, what people call it, and where its control endpoint is."""

    kind: Name
    name: Name
    control: Blob
    takes_all_memory: bool = True
    links: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1


class Address(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="railwire-address"):
    """Everything needed to connect to an engine."""

    version: int
    incarnation: Incarnation
    name: Name
    host: Name
    pid: U64
    pid_start: U64
    nics: Annotated[tuple[NicAddress, ...], msgspec.Meta(min_length=1, max_length=64)]


class Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="railwire-region"):
    """A region of an engine, or a slice of one: enough to write to it, or to read from it."""

    version: int
    incarnation: Incarnation
    region: U64
    region_nbytes: U64
    start: U64
    nbytes: U64
    keys: Annotated[tuple[Key, ...], msgspec.Meta(min_length=1, max_length=64)]
    readable_only: bool = False


class LinkHalf(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One side's half of a link: the local and remote NIC as its owner counts them, and its landing pad's key."""

    own_nic: NicIndex
    other_nic: NicIndex
    address: Blob
    pad: Key


Links = Annotated[tuple[LinkHalf, ...], msgspec.Meta(min_length=1, max_length=64)]


class Hello(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """Initiator: I want a connection to the engine with this incarnation."""

    version: int
    connection: U64
    target: Incarnation
    source: Address
    nonce: Incarnation


class Challenge(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """Acceptor: prove that you know the secret; here is my proof."""

    connection: U64
    nonce: Incarnation
    proof: Blob


class Request(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """Initiator: what I said at first and what you challenged me with (you have kept neither), my proof, and my halves
    of the links."""

    connection: U64
    hello: Hello
    nonce: Incarnation
    proof: Blob
    links: Links


class Accept(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """Acceptor: my halves; the connection stands."""

    connection: U64
    links: Links


class Refuse(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """Either side: no, and why."""

    connection: U64
    reason: Annotated[str, msgspec.Meta(max_length=32)]
    text: Annotated[str, msgspec.Meta(max_length=512)]


Handshake = Hello | Challenge | Request | Accept | Refuse

_encoder = msgspec.msgpack.Encoder()
_address = msgspec.msgpack.Decoder(Address)
_descriptor = msgspec.msgpack.Decoder(Descriptor)
_handshake: msgspec.msgpack.Decoder[Handshake] = msgspec.msgpack.Decoder(Handshake)

T = TypeVar("T")


def encode(message: msgspec.Struct) -> bytes:
    """To bytes."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise DescriptorError(f"these {len(data)} bytes are no {what}: {error}") from error


def decode_address(data: bytes) -> Address:
    """Raises DescriptorError if ``data`` is no address of this version."""
    address = _decode(_address, data, "engine address")
    if address.version != VERSION:
        raise DescriptorError(f"engine address of version {address.version}; this Railwire speaks {VERSION}")
    return address


def decode_descriptor(data: bytes) -> Descriptor:
    """Raises DescriptorError if ``data`` is no region descriptor of this version."""
    descriptor = _decode(_descriptor, data, "region descriptor")
    if descriptor.version != VERSION:
        raise DescriptorError(f"region descriptor of version {descriptor.version}; this Railwire speaks {VERSION}")
    if descriptor.start + descriptor.nbytes > descriptor.region_nbytes:
        raise DescriptorError("region descriptor whose slice lies outside its region")
    if max(descriptor.region, descriptor.region_nbytes) >= 1 << 64:
        raise DescriptorError("region descriptor with a value beyond 64 bits")
    return descriptor


def decode_handshake(data: bytes) -> Handshake:
    """Raises DescriptorError if ``data`` is no handshake frame."""
    message: Handshake = _decode(_handshake, data, "handshake frame")
    return message
