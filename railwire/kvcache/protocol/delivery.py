"""A ticket on the prefill side as a pure machine: what has been posted for it, what NICs may still read.

Phases: ``waiting`` (its request is not open here) -> ``open`` -> ``sent`` (everything has landed); or, from the first
two, ``stopping`` -> ``stopped`` (nothing is under way, the receiver has been told).

At most one of ``Post``, ``SendTail`` and ``SendSums`` is with the shell at a time: the next comes after its ``Posted``,
so nothing is posted behind a failure. ``Forget`` comes once, when nothing is under way, and nothing follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

Phase = Literal["waiting", "open", "stopping", "sent", "stopped"]


class DeliveryState(msgspec.Struct, frozen=True):
    """Made by :func:`taken`.

    Attributes:
        peer: id of the receiver's connection.
        destinations: tickets that come for this request, one of each rank of the decoder that this sender serves.
        left: layers of which something is still to be posted.
        posted: tokens that have been posted, by layer, counted from token 0.
        tail, sums: still to be sent.
        posting: the shell is at it.
        under_way: transfers that have not ended.
        nbytes: posted so far.
        by_receiver: it was stopped because the receiver has asked for that, or is lost.
    """

    peer: int
    destinations: int
    first_token: int
    num_tokens: int
    unit_tokens: int
    checksum: bool
    left: frozenset[int]
    tail: bool
    sums: bool
    posted: dict[int, int]
    phase: Phase = "waiting"
    accepted: bool = False
    posting: bool = False
    under_way: int = 0
    nbytes: int = 0
    reason: str = ""
    by_receiver: bool = False

    @property
    def over(self) -> bool:
        """Nothing is under way, and nothing will be."""
        return self.phase in ("sent", "stopped")


def taken(
    peer: int,
    destinations: int,
    first_token: int,
    num_tokens: int,
    unit_tokens: int,
    layers: frozenset[int],
    *,
    tail: bool,
    checksum: bool,
) -> DeliveryState:
    """A ticket that has just come, for the tokens [first_token, num_tokens) of these layers."""
    left = layers if first_token < num_tokens else frozenset[int]()
    return DeliveryState(
        peer, destinations, first_token, num_tokens, unit_tokens, checksum, left, tail, checksum and bool(left), {}
    )


# ---- events ----------------------------------------------------------------------------------------------------------
class Expected(msgspec.Struct, frozen=True):
    """The request stands in this instance's queue."""


class Open(msgspec.Struct, frozen=True):
    """The request is open."""


class Posted(msgspec.Struct, frozen=True):
    """``Post``, ``SendTail`` or ``SendSums`` has been carried out; not to its end if ``error`` says why."""

    transfers: int = 0
    nbytes: int = 0
    error: str = ""


class TransferEnded(msgspec.Struct, frozen=True):
    """NICs are done with one transfer; with an ``error`` it has failed or was cancelled."""

    error: str = ""


class Stop(msgspec.Struct, frozen=True):
    """No more is to be sent."""

    reason: str
    by_receiver: bool = False


Event = Expected | Open | Posted | TransferEnded | Stop


# ---- actions ---------------------------------------------------------------------------------------------------------
class Accept(msgspec.Struct, frozen=True):
    """Tell the receiver that the request is here."""


class Post(msgspec.Struct, frozen=True):
    """Write the tokens [begin, end) of a layer; ``Posted`` follows."""

    layer: int
    begin: int
    end: int


class SendTail(msgspec.Struct, frozen=True):
    """Write the tail; ``Posted`` follows."""


class SendSums(msgspec.Struct, frozen=True):
    """Send the checksums of everything; ``Posted`` follows."""


class CancelTransfers(msgspec.Struct, frozen=True):
    """Cancel what is under way; ``TransferEnded`` follows for each."""


class ClearTimer(msgspec.Struct, frozen=True):
    """It waits for nothing any more that a timer bounds."""


class Tell(msgspec.Struct, frozen=True):
    """Tell the receiver that nothing more will land."""

    reason: str


class Forget(msgspec.Struct, frozen=True):
    """It is over: free what is kept of it."""


Action = Accept | Post | SendTail | SendSums | CancelTransfers | ClearTimer | Tell | Forget
_Result = tuple[DeliveryState, Sequence[Action]]


# ---- the machine -----------------------------------------------------------------------------------------------------
def step(state: DeliveryState, event: Event, ready: Mapping[int, int], tail: bool) -> _Result:
    """What an event makes of a ticket.

    Args:
        ready: of its request: tokens that are ready, by layer, counted from token 0.
        tail: the tail of its request is there.
    """
    before: Sequence[Action] = ()
    match event:
        case Expected() | Open():
            state, before = _accept(state, event)
        case Posted():
            under_way = state.under_way + event.transfers
            state = replace(state, posting=False, under_way=under_way, nbytes=state.nbytes + event.nbytes)
            if event.error:
                state, before = _stop(state, event.error, False)
        case TransferEnded():
            state = replace(state, under_way=state.under_way - 1)
            if event.error:
                state, before = _stop(state, event.error, False)
        case Stop():
            state, before = _stop(state, event.reason, event.by_receiver)
    state, after = proceed(state, ready, tail)
    return state, (*before, *after)


def _accept(state: DeliveryState, event: Expected | Open) -> _Result:
    if state.phase != "waiting":
        return state, ()
    accept = () if state.accepted else (Accept(),)
    phase: Phase = "open" if isinstance(event, Open) else "waiting"
    return replace(state, phase=phase, accepted=True), (ClearTimer(), *accept)


def _stop(state: DeliveryState, reason: str, by_receiver: bool) -> _Result:
    if state.phase not in ("waiting", "open"):
        return state, ()
    cancel = (CancelTransfers(),) if state.under_way else ()
    return replace(state, phase="stopping", reason=reason, by_receiver=by_receiver), (ClearTimer(), *cancel)


def proceed(state: DeliveryState, ready: Mapping[int, int], tail: bool) -> _Result:
    """Posts what is ready and has not been posted, or ends it if nothing is left to do."""
    if state.posting or state.over:
        return state, ()
    if state.phase == "stopping":
        if state.under_way:
            return state, ()
        # True of transfers that may still land, too: those end so only when this connection is lost, and then nothing
        # is sent over it any more.
        return replace(state, phase="stopped"), (Tell(state.reason), Forget())
    if state.phase != "open":
        return state, ()
    for layer in ready if state.left else ():
        if layer in state.left:
            post = _range(state, layer, ready[layer])
            if post is not None:
                return _posting(state, post), (post,)
    if state.sums and not state.left:
        return replace(state, sums=False, posting=True), (SendSums(),)
    if state.tail and tail:
        return replace(state, tail=False, posting=True), (SendTail(),)
    if state.left or state.tail or state.under_way:
        return state, ()
    return replace(state, phase="sent"), (Forget(),)


def _range(state: DeliveryState, layer: int, end_token: int) -> Post | None:
    """What of a layer can be posted: whole units only, until the end."""
    last = end_token >= state.num_tokens
    end = state.num_tokens if last else end_token // state.unit_tokens * state.unit_tokens
    begin = state.posted.get(layer, state.first_token)
    return Post(layer, begin, end) if end > begin else None


def _posting(state: DeliveryState, post: Post) -> DeliveryState:
    left = state.left - {post.layer} if post.end == state.num_tokens else state.left
    return replace(state, posting=True, left=left, posted={**state.posted, post.layer: post.end})
