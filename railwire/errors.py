"""The errors of Railwire: one small tree under :class:`RailwireError`.

Bad arguments raise ``TypeError``, ``ValueError`` or ``IndexError`` (or a subclass named here) at the call and change
nothing. Everything that can go wrong later is a :class:`RailwireError` that names the peer, the NIC and the reason.
"""

from __future__ import annotations


class RailwireError(Exception):
    """Base of everything Railwire raises on its own account."""


class ConfigurationError(RailwireError, ValueError):
    """A NIC, an option or this machine's set-up is not usable as asked."""


class DescriptorError(RailwireError, ValueError):
    """Bytes that are no address or descriptor, or belong to another engine or incarnation."""


class StaleAddressError(DescriptorError):
    """The address or descriptor belongs to an earlier incarnation of a process that has restarted."""


class ClosedError(RailwireError):
    """The engine, region or peer has been closed."""


class ConnectError(RailwireError):
    """A connection could not be made."""


class ConnectTimeout(ConnectError, TimeoutError):
    """The peer did not answer in time."""


class AuthenticationError(ConnectError):
    """One side could not prove that it knows the secret."""


class FenceError(RailwireError):
    """A peer may still write: it did not confirm, and cutting it off does not stop it (shm). Do not reuse the pages
    before its process has ended."""


class TransferError(RailwireError):
    """A transfer or message failed.

    Attributes:
        peer: name of the peer, or None.
        nic: name of the NIC or link, or "".
        reason: one word: peer_lost, link_failed, remote_access, revoked, closed, local, cancelled.
        may_still_land: some of its bytes may still arrive at the destination, which could not be asked.
    """

    def __init__(
        self, message: str, *, peer: str | None = None, nic: str = "", reason: str = "", may_still_land: bool = False
    ) -> None:
        super().__init__(message)
        self.peer = peer
        self.nic = nic
        self.reason = reason
        self.may_still_land = may_still_land


class PeerLostError(TransferError):
    """The peer died, fell silent, or every link to it broke."""


class LinkError(TransferError):
    """The link or NIC that carried it failed."""


class RemoteAccessError(TransferError):
    """The peer's NIC refused the access: wrong key or range."""


class RevokedError(TransferError):
    """The peer has revoked the region; ask it for a new descriptor."""


class TransferCancelled(TransferError):
    """cancel() was called."""


class ExpectationError(RailwireError):
    """An expectation on a counter will not be reached."""

    def __init__(self, message: str, *, peer: str | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.peer = peer
        self.reason = reason


class ExpectationTimeout(ExpectationError, TimeoutError):
    """The arrivals did not come in time. The pages may be overwritten later: fence before you reuse them."""


class WriterFailed(ExpectationError):
    """A peer told us that its write failed or was cancelled."""


class WriterLost(ExpectationError, PeerLostError):
    """A peer that the expectation depends on is lost."""

    def __init__(self, message: str, *, peer: str | None = None, reason: str = "peer_lost") -> None:
        TransferError.__init__(self, message, peer=peer, reason=reason)


class ExpectationCancelled(ExpectationError):
    """cancel() was called."""


def check_seconds(timeout: float) -> float:
    """What is no number is no time: a comparison with it never comes true, so nothing would ever be late."""
    if timeout != timeout:
        raise ValueError("a timeout is a number of seconds, not nan")
    return timeout
