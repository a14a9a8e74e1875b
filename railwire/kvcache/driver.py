"""Runs a machine: feeds it events one after the other, and has its actions carried out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

S = TypeVar("S")
E = TypeVar("E")
A = TypeVar("A")


class Driver(Generic[S, E, A]):
    """Called under one lock.

    An action may lead to events at once (a write that is refused): they wait until the actions before them have been
    carried out, so that a machine is never in the middle of a step when the next begins.

    Args:
        state: the first.
        step: the machine.
        perform: carries out one action. What it raises is raised by :meth:`feed`, after everything else has been done.
    """

    def __init__(self, state: S, step: Callable[[S, E], tuple[S, Sequence[A]]], perform: Callable[[A], None]) -> None:
        self.state = state
        self._step = step
        self._perform = perform
        self._events: deque[E] = deque()
        self._running = False

    def feed(self, event: E) -> None:
        self._events.append(event)
        if self._running:
            return
        self._running = True
        failure: BaseException | None = None
        try:
            while self._events:
                self.state, actions = self._step(self.state, self._events.popleft())
                for action in actions:
                    try:
                        self._perform(action)
                    except BaseException as error:
                        failure = failure or error
        finally:
            self._running = False
        if failure is not None:
            raise failure
