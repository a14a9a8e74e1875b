"""Forward passes, and their layers as they get into memory: one contract for every clock that says when.

``begin(items, layers)`` announces a pass that computes KV of these requests and saves these layers; ``save(layer)`` is
called where a layer is saved, in whatever order; ``end()`` is called behind the last of them. A layer that is saved
again in the same pass (a drafter runs several times) was complete the first time, for what comes later lies behind the
announced tokens. A layer that is not saved will not be pushed by anybody: at the end its requests' pushes fail, so that
their decoders are told. When a saved layer is in memory, :meth:`LayerSteps.advance` pushes it; the clock calls that
once for each, in the order in which they were saved.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from railwire.kvcache.push import Push

log = logging.getLogger("railwire.kvcache")

Items = Sequence[tuple[Push, int]]
"""Of a pass: (push, end_token). When a layer has been saved, its KV of tokens 0..end_token is complete."""


class Step:
    """One forward pass. :meth:`save` and :meth:`end` are called by the thread that computes."""

    def __init__(self, items: Items, layers: Sequence[int]) -> None:
        self.items = list(items)
        self.saved: list[int] = []
        """In this order."""
        self.ended = False
        self._left = dict.fromkeys(layers)

    def save(self, layer: int) -> bool:
        """Returns whether it counts: the first time, for a layer of this pass."""
        if self.ended or layer not in self._left:
            return False
        del self._left[layer]
        self.saved.append(layer)
        return True

    def end(self) -> list[int]:
        """No more is saved. Returns the layers that are missing."""
        self.ended = True
        return list(self._left)


class LayerSteps:
    """The passes whose layers are not all in memory yet, in their order."""

    def __init__(self) -> None:
        self._pushing = threading.RLock()  # held while layers are pushed, so that withdraw() can wait for that
        self._lock = threading.Lock()  # of what follows
        self._steps: deque[Step] = deque()
        self._place = 0  # in the first step's saved layers

    def begin(self, step: Step) -> None:
        with self._lock:
            self._steps.append(step)

    def advance(self) -> bool:
        """One more saved layer is in memory: pushes it. Returns False if no layer has been saved for that."""
        with self._pushing:
            with self._lock:
                self._drop_ended()
                if not self._steps or self._place == len(self._steps[0].saved):
                    return False
                step = self._steps[0]
                layer = step.saved[self._place]
                self._place += 1
                items = list(step.items)
            push_layer(layer, items)
            return True

    def withdraw(self, push: Push) -> None:
        """Before ``push.withdraw_blocks()``: what the passes have yet to save is not pushed for this request, whose
        blocks will hold something else by then. Returns when no layer of it is being pushed."""
        with self._pushing, self._lock:
            for step in self._steps:
                step.items[:] = [item for item in step.items if item[0] is not push]

    @property
    def pending(self) -> int:
        """Passes whose last layer is not in memory."""
        with self._lock:
            self._drop_ended()
            return len(self._steps)

    def _drop_ended(self) -> None:
        while self._steps and self._steps[0].ended and self._place == len(self._steps[0].saved):
            self._steps.popleft()
            self._place = 0


def push_layer(layer: int, items: Iterable[tuple[Push, int]]) -> None:
    """``layer_ready()`` for each; what cannot be pushed is aborted, so that who waits for it is told, and the others go
    on."""
    for push, end_token in items:
        try:
            push.layer_ready(layer, end_token)
        except Exception as error:  # of whatever kind: on this thread nobody else would tell the decoder
            log.exception("the push of request %s is given up at layer %d", push.request_id, layer)
            push.abort(f"layer {layer} cannot be pushed: {error}")


def fail_missing(step: Step) -> list[int]:
    """Ends the pass: the pushes of a layer that it did not save fail. Returns these layers."""
    missing = step.end()
    if missing:
        for push, _ in list(step.items):
            push.abort(f"the forward pass did not save layers {missing}")
    return missing
