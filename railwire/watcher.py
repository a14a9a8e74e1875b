"""Watchers: a word of memory that a GPU kernel (or anyone) increments, and a callback for when it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from railwire import _native
from railwire.dispatcher import dispatcher
from railwire.owner import Owner
from railwire.words import words_at


class Watched(Owner, Protocol):
    """An engine, seen by its words."""

    def _forget_word(self, watcher_id: int) -> None:
        """Its callbacks are not wanted any more."""


class Watcher:
    """Made by ``engine.watch(callback)``."""

    def __init__(self, engine: Watched, native: _native.Watcher, callback: Callable[[int, int], object]) -> None:
        self._engine = engine
        self._native = native
        self._callback = callback
        self._closed = False

    @property
    def id(self) -> int:
        return self._native.id

    @property
    def address(self) -> int:
        """Where the word lies in this process; it has a page of memory to itself."""
        return self._native.address

    @property
    def word(self) -> npt.NDArray[np.uint64]:
        """The word as a numpy array of one uint64. Only one thread (or kernel) should write to it."""
        return words_at(self.address, 1, self._native)

    def close(self) -> None:
        """No callback begins after this returns, but for one that is running."""
        self._closed = True
        self._engine._forget_word(self.id)
        if not self._engine.closed:
            self._engine._native.unwatch(self._native)

    def _moved(self) -> None:
        old, new = self._native.take()
        if old != new and not self._closed:
            dispatcher.call(self._callback, old, new)
