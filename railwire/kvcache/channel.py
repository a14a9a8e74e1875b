"""The one handler of an engine's messages: hands those of the KV-cache protocol to its sender and its receiver."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from railwire.errors import DescriptorError, RailwireError
from railwire.kvcache.protocol import messages

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer
    from railwire.transfer import Transfer

log = logging.getLogger("railwire.kvcache")

Handler = Callable[["Peer", Any], None]

_FOR_SENDER = (
    messages.Hello,
    messages.Coming,
    messages.Request,
    messages.Blocks,
    messages.Cancel,
    messages.Decline,
)


class Channel:
    """Made by :func:`channel_of`; an engine has one. It takes over ``engine.on_message``; messages that are not of
    this protocol go to :attr:`other`.
    """

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = weakref.ref(engine)  # the engine holds us
        self.sender: Handler | None = None
        self.receiver: Handler | None = None
        self.other: Callable[[Peer, bytes], object] | None = None
        self.bad_messages = 0
        engine.on_message(self._on_message)

    def send(self, peer: Peer, message: messages.Message) -> Transfer | None:
        """None if the peer is gone: whoever depends on it learns that from its loss."""
        engine = self._engine()
        if engine is None:
            return None
        try:
            return engine.send(peer, messages.encode(message))
        except RailwireError:
            return None

    def _on_message(self, peer: Peer, data: bytes) -> None:
        if not messages.is_ours(data):
            if self.other is not None:
                self.other(peer, data)
            return
        try:
            message = messages.decode(data)
            handler = self.sender if isinstance(message, _FOR_SENDER) else self.receiver
            if handler is None:
                raise DescriptorError(f"{type(message).__name__} reached an engine that has no handler for it")
            handler(peer, message)
        except DescriptorError as error:
            self.bad_messages += 1
            log.warning("railwire: dropped a KV-cache message of %s: %s", peer.name, error)


_lock = threading.Lock()
_channels: weakref.WeakKeyDictionary[TransferEngine, Channel] = weakref.WeakKeyDictionary()


def channel_of(engine: TransferEngine) -> Channel:
    """The channel of this engine."""
    with _lock:
        channel = _channels.get(engine)
        if channel is None:
            channel = _channels[engine] = Channel(engine)
        return channel
