"""Signatures of what stands in a registry, so that it is believed only from those who know the secret.

A registry can be written by whoever reaches it. Each entry carries an HMAC-SHA256 (RFC 2104) of its bytes and of the
place where it stands, so that it is worth nothing elsewhere. Whoever can write to the registry can still delete
entries: that costs service, and sends nobody's prompts to strangers.
"""

from __future__ import annotations

import hashlib
import hmac
import logging

import msgspec

from railwire.kvcache.router.membership import MembershipError

log = logging.getLogger("railwire.kvcache.router")

_PURPOSE = "railwire member"  # the same secret proves other things elsewhere
_SIZE = 32


class Seal:
    """Of one registry client.

    Args:
        secret: None or empty: nothing is signed, and everything is believed.
    """

    def __init__(self, secret: str | None) -> None:
        self._key = secret.encode() if secret else b""
        self._refused = 0

    def close(self, data: bytes, *place: str) -> bytes:
        """The bytes to store at this place."""
        return self._sign(data, place) + data if self._key else data

    def open(self, data: bytes, *place: str) -> bytes:
        """What was stored at this place. Raises MembershipError if it is not signed with our secret."""
        if not self._key:
            return data
        signature, rest = data[:_SIZE], data[_SIZE:]
        if not hmac.compare_digest(signature, self._sign(rest, place)):
            raise MembershipError("an entry that is not signed with our secret")
        return rest

    def ignored(self, count: int, where: str) -> None:
        """So many entries were not believed, or could not be read: says so in the log when there are more than
        before."""
        if count > self._refused:
            log.warning(
                "railwire: %d entries of the registry at %s are not believed: they are not signed with our secret, or "
                "are no members. Is --secret the same everywhere?",
                count,
                where,
            )
        self._refused = count

    def _sign(self, data: bytes, place: tuple[str, ...]) -> bytes:
        return hmac.new(self._key, msgspec.msgpack.encode((_PURPOSE, place, data)), hashlib.sha256).digest()
