"""Incoming messages, for threads and for event loops."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from railwire.dispatcher import dispatcher
from railwire.errors import ClosedError, check_seconds
from railwire.peer import Peer
from railwire.transfer import resolve

Item = tuple[Peer, bytes]


class MessageQueue:
    """Filled by the dispatcher; each message goes to one taker, thread or task."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: deque[Item] = deque()
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._closed = False

    def put(self, item: Item) -> None:
        with self._condition:
            self._items.append(item)
            self._condition.notify()
            self._wake_one()

    def close(self) -> None:
        """Everybody who waits gets ClosedError once the queue is empty."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            while self._waiters:
                self._wake_one()

    def get(self, timeout: float | None) -> Item:
        """Raises TimeoutError, ClosedError, and RuntimeError on the dispatcher, which brings the messages."""
        with self._condition:
            if timeout is not None:
                check_seconds(timeout)
            if timeout != 0 and not self._items and not self._closed:
                dispatcher.check_elsewhere("receive()")
            if not self._condition.wait_for(lambda: self._items or self._closed, timeout):
                raise TimeoutError(f"no message within {timeout} s")
            return self._take()

    async def get_async(self) -> Item:
        """Raises ClosedError, and RuntimeError on the dispatcher, which brings the messages."""
        while True:
            with self._condition:
                if self._items or self._closed:
                    return self._take()
                dispatcher.check_elsewhere("messages()")
                loop = asyncio.get_running_loop()
                waiter: asyncio.Future[None] = loop.create_future()
                self._waiters.append((loop, waiter))
            try:
                await waiter
            except asyncio.CancelledError:
                with self._condition:
                    if self._items:
                        self._wake_one()  # what woke us is for somebody else now
                raise

    def _take(self) -> Item:
        if not self._items:
            raise ClosedError("the engine is closed")
        return self._items.popleft()

    def _wake_one(self) -> None:
        while self._waiters:
            loop, waiter = self._waiters.popleft()
            if waiter.cancelled():
                continue
            try:
                loop.call_soon_threadsafe(resolve, waiter)
            except RuntimeError:
                continue  # its loop has been closed
            return
