"""When is a layer's KV in memory? On a CPU when its attention has returned; on a GPU when the stream gets there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from vllm.logger import init_logger

from railwire.cuda import StreamWord
from railwire.errors import RailwireError
from railwire.integrations.vllm.stats import RailwireStats
from railwire.kvcache import LayerWatcher, Push, Sender

log = init_logger("vllm.railwire")

Items = Sequence[tuple[Push, int]]


class LayerClock(Protocol):
    """Pushes the layers of a step as they are done."""

    def begin(self, items: Items) -> None:
        """A step begins that computes KV of these pushes, up to these tokens."""

    def layer(self, layer: int) -> None:
        """Called where the layer's attention is called, in the order of the layers."""

    def end(self) -> float:
        """The step's forward pass has been called; returns the time (monotonic) that counts as its end."""

    def close(self) -> None: ...


class CpuClock:
    """Attention has written the layer's KV when it returns."""

    def __init__(self, sender: Sender, stats: RailwireStats) -> None:
        self.sender = sender
        self.stats = stats
        self._items: Items = ()

    def begin(self, items: Items) -> None:
        self._items = items

    def layer(self, layer: int) -> None:
        if not self._items:
            return
        began = time.perf_counter()
        try:
            self.sender.layer_ready(layer, self._items)
        except (ValueError, RailwireError) as error:
            # The engine goes on; who waits for these pages is told.
            log.exception("railwire: layer %d cannot be pushed", layer)
            for push, _ in self._items:
                push.abort(f"layer {layer} cannot be pushed: {error}")
            self._items = ()
        self.stats.layer(time.perf_counter() - began)

    def end(self) -> float:
        self._items = ()
        return time.monotonic()

    def close(self) -> None:
        self._items = ()


class CudaClock:
    """A word of memory is written by the stream behind each layer's attention; a watcher pushes what it counts.

    No CUDA call waits here, and none is made on the engine's thread.
    """

    def __init__(self, sender: Sender, layers: Sequence[int], stats: RailwireStats) -> None:
        self.stats = stats
        self._layers = tuple(layers)
        self._watcher = LayerWatcher(sender, layers)
        self._word = StreamWord(self._watcher.watcher.address)
        self._count = 0
        self._next = 0
        self._active = False

    def begin(self, items: Items) -> None:
        self._active = bool(items)
        self._next = 0
        if items:
            self._watcher.begin_step(items)

    def layer(self, layer: int) -> None:
        if not self._active:
            return
        began = time.perf_counter()
        # The watcher counts; that the layers come in the order it knows is checked, not assumed.
        if layer != self._layers[self._next]:
            raise RailwireError(f"layer {layer} was computed where layer {self._layers[self._next]} was due")
        self._next += 1
        self._count += 1
        self._word.write(self._count, torch.cuda.current_stream().cuda_stream)
        self.stats.layer(time.perf_counter() - began)

    def end(self) -> float:
        self._active = False
        return time.monotonic()

    def close(self) -> None:
        self._watcher.close()
        self._word.close()
