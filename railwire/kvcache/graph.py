"""Layers that a kernel reports: under a CUDA graph no Python runs between the layers, but a kernel can count them.

A watched word of memory is incremented once per layer, in the order of the layers, by a kernel that is captured into
the graph after each layer's K and V are written (or by anyone). The watcher sees it move, possibly by several at
once, and pushes those layers.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from railwire.kvcache.push import Push

log = logging.getLogger("railwire.kvcache")

if TYPE_CHECKING:
    from railwire.kvcache.sender import Sender
    from railwire.watcher import Watcher


class LayerWatcher:
    """Pushes layer after layer as a word of memory counts up.

    Args:
        sender: of the rank whose layers are counted.
        layers: global indices in the order in which they are computed; all of the rank's if None.

    Attributes:
        watcher: ``watcher.address`` is what the kernel increments, by one per layer, forward pass after forward pass.

    Raises:
        ValueError: layers that the rank does not hold, or none.
    """

    def __init__(self, sender: Sender, layers: Sequence[int] | None = None) -> None:
        held = [storage.layer for storage in sender.layout.layers]
        self.layers = tuple(held if layers is None else layers)
        if not self.layers or not set(self.layers) <= set(held):
            raise ValueError(f"layers {list(self.layers)} are not of this rank, which holds {held}")
        self._pushing = threading.RLock()  # held while layers are pushed, so that withdraw() can wait for that
        self._lock = threading.Lock()  # of what follows
        self._steps: deque[list[tuple[Push, int]]] = deque()
        self._place = 0  # in self.layers, of the first step
        self.lost_counts = 0
        """Counts for which no step had been announced: the kernel ran more often than begin_step() was called."""
        self.watcher: Watcher = sender.engine.watch(self._moved)

    def begin_step(self, items: Iterable[tuple[Push, int]]) -> None:
        """Announces a forward pass, before it is launched: when it has counted a layer, the KV of tokens
        0..``end_token`` of that layer is complete for each (push, end_token).

        Raises:
            ValueError: tokens whose blocks have not been named.
        """
        step = list(items)
        for push, end_token in step:
            push.check(self.layers[0], end_token)
        with self._lock:
            self._steps.append(step)

    def withdraw(self, push: Push) -> None:
        """Before ``push.withdraw_blocks()``: what the announced steps have yet to count is not pushed for this request,
        whose blocks will hold something else by then. Returns when no layer of it is being pushed."""
        with self._pushing, self._lock:
            for step in self._steps:
                step[:] = [item for item in step if item[0] is not push]

    @property
    def pending_steps(self) -> int:
        """Announced steps that have not been counted to their last layer."""
        with self._lock:
            return len(self._steps)

    def close(self) -> None:
        """Stops watching. Layers that have not been counted are not pushed."""
        self.watcher.close()

    def _moved(self, old: int, new: int) -> None:
        for _ in range(new - old):
            with self._pushing:
                with self._lock:
                    if not self._steps:
                        self.lost_counts += 1
                        continue
                    step, layer = self._steps[0], self.layers[self._place]
                    self._place += 1
                    if self._place == len(self.layers):
                        self._place = 0
                        self._steps.popleft()
                push_layer(layer, step)


def push_layer(layer: int, items: Iterable[tuple[Push, int]]) -> None:
    """``layer_ready()`` for each; what cannot be pushed is aborted, so that who waits for it is told, and the others go
    on."""
    for push, end_token in items:
        try:
            push.layer_ready(layer, end_token)
        except Exception as error:  # of whatever kind: on this thread nobody else would tell the decoder
            log.exception("the push of request %s is given up at layer %d", push.request_id, layer)
            push.abort(f"layer {layer} cannot be pushed: {error}")
