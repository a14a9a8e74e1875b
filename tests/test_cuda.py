"""Watched words that a GPU writes to, from a stream and under a CUDA graph. Skipped where there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from railwire import TransferEngine
from railwire.cuda import StreamWord
from railwire.kvcache import InstanceLayout, LayerWatcher, Receiver, Sender, paged_instance
from railwire.testing import SimulatedFabric

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

LAYERS, BLOCKS = 8, 64
SHAPE = {"model": "m", "kv_heads": 4, "head_bytes": 256, "num_blocks": BLOCKS, "block_tokens": 16, "placement": "one"}


def settle(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def engines() -> Iterator[list[TransferEngine]]:
    with SimulatedFabric() as fabric:
        made = [TransferEngine(nics=[fabric.nic(name)]) for name in ("p", "d")]
        yield made
        for engine in made:
            engine.close()


def test_a_stream_writes_a_watched_word(engines: list[TransferEngine]) -> None:
    torch.zeros(1, device="cuda")  # makes the context current
    seen: list[int] = []
    watcher = engines[0].watch(lambda old, new: seen.append(new))
    word = StreamWord(watcher.address)
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(200_000_000)  # about 0.1 s: the write must come behind it
    began = time.monotonic()
    word.write(5, stream.cuda_stream)
    assert time.monotonic() - began < 0.05  # and nobody waits
    assert not seen
    assert settle(lambda: bool(seen) and seen[-1] == 5)
    word.close()
    watcher.close()


@pytest.mark.parametrize("how", ["stream", "graph"])
def test_layers_are_pushed_as_the_gpu_writes_them(engines: list[TransferEngine], how: str) -> None:
    """A kernel writes a layer's KV (to pinned memory, which the simulated NIC reads), the next counts it."""
    torch.zeros(1, device="cuda")  # makes the context current
    layout: InstanceLayout = paged_instance(stages=[range(LAYERS)], **SHAPE)
    nbytes = layout.ranks[0].region_bytes[0]
    source = torch.zeros(nbytes, dtype=torch.uint8).pin_memory()
    target = np.zeros(nbytes, np.uint8)
    sender = Sender(engines[0], layout, 0, [engines[0].register(source.numpy())])
    receiver = Receiver(engines[1], layout, 0, [engines[1].register(target)])
    watcher = LayerWatcher(sender)
    word = StreamWord(watcher.watcher.address)
    counter = torch.as_tensor(word, device="cuda")
    per_layer = nbytes // LAYERS
    fresh = torch.zeros(per_layer, dtype=torch.uint8, device="cuda")
    work = torch.randn(1024, 1024, device="cuda")

    def forward() -> None:
        for layer in range(LAYERS):
            for _ in range(20):
                torch.mm(work, work)  # the layer's computing
            fresh.add_(1)
            source[layer * per_layer : (layer + 1) * per_layer].copy_(fresh, non_blocking=True)
            counter.add_(1)

    graph = None
    if how == "graph":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.mm(work, work)
            fresh.add_(0)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
    link = receiver.connect([sender.descriptor])
    for round_number in range(5):
        tokens = BLOCKS * 16
        ticket = receiver.prepare(link, f"r{round_number}", np.arange(BLOCKS), tokens)
        push = sender.open(f"r{round_number}", tokens)
        push.append_blocks(range(BLOCKS))
        watcher.begin_step([(push, tokens)])
        if graph is not None:
            graph.replay()
        else:
            forward()
        ticket.wait(20)
        push.done.wait(20)
        torch.cuda.synchronize()
        assert (target == source.numpy()).all()
        first = (round_number * LAYERS + 1) % 256
        assert int(target[0]) == first and int(target[-1]) == (first + LAYERS - 1) % 256
        assert push.timeline.layers[0].posted <= push.timeline.layers[LAYERS - 1].posted
    assert watcher.lost_counts == 0 and watcher.pending_steps == 0
    watcher.close()
    word.close()
    sender.close()
    receiver.close()
