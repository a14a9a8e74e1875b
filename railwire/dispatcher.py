"""The process's one dispatcher: the thread on which callbacks run.

Native workers never run Python. They put events into a queue; this thread takes them out and calls whoever registered.
An exception in user code is logged, counted and stops nothing; a callback that blocks delays others, never a NIC.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from railwire import _native

log = logging.getLogger("railwire")

_BATCH = 256
_POLL_SECONDS = 60.0


class EventSink(Protocol):
    """What an engine does with the events that carry its tag."""

    def _on_message(self, peer_id: int, message: bytes) -> None: ...
    def _on_peer_up(self, peer_id: int) -> None: ...
    def _on_peer_lost(self, peer_id: int) -> None: ...
    def _on_unreached(self, peer_id: int, reason: bytes) -> None: ...
    def _on_watcher(self, watcher_id: int) -> None: ...
    def _on_action(self, watcher_id: int) -> None: ...
    def _on_handshake(self, nic: int, frame: bytes) -> None: ...
    def _on_forked(self) -> None: ...


class Dispatcher:
    """Threads, tokens and engines of this process. One instance: :data:`dispatcher`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counter = itertools.count(1)
        self._pending: dict[int, Callable[[], None]] = {}
        self._owners: dict[int, object] = {}
        self._engines: weakref.WeakValueDictionary[int, EventSink] = weakref.WeakValueDictionary()
        self._started = False
        self._stops_at_exit = False
        self._life = 0  # one more in each child of fork()
        self._threads: list[threading.Thread] = []
        self._ident = 0  # of the thread that runs callbacks
        self.callback_errors = 0

    def register_engine(self, engine: EventSink) -> int:
        """A tag for the engine's events; starts the threads at the first call."""
        tag = next(self._counter)
        self._engines[tag] = engine
        with self._lock:
            if not self._started:
                self._started = True
                for name, target in (("railwire-dispatch", self._run), ("railwire-connect", self._run_handshakes)):
                    thread = threading.Thread(target=target, name=name, daemon=True)
                    thread.start()
                    self._threads.append(thread)
                if not self._stops_at_exit:
                    self._stops_at_exit = True
                    atexit.register(self._stop)
        return tag

    def when_finished(self, operation: _native.Operation, callback: Callable[[], None]) -> None:
        """Calls ``callback`` once, on the dispatcher, when the operation has ended (also if it already has)."""
        token = next(self._counter)
        self._pending[token] = callback
        if not operation.notify(token):
            self._pending.pop(token, None)
            self.soon(callback)

    def soon(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` on the dispatcher."""
        token = next(self._counter)
        self._pending[token] = callback
        _native.push_finished(token)

    def keep(self, owner: object) -> int:
        """Keeps ``owner`` alive until the native side says that nothing uses its memory any more."""
        token = next(self._counter)
        self._owners[token] = owner
        return token

    def drop(self, token: int) -> None:
        self._owners.pop(token, None)

    def check_elsewhere(self, what: str) -> None:
        """Raises RuntimeError on the dispatcher's own thread: it would wait for what only it can bring."""
        if threading.get_ident() == self._ident:
            raise RuntimeError(
                f"{what} in a callback would wait for the thread that it runs on: railwire calls all callbacks of the "
                "process on one thread. Add a done callback, or wait in a thread or an event loop of your own"
            )

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Runs user code: an exception is logged and counted."""
        try:
            callback(*args)
        except Exception:
            self.callback_errors += 1
            log.exception("railwire: exception in callback %r", callback)

    def _run(self) -> None:
        self._ident = threading.get_ident()
        life = self._life
        while life == self._life:
            for kind, tag, value, data in _native.next_events(_POLL_SECONDS, _BATCH):
                if kind == "stop" or life != self._life:  # a callback has forked: the child's events are not these
                    return
                try:
                    self._handle(kind, tag, value, data)
                except Exception:  # our own code: must not end the thread
                    log.exception("railwire: cannot handle event %s", kind)

    def _handle(self, kind: str, tag: int, value: int, data: bytes) -> None:
        if kind == "finished":
            callback = self._pending.pop(value, None)
            if callback is not None:
                self.call(callback)
            return
        if kind == "release":
            self._owners.pop(value, None)
            return
        engine = self._engines.get(tag)
        if engine is None:
            return
        if kind == "message":
            engine._on_message(value, data)
        elif kind == "peer_up":
            engine._on_peer_up(value)
        elif kind == "peer_lost":
            engine._on_peer_lost(value)
        elif kind == "unreached":
            engine._on_unreached(value, data)
        elif kind == "watcher":
            engine._on_watcher(value)
        elif kind == "action":
            engine._on_action(value)

    def _run_handshakes(self) -> None:
        while True:
            for kind, tag, value, data in _native.next_handshakes(_POLL_SECONDS, _BATCH):
                if kind == "stop":
                    return
                engine = self._engines.get(tag)
                if engine is None:
                    continue
                try:
                    engine._on_handshake(value, data)
                except Exception:
                    log.exception("railwire: cannot handle a handshake frame")

    def _on_forked(self) -> None:
        """In the child of a fork: threads, callbacks and engines are the parent's; all begins anew. What the parent's
        engines keep alive stays, because a destructor has no business in this process."""
        self._lock = threading.Lock()
        self._pending = {}
        self._started = False
        self._life += 1
        self._threads = []
        self._ident = 0
        inherited, self._engines = list(self._engines.values()), weakref.WeakValueDictionary()
        for engine in inherited:
            engine._on_forked()

    def _stop(self) -> None:
        _native.stop_events()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)


dispatcher = Dispatcher()


def _after_fork_in_child() -> None:
    _native.after_fork_in_child()
    dispatcher._on_forked()


os.register_at_fork(
    before=_native.before_fork,
    after_in_parent=_native.after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
