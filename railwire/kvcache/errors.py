"""Errors of KV-cache transfers."""

from __future__ import annotations

from railwire.errors import RailwireError


class TicketError(RailwireError):
    """A ticket did not end with its pages here.

    Attributes:
        request_id: of the request.
        reusable: the destination pages can no longer be written. False only where a lost peer writes by itself (shm)
            and its process may still run: then ``ticket.reusable`` ends when it has gone.
    """

    def __init__(self, message: str, *, request_id: str, reusable: bool = True) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.reusable = reusable


class TicketFailed(TicketError):
    """The prefiller failed, vanished or refused; or the pages did not come in time. The prefill may be repeated
    elsewhere, on fresh pages, or on these if ``reusable``."""


class TicketCancelled(TicketError):
    """cancel() was called, here."""


class ChecksumMismatch(TicketFailed):
    """All pages arrived, but their contents are not what was sent."""


class PushError(RailwireError):
    """The pages of a request did not (all) reach their decoder. The source pages may be reused."""

    def __init__(self, message: str, *, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class PushAborted(PushError):
    """abort() was called on the prefill side."""


class PushCancelled(PushError):
    """The decoder wants the pages no more."""
