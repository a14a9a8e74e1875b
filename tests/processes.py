"""Other processes for tests: each runs named functions of the test modules, one at a time, at the test's word.

A test calls ``child.call(function, ...)``; the child imports the module that holds the function and runs
``function(state, ...)`` in its own main thread, where ``state`` lives as long as the child. Arguments and results are
plain values. Every wait is bounded, children die with the test process, and :class:`Children` leaves none behind.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parent
CALL_SECONDS = 30.0
EXIT_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1

State = SimpleNamespace


class ChildError(Exception):
    """A function in a child raised; the text is the child's traceback."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class ChildTimeout(ChildError):
    """A child did not answer in time."""


class Child:
    """One child process.

    Args:
        name: for messages.
        prefix: what to put before the Python command, such as ``["ip", "netns", "exec", NAME]``.
    """

    def __init__(self, name: str = "child", prefix: Sequence[str] = ()) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [*prefix, sys.executable, str(Path(__file__).resolve()), str(fd), str(os.getpid())], pass_fds=[fd]
            )
            self._connection = Connection(ours.detach())
        self._running = ""
        self.pid = int(self._receive(CALL_SECONDS))

    # ---- functions ---------------------------------------------------------------------------------------------------
    def call(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_SECONDS, **kwargs: Any) -> Any:
        """Runs ``function(state, *args, **kwargs)`` in the child and returns its result.

        Raises:
            ChildError: it raised. ChildTimeout: it did not return in ``timeout`` seconds.
        """
        self.begin(function, *args, **kwargs)
        return self.answer(timeout)

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Starts it; :meth:`answer` gets the result."""
        assert not self._running, f"{self.name} still runs {self._running}"
        self._running = function.__name__
        self._connection.send((function.__module__, function.__qualname__, args, kwargs))

    def answer(self, timeout: float = CALL_SECONDS) -> Any:
        """The result of what begin() started."""
        ok, *result = self._receive(timeout)
        self._running = ""
        if ok:
            return result[0]
        raise ChildError(result[0], f"{self.name}: {result[1]}")

    def _receive(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            raise ChildTimeout(
                "timeout", f"{self.name} did not answer within {timeout:g} s (runs {self._running or 'up'})"
            )
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self.wait(EXIT_SECONDS)
            raise ChildError("exit", f"{self.name} ended with {code} while it ran {self._running or 'up'}") from None

    # ---- the process -------------------------------------------------------------------------------------------------
    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.signal(signal.SIGKILL)
        self.wait(EXIT_SECONDS)

    def stop(self) -> None:
        """SIGSTOP; returns when all its threads stand."""
        self.signal(signal.SIGSTOP)
        deadline = time.monotonic() + EXIT_SECONDS
        while any(state != "T" for state in self._thread_states()):
            if time.monotonic() > deadline:
                raise ChildTimeout("timeout", f"{self.name} does not stop")
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, number)

    def finish(self, timeout: float = EXIT_SECONDS) -> int:
        """Asks the child to leave its main function and returns the exit code."""
        try:
            self._connection.send(None)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return self.wait(timeout)

    def wait(self, timeout: float = EXIT_SECONDS) -> int:
        """The exit code; negative: the signal that ended it."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ChildTimeout("timeout", f"{self.name} did not end within {timeout:g} s") from None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it by all means."""
        if self._process.poll() is None and not self._running:
            try:
                self.resume()
                self.finish()
            except ChildTimeout:
                pass
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait(EXIT_SECONDS)
        self._connection.close()

    def _thread_states(self) -> list[str]:
        states = []
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            states.append(stat.read_text().rpartition(")")[2].split()[0])
        return states


class Children:
    """All children of one test; the ``children`` fixture."""

    def __init__(self) -> None:
        self._all: list[Child] = []

    def spawn(self, name: str = "child", prefix: Sequence[str] = ()) -> Child:
        child = Child(name, prefix)
        self._all.append(child)
        return child

    def close(self) -> None:
        for child in reversed(self._all):
            child.close()


def _main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    del parent  # behind `ip netns exec` the parent is still the same process: it execs, it does not fork
    sys.path.insert(0, str(TESTS))
    connection = Connection(fd)
    connection.send(os.getpid())
    state = State()
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        if request is None:
            return
        module, name, args, kwargs = request
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            reply = (True, function(state, *args, **kwargs))
        except Exception as error:
            reply = (False, type(error).__name__, traceback.format_exc())
        connection.send(reply)


if __name__ == "__main__":
    _main()
