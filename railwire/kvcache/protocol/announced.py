"""What is known to come: requests that stand in the prefiller's own queue, and decoders that stand in theirs.

The plain time-outs are for what nobody has announced. An announcement replaces them by its end: a request that is
queued here is opened or refused; a decoder that has said that it is coming brings a ticket, declines, or its connection
ends. That wait alone has a bound in time, too: what has begun here holds blocks, and so do tickets there; instances
whose blocks are all held by requests that stand in each other's queues would wait for each other for ever.
"""

from __future__ import annotations

MAX_COMING = 4096  # requests that one decoder may have announced at a time


class Announced:
    """Of one sender; called under its lock. Decoders are known by the id of their peer: one connection of one rank."""

    def __init__(self) -> None:
        self._queued: set[str] = set()
        self._coming: dict[str, set[int]] = {}  # by request, never empty
        self._by_decoder: dict[int, set[str]] = {}  # the same, the other way round

    # ---- requests in our own queue -----------------------------------------------------------------------------------
    def queue(self, request_id: str) -> None:
        self._queued.add(request_id)

    def unqueue(self, request_id: str) -> None:
        self._queued.discard(request_id)

    def queued(self, request_id: str) -> bool:
        return request_id in self._queued

    # ---- decoders ----------------------------------------------------------------------------------------------------
    def come(self, decoder: int, request_id: str) -> bool:
        """Returns whether it is remembered: the plain time-out is for a decoder that announces too many."""
        requests = self._by_decoder.setdefault(decoder, set())
        if len(requests) >= MAX_COMING and request_id not in requests:
            return False
        requests.add(request_id)
        self._coming.setdefault(request_id, set()).add(decoder)
        return True

    def came(self, decoder: int, request_id: str) -> bool:
        """It is here, or comes no more. Returns whether it had been announced."""
        requests = self._by_decoder.get(decoder)
        if requests is None or request_id not in requests:
            return False
        requests.discard(request_id)
        if not requests:
            del self._by_decoder[decoder]
        decoders = self._coming[request_id]
        decoders.discard(decoder)
        if not decoders:
            del self._coming[request_id]
        return True

    def lost(self, decoder: int) -> list[str]:
        """Its connection has ended. Returns the requests for which nobody is coming any more."""
        requests = list(self._by_decoder.get(decoder, ()))
        for request_id in requests:
            self.came(decoder, request_id)
        return [request_id for request_id in requests if request_id not in self._coming]

    def anybody(self, request_id: str) -> bool:
        """Whether a decoder is coming for it."""
        return request_id in self._coming

    # ---- ends --------------------------------------------------------------------------------------------------------
    def over(self, request_id: str) -> None:
        """The request has ended here: whoever was coming for it learns that from the answer to its ticket."""
        self._queued.discard(request_id)
        for decoder in list(self._coming.get(request_id, ())):
            self.came(decoder, request_id)

    def clear(self) -> None:
        self._queued.clear()
        self._coming.clear()
        self._by_decoder.clear()

    def __len__(self) -> int:
        return len(self._queued) + sum(len(decoders) for decoders in self._coming.values())
