"""Outcomes: what a ticket, its pages and a push end as. Awaitable from any event loop, waitable from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import TimeoutError as ConcurrentTimeout
from typing import Any, Generic, TypeVar

from railwire.dispatcher import dispatcher

T = TypeVar("T")


class Outcome(Generic[T]):
    """Ends once, with a value or an exception."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._future: ConcurrentFuture[T] = ConcurrentFuture()

    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout: float | None = None) -> T:
        """Blocks until the end; returns the value or raises the failure. TimeoutError: it is still to come."""
        try:
            return self._future.result(timeout)
        except ConcurrentTimeout:
            if self._future.done():
                raise
            raise TimeoutError(f"{self._what} has not ended after {timeout} s") from None

    def exception(self) -> BaseException | None:
        """Why it failed; None if it did not, or not yet."""
        return self._future.exception() if self._future.done() else None

    def add_done_callback(self, callback: Callable[[Outcome[T]], object]) -> None:
        """Calls ``callback(self)`` on the dispatcher at the end (soon, if that has been)."""
        self._future.add_done_callback(lambda _: dispatcher.soon(lambda: dispatcher.call(callback, self)))

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._shielded()).__await__()

    def _shielded(self) -> ConcurrentFuture[T]:
        """A future of the waiter's own: a task that is cancelled while it waits takes only this one with it."""
        mine: ConcurrentFuture[T] = ConcurrentFuture()

        def pass_on(source: ConcurrentFuture[T]) -> None:
            if not mine.set_running_or_notify_cancel():
                return
            error = source.exception()
            if error is not None:
                mine.set_exception(error)
            else:
                mine.set_result(source.result())

        self._future.add_done_callback(pass_on)
        return mine

    def _resolve(self, value: T) -> None:
        self._future.set_result(value)

    def _fail(self, error: BaseException) -> None:
        self._future.set_exception(error)
