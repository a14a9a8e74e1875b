"""When is a layer's KV in memory? On a CPU when its attention has returned; on a GPU when the stream gets there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

import torch

from railwire.cuda import StreamWord
from railwire.errors import RailwireError
from railwire.integrations.vllm.stats import RailwireStats
from railwire.kvcache import LayerWatcher, Push, Sender
from railwire.kvcache.graph import push_layer

Items = Sequence[tuple[Push, int]]

_FLUSH_SECONDS = 30.0  # posting a layer takes less than a millisecond


class LayerClock(Protocol):
    """Pushes the layers of a step as they are done. Neither way does the thread that computes make the push itself: it
    only says that a layer is done."""

    def begin(self, items: Items) -> None:
        """A step begins that computes KV of these pushes, up to these tokens."""

    def layer(self, layer: int) -> None:
        """Called where the layer's attention is called, in the order of the layers."""

    def end(self) -> float:
        """The step's forward pass has been called; returns the time (monotonic) that counts as its end."""

    def withdraw(self, push: Push) -> None:
        """The blocks of this push are about to hold something else: returns when no layer of earlier steps will be
        pushed from them any more."""

    def close(self) -> None: ...


class CpuClock:
    """Attention has written the layer's KV when it returns; a thread of this object's pushes it.

    To be made where threads may run on other cores than those that compute.
    """

    def __init__(self, stats: RailwireStats) -> None:
        self.stats = stats
        self._items: Items = ()
        self._done: SimpleQueue[tuple[int, Items] | threading.Event | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._push, name="railwire-layers", daemon=True)
        self._thread.start()

    def begin(self, items: Items) -> None:
        self._items = items

    def layer(self, layer: int) -> None:
        if not self._items:
            return
        began = time.perf_counter()
        self._done.put((layer, self._items))
        self.stats.layer(time.perf_counter() - began)

    def end(self) -> float:
        self._items = ()
        return time.monotonic()

    def withdraw(self, push: Push) -> None:
        """Its layers have all been computed, so that they are posted now; they are waited for as what is under way."""
        self._flush()

    def close(self) -> None:
        self._items = ()
        self._done.put(None)  # behind the layers so far, which are pushed yet
        self._thread.join(_FLUSH_SECONDS)

    def _flush(self) -> None:
        """Returns when all layers so far have been pushed."""
        reached = threading.Event()
        self._done.put(reached)
        if self._thread.is_alive() and not reached.wait(_FLUSH_SECONDS):
            raise RailwireError(
                f"layers have not been pushed within {_FLUSH_SECONDS:g} s; what else keeps this process?"
            )

    def _push(self) -> None:
        while (work := self._done.get()) is not None:
            if isinstance(work, threading.Event):
                work.set()
            else:
                push_layer(*work)


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

    def withdraw(self, push: Push) -> None:
        self._watcher.withdraw(push)

    def close(self) -> None:
        self._watcher.close()
        self._word.close()
