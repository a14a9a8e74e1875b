"""How the router talks to instances, without saying by what means; and what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from railwire.errors import RailwireError
from railwire.kvcache.router.membership import Member

Blame = Literal["prefiller", "decoder", "pair", "request"]


class RouteFailed(RailwireError):
    """The request got no answer: every attempt failed, or its time is up. It may be sent again."""


class NoMembers(RouteFailed):
    """There is no prefiller, or no decoder, that fits."""


class RequestRefused(RailwireError):
    """An instance says that this request cannot be (too long, tokens outside the vocabulary): sending it again is of
    no use."""


class LegFailed(RailwireError):
    """One leg of an attempt failed.

    Attributes:
        blame: whose failure it was; "pair": these two do not fit together; "request": it will fail anywhere.
        busy: it is well, but takes no more for now (draining, no free blocks).
    """

    def __init__(self, message: str, *, blame: Blame, busy: bool = False) -> None:
        super().__init__(message)
        self.blame: Blame = blame
        self.busy = busy


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. The random number of a token comes from the seed and its position alone, so an
    answer that is continued elsewhere stays the same."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class RouteRequest:
    """What a client wants.

    Attributes:
        id: unique; attempts are named ``id.1``, ``id.2``, ...
        tokens: the prompt, at least one.
        stop_tokens: ids that end the answer; they are not part of it.
        timeout: seconds for everything.
    """

    id: str
    model: str
    tokens: tuple[int, ...]
    max_tokens: int
    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    timeout: float = 600.0


@dataclass(frozen=True)
class PrefillLeg:
    """Compute the KV of all ``tokens`` but the last, and push it to whoever comes with a ticket for ``request_id``."""

    request_id: str
    tokens: tuple[int, ...]
    timeout: float


@dataclass(frozen=True)
class DecodeLeg:
    """Get the KV of ``tokens`` from ``prefiller`` (None: there is nothing to compute before the first step), and
    generate."""

    request_id: str
    tokens: tuple[int, ...]
    max_tokens: int
    prefiller: Member | None
    stop_tokens: tuple[int, ...]
    sampling: Sampling
    timeout: float


@dataclass(frozen=True)
class DecodeEvent:
    """What a decoder reports.

    Attributes:
        kind: "accepted" (with ``need_prefill``, ``cached_tokens``), "ticket" (sent), "arrived", "token", "end" (with
            ``reason`` "stop" or "length"), "alive" (nothing new, but it is there).
        token: of "token".
        info: the rest, as it came; times are seconds of the decoder's monotonic clock.
    """

    kind: str
    token: int = -1
    info: dict[str, Any] = field(default_factory=dict)


class Transport(Protocol):
    """Cancelling what is awaited here, or closing the iterator, must make the instance stop that leg."""

    async def prefill(self, member: Member, leg: PrefillLeg) -> dict[str, Any]:
        """Ends when everything has been pushed; returns the leg's timeline. Raises LegFailed."""

    def decode(self, member: Member, leg: DecodeLeg) -> AsyncIterator[DecodeEvent]:
        """Ends after "end". Raises LegFailed."""
