"""The messages of an engine, in order, with room that is given back as they are taken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from railwire import _native
from railwire.dispatcher import dispatcher
from railwire.engine_core import EngineCore, SetUp
from railwire.errors import ClosedError
from railwire.messages import MessageQueue
from railwire.peer import Peer
from railwire.transfer import Transfer

MAX_MESSAGE_BYTES: int = _native.MAX_MESSAGE_BYTES
_CREDIT_BATCH = 1 << 20  # bytes of messages taken before the sender is told


class Messaging(EngineCore):
    """The part of ``TransferEngine`` that sends and receives messages."""

    def __init__(self, setup: SetUp) -> None:
        self._message_handler: Callable[[Peer, bytes], object] | None = None
        self._messages = MessageQueue()
        self._credits: dict[int, int] = {}
        super().__init__(setup)

    def send(self, peer: Peer, message: bytes | bytearray | memoryview) -> Transfer:
        """Sends a message, at most 60 KiB, whatever the NICs carry at once. In order, once.

        Done when the peer's engine has it. Waits for room while the peer's user has 16 MiB of messages still to take.

        Raises:
            ValueError: too long. Write such data into a registered region instead.
        """
        self._check_open()
        self._check_ours(peer)
        peer.check()
        data = bytes(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"a message has at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}: write() it into a region instead"
            )
        return Transfer(self, _native.send(self._native, peer._native, data))

    def on_message(self, handler: Callable[[Peer, bytes], object] | None) -> None:
        """Calls ``handler(peer, message)`` on the dispatcher, in order. None: back to receive() and messages()."""
        self._message_handler = handler

    def receive(self, timeout: float | None = None) -> tuple[Peer, bytes]:
        """The next message. Raises TimeoutError, ClosedError."""
        item = self._messages.get(timeout)
        self._message_taken(*item)
        return item

    async def messages(self) -> AsyncIterator[tuple[Peer, bytes]]:
        """``async for peer, message in engine.messages()``; ends when the engine is closed."""
        while True:
            try:
                item = await self._messages.get_async()
            except ClosedError:
                return
            self._message_taken(*item)
            yield item

    def _on_message(self, peer_id: int, message: bytes) -> None:
        with self._lock:
            peer = self._peers.get(peer_id)
        if peer is None:
            return
        handler = self._message_handler
        if handler is None:
            self._messages.put((peer, message))
        else:
            dispatcher.call(handler, peer, message)
            self._message_taken(peer, message)

    def _message_taken(self, peer: Peer, message: bytes) -> None:
        """Gives the sender room again, a batch at a time."""
        with self._lock:
            taken = self._credits.get(peer.id, 0) + len(message) + _native.MESSAGE_OVERHEAD
            self._credits[peer.id] = 0 if taken >= _CREDIT_BATCH else taken
        if taken >= _CREDIT_BATCH and not self._closed:
            self._native.message_taken(peer._native, taken)

    def _forget_credit(self, peer_id: int) -> None:
        """Of a peer that is lost."""
        self._credits.pop(peer_id, None)

    def _drop_messages(self) -> None:
        """In the child of a fork."""
        self._messages = MessageQueue()
        self._messages.close()
