"""Prefill and decode instances of any shape in one process, and what their memory should hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from railwire import MemoryRegion, TransferEngine
from railwire.kvcache import InstanceLayout, Push, Receiver, Sender, Ticket, paged_instance
from railwire.kvcache.geometry.checksum import destination_sums
from railwire.kvcache.protocol import messages
from railwire.testing import SimulatedFabric

UNTOUCHED = 0xEE
LAYERS = 4


def shape(tp: int = 1, pp: int = 1, block_tokens: int = 4, num_blocks: int = 24, **options: Any) -> InstanceLayout:
    stages = np.array_split(np.arange(LAYERS), pp)
    defaults: dict[str, Any] = {"model": "m", "kv_heads": 4, "head_bytes": 32}
    return paged_instance(
        stages=[[int(layer) for layer in stage] for stage in stages],
        tp_size=tp,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        **{**defaults, **options},
    )


class Instance:
    """Engines and memory of all ranks of an instance."""

    def __init__(self, layout: InstanceLayout, nics: Sequence[Sequence[str]], fill: int | None, **options: Any) -> None:
        self.layout = layout
        options.setdefault("liveness", 0.5)
        self.engines = [TransferEngine(nics=list(nics[rank]), **options) for rank in range(len(layout.ranks))]
        rng = np.random.default_rng(fill)
        self.regions: list[list[MemoryRegion]] = []
        for engine, rank in zip(self.engines, layout.ranks, strict=True):
            arrays = [np.full(nbytes, UNTOUCHED, np.uint8) for nbytes in rank.region_bytes]
            if fill is not None:
                arrays = [rng.integers(0, 256, nbytes, dtype=np.uint8) for nbytes in rank.region_bytes]
            self.regions.append([engine.register(array) for array in arrays])

    def close(self) -> None:
        for engine in self.engines:
            engine.close(0.5)


class Prefiller(Instance):
    def __init__(
        self,
        layout: InstanceLayout,
        nics: Sequence[Sequence[str]],
        fill: int = 1,
        ticket_timeout: float = 5.0,
        queue_timeout: float = 30.0,
        **options: Any,
    ) -> None:
        super().__init__(layout, nics, fill, **options)
        self.senders = [
            Sender(
                engine,
                layout,
                rank,
                self.regions[rank],
                instance_id=f"p{fill}",
                ticket_timeout=ticket_timeout,
                queue_timeout=queue_timeout,
            )
            for rank, engine in enumerate(self.engines)
        ]
        self.descriptors = [sender.descriptor for sender in self.senders]

    def open(self, request_id: str, num_tokens: int, blocks: Sequence[int]) -> list[Push]:
        pushes = [sender.open(request_id, num_tokens) for sender in self.senders]
        for push in pushes:
            push.append_blocks(blocks)
        return pushes

    def compute(self, pushes: Sequence[Push], end: int) -> None:
        """Every layer is said to be ready up to ``end``."""
        for push, rank in zip(pushes, self.layout.ranks, strict=True):
            for storage in rank.layers:
                push.layer_ready(storage.layer, end)

    def close(self) -> None:
        for sender in self.senders:
            sender.close(2.0)
        super().close()


class Decoder(Instance):
    def __init__(
        self, layout: InstanceLayout, nics: Sequence[Sequence[str]], liveness: float = 0.5, **options: Any
    ) -> None:
        super().__init__(layout, nics, None, liveness=liveness)
        self.receivers = [
            Receiver(engine, layout, rank, self.regions[rank], **options) for rank, engine in enumerate(self.engines)
        ]

    def prepare(
        self, prefiller: Prefiller, request_id: str, blocks: Sequence[int], num_tokens: int, **options: Any
    ) -> list[Ticket]:
        links = [receiver.connect(prefiller.descriptors) for receiver in self.receivers]
        return [
            receiver.prepare(link, request_id, blocks, num_tokens, **options)
            for receiver, link in zip(self.receivers, links, strict=True)
        ]

    def sums(self, unit: int, blocks: Sequence[int], first: int, end: int) -> npt.NDArray[np.uint64]:
        """Of what the whole instance holds, rank by rank."""
        return np.concatenate(
            [
                destination_sums([region.array for region in regions], layout, unit, blocks, first, end)
                for regions, layout in zip(self.regions, self.layout.ranks, strict=True)
            ]
        )

    def idle(self) -> bool:
        """Nothing of any ticket is left."""
        return all(
            receiver.open_tickets == 0 and receiver.slots.free == receiver.slots.count for receiver in self.receivers
        )

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close(2.0)
        super().close()


def sim_nics(fabric: SimulatedFabric, name: str, ranks: int, links: int = 1) -> list[list[str]]:
    return [[fabric.nic(f"{name}{rank}.{link}") for link in range(links)] for rank in range(ranks)]


def element(
    instance: Instance, layer: int, component: int, token: int, head: int, blocks: Sequence[int]
) -> bytes | None:
    """The bytes of one token of one global head, from the first rank that holds it."""
    for rank, layout in enumerate(instance.layout.ranks):
        for stored in layout.layers:
            storage = stored.storages[component] if stored.layer == layer else None
            if storage is None or not storage.first_head <= head < storage.first_head + storage.heads:
                continue
            page, inside = divmod(token, layout.block_tokens)
            at = storage.offset + blocks[page] * storage.page_stride + inside * storage.token_stride
            at += (head - storage.first_head) * storage.head_stride
            array = instance.regions[rank][storage.region].array
            return array[at : at + layout.components[component].head_bytes].tobytes()
    return None


def same(prefiller: Prefiller, decoder: Decoder, src: Sequence[int], dst: Sequence[int], tokens: Sequence[int]) -> bool:
    """Compares every element of these tokens, by its meaning."""
    components = decoder.layout.ranks[0].components
    layers = {stored.layer for rank in decoder.layout.ranks for stored in rank.layers}
    return all(
        element(prefiller, layer, c, token, head, src) == element(decoder, layer, c, token, head, dst)
        for layer in layers
        for c, component in enumerate(components)
        for token in tokens
        for head in range(component.heads)
    )


def settle(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Waits for it, and returns whether it has come true."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


Make = Callable[..., tuple[Prefiller, Decoder]]


@contextlib.contextmanager
def pairs(fabric: SimulatedFabric) -> Iterator[Make]:
    """Makes pairs of instances, and closes them."""
    made: list[Prefiller | Decoder] = []

    def build(
        source: InstanceLayout | None = None, destination: InstanceLayout | None = None, links: int = 1,
        liveness: float = 0.5, **options: Any,
    ) -> tuple[Prefiller, Decoder]:  # fmt: skip
        source, destination = source or shape(), destination or shape()
        prefiller = Prefiller(source, sim_nics(fabric, f"p{len(made)}", len(source.ranks), links), liveness=liveness)
        nics = sim_nics(fabric, f"d{len(made)}", len(destination.ranks), links)
        decoder = Decoder(destination, nics, liveness, **options)
        made.extend([decoder, prefiller])
        return prefiller, decoder

    yield build
    for instance in made:
        instance.close()


def link(prefiller: Prefiller, decoder: Decoder) -> None:
    for receiver in decoder.receivers:
        receiver.connect(prefiller.descriptors)


def expect(prefiller: Prefiller, request_id: str) -> None:
    for sender in prefiller.senders:
        sender.expect(request_id)


def announce(prefiller: Prefiller, decoder: Decoder, request_id: str) -> None:
    """And waits until the prefiller has heard it."""
    for receiver in decoder.receivers:
        receiver.announce(receiver.connect(prefiller.descriptors), request_id)
    heard(prefiller, decoder)


def heard(prefiller: Prefiller, decoder: Decoder) -> None:
    """Returns when everything that the decoder has sent so far has been dealt with: messages keep their order."""
    sent = sum(sender.refused_tickets for sender in prefiller.senders)
    for receiver in decoder.receivers:
        for source in receiver.connect(prefiller.descriptors).sources:
            # A ticket with a number that has been: refused, and nothing else.
            stale = messages.Request(0, "nobody", "nothing", 0, 0, 1, 0, 1, b"", 1, b"", False)
            receiver.channel.send(source.peer, stale)
            sent += 1
    assert settle(lambda: sum(sender.refused_tickets for sender in prefiller.senders) == sent)


def decline(prefiller: Prefiller, decoder: Decoder, request_id: str) -> None:
    for receiver in decoder.receivers:
        receiver.decline(receiver.connect(prefiller.descriptors), request_id, "not needed")


def nothing_is_left(prefiller: Prefiller, decoder: Decoder | None = None) -> bool:
    return settle(
        lambda: (
            all(s.open_pushes == s.open_tickets == s.announced == 0 for s in prefiller.senders)
            and (decoder is None or decoder.idle())
        )
    )
