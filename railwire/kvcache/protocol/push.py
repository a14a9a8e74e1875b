"""The push of one request as a pure machine: its tickets, what of it is ready, and how it ends.

It ends once every ticket that came is over, and either all have come that were announced, or something has failed. What
concerns one ticket is decided by :mod:`railwire.kvcache.protocol.delivery`, whose states are part of this one's.

The shell carries out the actions in their order. ``Close`` comes once; then every ticket has been forgotten, and
nothing follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from railwire.kvcache.protocol import delivery
from railwire.kvcache.protocol.delivery import DeliveryState

Key = tuple[int, int]
"""Of a ticket: the id of its peer, and its number there."""


class Failure(msgspec.Struct, frozen=True):
    kind: Literal["failed", "cancelled", "aborted"]
    text: str


class PushState(msgspec.Struct, frozen=True):
    """Made with its first five fields.

    Attributes:
        ticket_timeout: seconds for the tickets of a decoder's other ranks.
        absent: peers, ranks of decoders, that have said that they bring no ticket.
        ready: tokens that are ready, by layer, counted from token 0.
        tail: the tail is there.
        expected: tickets that were announced.
        timer: what a timer that is set waits for, and its seconds.
    """

    request_id: str
    num_tokens: int
    ticket_timeout: float
    absent: frozenset[int] = frozenset()
    tickets: dict[Key, DeliveryState] = {}
    ready: dict[int, int] = {}
    tail: bool = False
    expected: int = 0
    failure: Failure | None = None
    timer: tuple[Literal["decoder", "ranks"], float] | None = None
    over: bool = False

    @property
    def to_come(self) -> bool:
        """Ranks of a decoder that has come are missing."""
        return len(self.tickets) + len(self.absent) < self.expected


# ---- events ----------------------------------------------------------------------------------------------------------
class Attach(msgspec.Struct, frozen=True):
    """A ticket for this request, whose list of blocks is whole."""

    key: Key
    ticket: DeliveryState


class ForTicket(msgspec.Struct, frozen=True):
    """Something that concerns one ticket."""

    key: Key
    event: delivery.Event


class Ready(msgspec.Struct, frozen=True):
    """A layer is complete for the tokens 0..end_token."""

    layer: int
    end_token: int


class TailReady(msgspec.Struct, frozen=True):
    """The tail is there."""


class Withdraw(msgspec.Struct, frozen=True):
    """The source blocks are taken away; nothing is ready any more."""


class Abort(msgspec.Struct, frozen=True):
    """This side gives up."""

    reason: str


class Decline(msgspec.Struct, frozen=True):
    """No ticket will come, unless some have."""

    reason: str


class DoWithout(msgspec.Struct, frozen=True):
    """A rank of a decoder brings no ticket."""

    peer: int


class AwaitDecoder(msgspec.Struct, frozen=True):
    """From now on a first ticket is waited for so long."""

    seconds: float


class Late(msgspec.Struct, frozen=True):
    """The timer has run out."""


Event = Attach | ForTicket | Ready | TailReady | Withdraw | Abort | Decline | DoWithout | AwaitDecoder | Late


# ---- actions ---------------------------------------------------------------------------------------------------------
class To(msgspec.Struct, frozen=True):
    """An action for one ticket."""

    key: Key
    action: delivery.Action


class Refuse(msgspec.Struct, frozen=True):
    """This ticket gets nothing of this push, and is none of its tickets: stop it."""

    key: Key
    reason: str


class Set(msgspec.Struct, frozen=True):
    """Set the timer, instead of the one that is set; ``Late`` follows unless it is cleared."""

    seconds: float


class Clear(msgspec.Struct, frozen=True):
    """Clear the timer."""


class Remember(msgspec.Struct, frozen=True):
    """Tickets that come later for this request get this answer."""

    reason: str


class Close(msgspec.Struct, frozen=True):
    """It is over: the source blocks may be reused."""

    failure: Failure | None


Action = To | Refuse | Set | Clear | Remember | Close
_Result = tuple[PushState, list[Action]]


# ---- the machine -----------------------------------------------------------------------------------------------------
def step(state: PushState, event: Event) -> _Result:
    """What an event makes of a push."""
    match event:
        case ForTicket():
            return _settled(*_feed(state, event.key, event.event))
        case Attach():
            return _attach(state, event)
    if state.over:
        return state, []
    match event:
        case Ready() if state.failure is None:
            ready = {**state.ready, event.layer: max(event.end_token, state.ready.get(event.layer, 0))}
            return _settled(*_proceed(replace(state, ready=ready)))
        case TailReady():
            return _settled(*_proceed(replace(state, tail=True)))
        case Withdraw():
            state = replace(state, ready={})
            if any(ticket.checksum and ticket.nbytes for ticket in state.tickets.values()):
                # Computed again, KV may differ in its last bits from what has been sent; the sums would not match.
                return _abort(state, "its blocks were needed before it was done, and checksums were asked for")
        case Abort():
            return _abort(state, event.reason)
        case Decline() if not state.tickets and state.failure is None:
            return _settled(_failed(state, "cancelled", event.reason), [])
        case DoWithout() if all(ticket.peer != event.peer for ticket in state.tickets.values()):
            state = replace(state, absent=state.absent | {event.peer})
            if state.tickets and not state.to_come:
                return _settled(replace(state, timer=None), [Clear()])
        case AwaitDecoder() if not state.tickets:
            return replace(state, timer=("decoder", event.seconds)), [Set(event.seconds)]
        case Late():
            return _late(state)
    return state, []


def _attach(state: PushState, event: Attach) -> _Result:
    """The ticket gets what is ready so far."""
    refusal = None
    if event.ticket.num_tokens != state.num_tokens:
        refusal = f"the ticket is for {event.ticket.num_tokens} tokens, the request has {state.num_tokens}"
    elif state.failure is not None or state.over:
        refusal = state.failure.text if state.failure is not None else "the request has ended"
    if refusal is not None:
        return state, [Refuse(event.key, refusal)]
    state = replace(
        state,
        tickets={**state.tickets, event.key: event.ticket},
        expected=max(state.expected, event.ticket.destinations),
        absent=state.absent - {event.ticket.peer},
        timer=None,
    )
    actions: list[Action] = [Clear()]
    if state.to_come:
        state = replace(state, timer=("ranks", state.ticket_timeout))
        actions = [Set(state.ticket_timeout)]
    state, opened = _feed(state, event.key, delivery.Open())
    return _settled(state, [*actions, *opened])


def _feed(state: PushState, key: Key, event: delivery.Event) -> _Result:
    """One ticket's event. The first ticket that stops decides how the push ends; the other ranks of its decoder get no
    whole request any more: they cancel, or are told."""
    before = state.tickets[key]
    return _changed(state, key, before, *delivery.step(before, event, state.ready, state.tail))


def _proceed(state: PushState) -> _Result:
    """Every ticket gets what is ready."""
    actions: list[Action] = []
    for key, before in state.tickets.items():
        after, wanted = delivery.proceed(before, state.ready, state.tail)
        if after is not before:
            state, more = _changed(state, key, before, after, wanted)
            actions += more
    return state, actions


def _changed(
    state: PushState, key: Key, before: DeliveryState, after: DeliveryState, wanted: Sequence[delivery.Action]
) -> _Result:
    state = replace(state, tickets={**state.tickets, key: after})
    if after.phase == "stopped" and before.phase != "stopped" and state.failure is None:
        state = _failed(state, "cancelled" if after.by_receiver else "failed", after.reason)
    return state, [To(key, action) for action in wanted]


def _failed(state: PushState, kind: Literal["failed", "cancelled", "aborted"], reason: str) -> PushState:
    return replace(state, failure=Failure(kind, f"request {state.request_id}: {reason}"))


def _abort(state: PushState, reason: str) -> _Result:
    if state.failure is None:
        state = _failed(state, "aborted", reason)
    actions: list[Action] = [Remember(reason)]
    for key in state.tickets:
        state, more = _feed(state, key, delivery.Stop(reason))
        actions += more
    return _settled(replace(state, expected=len(state.tickets)), actions)


def _late(state: PushState) -> _Result:
    if state.timer is None:
        return state, []
    what, seconds = state.timer
    state = replace(state, timer=None)
    if what == "decoder":
        return _abort(state, f"no decoder has asked for it within {seconds:g} s")
    came = len(state.tickets)
    return _abort(state, f"{state.expected} tickets were announced, {came} came within {seconds:g} s")


def _settled(state: PushState, actions: list[Action]) -> _Result:
    """Closes it if nothing is left to wait for."""
    if state.over or not all(ticket.over for ticket in state.tickets.values()):
        return state, actions
    if state.failure is None and (not state.tickets or state.to_come):
        return state, actions
    return replace(state, timer=None, over=True), [*actions, Clear(), Close(state.failure)]
