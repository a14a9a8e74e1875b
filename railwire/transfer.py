"""Futures: what every submission returns.

States: ``pending`` -> ``done`` | ``failed`` | ``cancelled``. There is no other end, and no time-out pretends to be one:
``wait(timeout)`` that runs out leaves the operation as it was.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from railwire import _native, cuda
from railwire.dispatcher import dispatcher
from railwire.errors import (
    ClosedError,
    ConfigurationError,
    ExpectationCancelled,
    ExpectationError,
    ExpectationTimeout,
    FenceError,
    LinkError,
    PeerLostError,
    RailwireError,
    RemoteAccessError,
    RevokedError,
    TransferCancelled,
    TransferError,
    WriterFailed,
    WriterLost,
    check_seconds,
)
from railwire.owner import Owner

T = TypeVar("T")
Self = TypeVar("Self", bound="Future[Any]")

_STATES = ("pending", "done", "failed", "cancelled")
_DONE = 1
_FOREVER = 1e12
_callbacks_lock = threading.Lock()  # of all futures: held for a moment, by those that have callbacks


def _on_forked() -> None:
    global _callbacks_lock
    _callbacks_lock = threading.Lock()


os.register_at_fork(after_in_child=_on_forked)


class Future(Generic[T]):
    """Something that ends once. Awaitable from any event loop, waitable from any thread.

    Cancelling a task that awaits a future does not cancel the operation behind it; :meth:`cancel` does.
    """

    __slots__ = ("__weakref__", "_callbacks", "_engine", "_operation")

    def __init__(self, engine: Owner, operation: _native.Operation) -> None:
        self._engine = engine
        self._operation = operation
        self._callbacks: list[Callable[[Any], object]] | None = None

    def done(self) -> bool:
        """True once it has ended, however it has."""
        return self._operation.done()

    @property
    def state(self) -> str:
        """``pending``, ``done``, ``failed`` or ``cancelled``."""
        return _STATES[self._operation.state]

    def wait(self, timeout: float | None = None) -> T:
        """Blocks (without the GIL) until the end, and returns the result or raises the failure.

        Args:
            timeout: seconds; None waits as long as it takes, which is bounded: a dead peer ends everything that
                depends on it within the liveness time.

        Raises:
            TimeoutError: still pending; the operation goes on.
            RuntimeError: pending, and this is a callback: all callbacks of the process would wait. ``wait(0)`` only
                looks, and may be called anywhere.
            RailwireError: it failed or was cancelled.
        """
        if timeout != 0 and not self._operation.done():
            self._engine._check_process()
            dispatcher.check_elsewhere("wait()")
        if not self._operation.wait(_FOREVER if timeout is None else max(check_seconds(timeout), 0.0)):
            raise TimeoutError(f"{self!r} is still pending after {timeout} s")
        return self._value() if self._operation.state == _DONE else self.result()

    def result(self) -> T:
        """The result of an ended future; raises the failure. ``RuntimeError`` while pending."""
        if not self.done():
            raise RuntimeError("still pending: wait() or await it first")
        error = self.exception()
        if error is not None:
            raise error
        return self._value()

    def exception(self) -> RailwireError | None:
        """Why it failed or was cancelled; None while pending and after success."""
        if self._operation.state in (0, 1):
            return None
        reason, peer_id, nic, message = self._operation.failure()
        return self._error(reason, self._engine._peer_name(peer_id), nic, message)

    def cancel(self) -> None:
        """Asks for the end and returns at once; the future ends when nothing of it is in a NIC's hands."""
        self._operation.cancel()

    def on(self: Self, stream: Any) -> Self:
        """Has a CUDA stream wait for the end: what is given to the stream after this call runs when this has ended. No
        CPU thread waits, and the stream's kernels find the bytes that have landed.

        The stream also goes on when this fails, is cancelled or times out: a kernel never hangs. So look at
        :meth:`exception` before you believe what was computed.

        Args:
            stream: a ``torch.cuda.Stream``, a CuPy stream, anything with ``__cuda_stream__``, or a ``CUstream`` handle
                as an int. Not one that is being captured into a graph: a replay would find the word raised.

        Returns:
            self.

        Raises:
            ConfigurationError: the driver refuses; its words are in the message.
        """
        cuda.let_stream_wait(self._operation, stream, self._engine.device)
        return self

    def add_done_callback(self: Self, callback: Callable[[Self], object]) -> None:
        """Calls ``callback(self)`` on the dispatcher thread once it has ended (soon, if it already has)."""
        self._engine._check_process()
        with _callbacks_lock:
            first = self._callbacks is None
            if self._callbacks is None:
                self._callbacks = []
            self._callbacks.append(callback)
        if first:
            dispatcher.when_finished(self._operation, self._run_callbacks)

    def __await__(self) -> Generator[Any, None, T]:
        if not self.done():
            self._engine._check_process()
            dispatcher.check_elsewhere("await")
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()

            def wake(_: Future[T]) -> None:
                try:
                    loop.call_soon_threadsafe(resolve, waiter)
                except RuntimeError:
                    pass  # the loop has been closed: nobody waits there any more

            self.add_done_callback(wake)
            yield from waiter
        return self.result()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state}>"

    def _run_callbacks(self) -> None:
        while True:
            with _callbacks_lock:
                callbacks, self._callbacks = self._callbacks or [], None
            if not callbacks:
                return
            for callback in callbacks:
                dispatcher.call(callback, self)

    def _value(self) -> T:
        return None  # type: ignore[return-value]

    def _error(self, reason: str, peer: str | None, nic: str, message: str) -> RailwireError:
        kind: type[TransferError]
        if reason == "closed":
            return ClosedError(message)
        if reason == "not_fenced":
            return FenceError(message)
        kind = {
            "peer_lost": PeerLostError,
            "link_failed": LinkError,
            "remote_access": RemoteAccessError,
            "revoked": RevokedError,
            "cancelled": TransferCancelled,
        }.get(reason, TransferError)
        return kind(message, peer=peer, nic=nic, reason=reason, may_still_land=self._operation.may_still_land)


def resolve(waiter: asyncio.Future[None]) -> None:
    """Wakes a coroutine, unless it has gone away meanwhile."""
    if not waiter.done():
        waiter.set_result(None)


class Transfer(Future[None]):
    """A submitted write, read, scatter or message.

    ``done``: every byte has landed. ``failed`` or ``cancelled``: no NIC holds any of it, and nothing more will land,
    unless :attr:`may_still_land` says that the destination could not be asked.
    """

    __slots__ = ()

    @property
    def may_still_land(self) -> bool:
        """After a failure: part of it may still land, because the destination could not confirm."""
        return self._operation.may_still_land

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        return self._operation.nbytes if isinstance(self._operation, _native.Transfer) else 0


class Fence(Future[None]):
    """Ends when a peer can no longer write; fails with :class:`FenceError` where that cannot be had."""

    __slots__ = ()

    def _error(self, reason: str, peer: str | None, nic: str, message: str) -> RailwireError:
        if reason == "local":
            return ConfigurationError(message)
        return super()._error(reason, peer, nic, message)


class Expectation(Future[None]):
    """Waits for arrivals at a counter, and consumes them."""

    __slots__ = ()

    def _error(self, reason: str, peer: str | None, nic: str, message: str) -> RailwireError:
        if reason == "closed":
            return ClosedError(message)
        if reason == "peer_lost":
            return WriterLost(message, peer=peer)
        kind = {
            "timeout": ExpectationTimeout,
            "writer_failed": WriterFailed,
            "cancelled": ExpectationCancelled,
        }.get(reason, ExpectationError)
        return kind(message, peer=peer, reason=reason)
