"""Layers that a kernel reports: under a CUDA graph no Python runs between the layers, but a kernel can count them.

A watched word of memory is incremented once per layer, in the order of the layers, by a kernel that is captured into
the graph after each layer's K and V are written (or by anyone). The watcher sees it move, possibly by several at
once, and pushes those layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from railwire.kvcache.push import Push
from railwire.kvcache.steps import LayerSteps, Step

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
        self._steps = LayerSteps()
        self.lost_counts = 0
        """Counts for which no layer had been announced: the kernel ran more often than begin_step() was called."""
        self.watcher: Watcher = sender.engine.watch(self._moved)

    def begin_step(self, step: Step | Iterable[tuple[Push, int]]) -> None:
        """Announces a forward pass, before it is launched.

        Args:
            step: (push, end_token) of each request: when the pass has counted a layer, the KV of tokens
                0..``end_token`` of that layer is complete, for all :attr:`layers` in their order. Or a
                :class:`~railwire.kvcache.steps.Step`, whose layers are those that it is told to be saved, in that
                order; each must have been told before it is counted.

        Raises:
            ValueError: tokens whose blocks have not been named.
        """
        if not isinstance(step, Step):
            step = Step(list(step), self.layers)
            for push, end_token in step.items:
                push.check(self.layers[0], end_token)
            for layer in self.layers:
                step.save(layer)
            step.end()
        self._steps.begin(step)

    def withdraw(self, push: Push) -> None:
        """Before ``push.withdraw_blocks()``: what the announced steps have yet to count is not pushed for this request,
        whose blocks will hold something else by then. Returns when no layer of it is being pushed."""
        self._steps.withdraw(push)

    @property
    def pending_steps(self) -> int:
        """Announced steps that have not been counted to their last layer."""
        return self._steps.pending

    def close(self) -> None:
        """Stops watching. Layers that have not been counted are not pushed."""
        self.watcher.close()

    def _moved(self, old: int, new: int) -> None:
        for _ in range(new - old):
            if not self._steps.advance():
                self.lost_counts += 1
