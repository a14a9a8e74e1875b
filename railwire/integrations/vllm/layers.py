"""When is a layer's KV in memory? On a CPU when its attention has returned; on a GPU when the stream gets there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

import torch
from vllm.logger import init_logger

from railwire.cuda import StreamWord
from railwire.integrations.vllm.stats import RailwireStats
from railwire.kvcache import LayerWatcher, Push, Sender
from railwire.kvcache.steps import Items, LayerSteps, Step, fail_missing

log = init_logger("vllm.railwire")

_JOIN_SECONDS = 30.0  # posting a layer takes less than a millisecond


class LayerClock(Protocol):
    """Pushes the layers of a step as they are done, by the contract of :mod:`railwire.kvcache.steps`. Neither way does
    the thread that computes make the push itself: it only says that a layer is done. Nothing here raises for what a
    step does: an exception would end the engine."""

    def begin(self, items: Items, layers: Sequence[int]) -> None:
        """A step begins that computes KV of these pushes, up to these tokens, and is to save these layers."""

    def layer(self, layer: int) -> None:
        """Called where the layer's attention is called, in any order. A layer that is not this step's, or has been
        saved in it before, is passed over."""

    def end(self) -> float:
        """The step's forward pass has been called: the pushes of a layer that it did not save fail. Returns the time
        (monotonic) that counts as its end."""

    def withdraw(self, push: Push) -> None:
        """The blocks of this push are about to hold something else: returns when no layer of earlier steps will be
        pushed from them any more."""

    def close(self) -> None: ...


class _Clock:
    """What both have in common: the step that is being computed."""

    def __init__(self, stats: RailwireStats) -> None:
        self.stats = stats
        self._step: Step | None = None

    def end(self) -> float:
        step, self._step = self._step, None
        if step is not None:
            missing = fail_missing(step)
            if missing:
                log.warning(
                    "railwire: a step did not save layers %s: the pushes of its %d requests fail",
                    missing,
                    len(step.items),
                )
        return time.monotonic()


class CpuClock(_Clock):
    """Attention has written the layer's KV when it returns; a thread of this object's pushes it.

    To be made where threads may run on other cores than those that compute.
    """

    def __init__(self, stats: RailwireStats) -> None:
        super().__init__(stats)
        self._steps = LayerSteps()
        self._saved: SimpleQueue[bool] = SimpleQueue()  # one for each layer; False: no more comes
        self._thread = threading.Thread(target=self._push, name="railwire-layers", daemon=True)
        self._thread.start()

    def begin(self, items: Items, layers: Sequence[int]) -> None:
        if items:
            self._step = Step(items, layers)
            self._steps.begin(self._step)

    def layer(self, layer: int) -> None:
        if self._step is None:
            return
        began = time.perf_counter()
        if self._step.save(layer):
            self._saved.put(True)
        self.stats.layer(time.perf_counter() - began)

    def withdraw(self, push: Push) -> None:
        self._steps.withdraw(push)

    def close(self) -> None:
        self.end()
        self._saved.put(False)  # behind the layers so far, which are pushed yet
        self._thread.join(_JOIN_SECONDS)

    def _push(self) -> None:
        while self._saved.get():
            self._steps.advance()


class CudaClock(_Clock):
    """A word of memory is written by the stream behind each layer's attention; a watcher pushes what it counts. Which
    layer a count is of stands in the step, in the order in which the stream was given them.

    No CUDA call waits here, and none is made on the engine's thread.

    Args:
        layers: of the steps that do not say theirs.
    """

    def __init__(self, sender: Sender, layers: Sequence[int], stats: RailwireStats) -> None:
        super().__init__(stats)
        self._layers = tuple(layers)
        self._watcher = LayerWatcher(sender, layers)
        self._word = StreamWord(self._watcher.watcher.address)
        self._count = 0

    def begin(self, items: Items, layers: Sequence[int] | None = None) -> None:
        if items:
            self._step = Step(items, self._layers if layers is None else layers)
            self._watcher.begin_step(self._step)

    def layer(self, layer: int) -> None:
        if self._step is None:
            return
        began = time.perf_counter()
        if self._step.save(layer):
            self._count += 1
            self._word.write(self._count, torch.cuda.current_stream().cuda_stream)
        self.stats.layer(time.perf_counter() - began)

    def withdraw(self, push: Push) -> None:
        self._watcher.withdraw(push)

    def close(self) -> None:
        self.end()
        self._watcher.close()
        self._word.close()
