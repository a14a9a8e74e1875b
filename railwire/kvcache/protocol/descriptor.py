"""What a prefill rank says of itself to the world: where it is and how its KV lies."""

from __future__ import annotations

from typing import Annotated

import msgspec

from railwire.errors import DescriptorError
from railwire.kvcache.geometry.layout import InstanceLayout
from railwire.kvcache.protocol.messages import MAX_NAME, VERSION, pack, unpack
from railwire.peer import EngineAddress
from railwire.wire import UNREADABLE


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    version: int
    instance: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
    rank: int
    address: bytes
    layout: bytes


class RankDescriptor:
    """Opaque bytes that a router, a file or HTTP carries from a prefill rank to those who want KV from it.

    Attributes:
        instance: id of the instance; a restarted one has another.
        rank: index of this rank in ``layout.ranks``.
        address: of its engine.
        layout: of all ranks of the instance.
    """

    def __init__(self, instance: str, rank: int, address: EngineAddress, layout: InstanceLayout) -> None:
        self.instance = instance
        self.rank = rank
        self.address = address
        self.layout = layout

    def __bytes__(self) -> bytes:
        layout = pack(msgspec.msgpack.encode(self.layout))
        return msgspec.msgpack.encode(_Wire(VERSION, self.instance, self.rank, bytes(self.address), layout))

    @classmethod
    def from_bytes(cls, data: bytes) -> RankDescriptor:
        """Raises DescriptorError if the bytes are no descriptor of a rank, or one of another version."""
        try:
            wire = msgspec.msgpack.decode(data, type=_Wire)
            if wire.version != VERSION:
                raise DescriptorError(f"the prefiller speaks version {wire.version} of the KV protocol, we {VERSION}")
            layout = msgspec.msgpack.decode(unpack(wire.layout), type=InstanceLayout)
        except UNREADABLE as error:
            raise DescriptorError(f"not a descriptor of a prefill rank: {error}") from error
        if not 0 <= wire.rank < len(layout.ranks):
            raise DescriptorError(f"a descriptor of rank {wire.rank} of {len(layout.ranks)}")
        return cls(wire.instance, wire.rank, EngineAddress.from_bytes(wire.address), layout)

    def __repr__(self) -> str:
        return f"<RankDescriptor {self.instance} rank {self.rank} of {len(self.layout.ranks)} at {self.address!r}>"
