"""A ticket on the decode side as a pure machine: :func:`step` maps (state, event) to (state, actions).

Phases: ``open`` -> ``arrived``; or ``open`` -> ``draining`` -> ``failed`` | ``cancelled``. ``verifying`` comes before
``arrived``. Draining ends when every source rank has said that nothing of the ticket will land, or has been fenced;
never because time has passed. Sources are known by the id of their peer.

The shell carries out the actions in their order. ``Release`` comes once, ``End`` comes once, and nothing follows both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from railwire.kvcache.protocol.messages import CANCELLED

Phase = Literal["open", "verifying", "draining", "arrived", "failed", "cancelled"]
Timer = Literal["answer", "sums", "drain"]


class Failure(msgspec.Struct, frozen=True):
    """How a ticket ends that does not arrive.

    Attributes:
        reusable: nobody can write the pages any more.
    """

    kind: Literal["failed", "cancelled", "mismatch"]
    text: str
    reusable: bool = True


class TicketState(msgspec.Struct, frozen=True):
    """Made by :func:`opened`.

    Attributes:
        busy: sources that may still write.
        silent: sources that have not said that the request is there.
        missing: units whose checksums have not come, by source.
        landed: all pages are here, checksums are missing.
        told: the ticket has ended for its owner, though a source may still write.
    """

    names: dict[int, str]
    busy: frozenset[int]
    silent: frozenset[int]
    missing: dict[int, int]
    checksum: bool
    answer_timeout: float
    drain_timeout: float
    phase: Phase = "open"
    landed: bool = False
    failure: Failure | None = None
    told: bool = False

    @property
    def over(self) -> bool:
        """Nothing will come of it any more."""
        return self.phase in ("arrived", "failed", "cancelled")


def opened(
    sources: dict[int, str], missing: dict[int, int], checksum: bool, answer_timeout: float, drain_timeout: float
) -> TicketState:
    """A ticket that is about to be sent.

    Args:
        sources: names of the source ranks, by id.
        missing: units whose checksums will come, by source; empty without checksums.
        answer_timeout: seconds for all sources to say that the request is there.
        drain_timeout: seconds for a source to confirm a cancel, and for checksums to follow the pages.
    """
    everyone = frozenset(sources)
    return TicketState(sources, everyone, everyone, missing, checksum, answer_timeout, drain_timeout)


# ---- events ----------------------------------------------------------------------------------------------------------
class Sent(msgspec.Struct, frozen=True):
    """Every source has been asked."""


class NotSent(msgspec.Struct, frozen=True):
    """Asking failed; some sources may have been asked."""

    why: str


class Landed(msgspec.Struct, frozen=True):
    """The counter has seen all pages."""


class CounterFailed(msgspec.Struct, frozen=True):
    """The counter will not see all pages: a source is lost, a write failed, time has run out."""

    why: str


class Accepted(msgspec.Struct, frozen=True):
    """A source has the request, in its queue or under way."""

    source: int


class Ended(msgspec.Struct, frozen=True):
    """A source says that nothing of the ticket will land any more."""

    source: int
    reason: str


class Fenced(msgspec.Struct, frozen=True):
    """A source can no longer write: its connection has been closed."""

    source: int


class NotFenced(msgspec.Struct, frozen=True):
    """A source is lost and may still write; another fence follows."""

    source: int
    why: str


class SumsCame(msgspec.Struct, frozen=True):
    """Checksums of so many more units."""

    source: int
    units: int


class Verified(msgspec.Struct, frozen=True):
    """What ``Verify`` has found."""

    failure: Failure | None = None


class Cancel(msgspec.Struct, frozen=True):
    """The owner wants the pages no more."""

    reason: str


class Late(msgspec.Struct, frozen=True):
    """A timer that was set has run out."""

    timer: Timer


Event = (
    Sent
    | NotSent
    | Landed
    | CounterFailed
    | Accepted
    | Ended
    | Fenced
    | NotFenced
    | SumsCame
    | Verified
    | Cancel
    | Late
)


# ---- actions ---------------------------------------------------------------------------------------------------------
class Set(msgspec.Struct, frozen=True):
    """Set a timer; ``Late`` follows unless it is cleared."""

    timer: Timer
    seconds: float


class Clear(msgspec.Struct, frozen=True):
    """Clear a timer, set or not."""

    timer: Timer


class StopCounting(msgspec.Struct, frozen=True):
    """Cancel what the counter expects."""


class Withdraw(msgspec.Struct, frozen=True):
    """Ask a source to stop; fence it if it cannot be asked. ``Ended``, ``Fenced`` or ``NotFenced`` follows."""

    source: int


class Fence(msgspec.Struct, frozen=True):
    """Close the connection of a source. ``Fenced`` or ``NotFenced`` follows."""

    source: int


class Verify(msgspec.Struct, frozen=True):
    """Compare the checksums; ``Verified`` follows."""


class Release(msgspec.Struct, frozen=True):
    """Nobody can write the pages any more: give back the immediate, and the pages to their owner."""


class End(msgspec.Struct, frozen=True):
    """Tell the owner."""

    failure: Failure | None


Action = Set | Clear | StopCounting | Withdraw | Fence | Verify | Release | End
_Result = tuple[TicketState, Sequence[Action]]


# ---- the machine -----------------------------------------------------------------------------------------------------
def step(state: TicketState, event: Event) -> _Result:
    """What an event makes of a ticket. Events that are too late, or not for this phase, change nothing."""
    if state.over:
        return state, ()
    match event:
        case Sent():
            return state, (Set("answer", state.answer_timeout),) if state.phase == "open" and state.silent else ()
        case Accepted():
            silent = state.silent - {event.source}
            return replace(state, silent=silent), () if silent else (Clear("answer"),)
        case Ended():
            return _ended(state, event)
        case Fenced():
            return _quiet(state, event.source)
        case NotFenced():
            return _not_fenced(state, event.why)
        case SumsCame():
            return _sums(state, event)
        case Verified():
            return _verified(state, event.failure)
        case Late(timer="drain"):
            late = sorted(state.busy) if state.phase == "draining" else ()
            return state, [Fence(source) for source in late]
    if state.phase != "open":
        return state, ()
    match event:
        case Landed():
            if any(state.missing.values()):
                return replace(state, landed=True), (Clear("answer"), Set("sums", state.drain_timeout))
            return _arrived(state)
        case Cancel():
            return _drain(state, Failure("cancelled", event.reason))
        case NotSent() | CounterFailed():
            return _drain(state, Failure("failed", event.why))
        case Late(timer="sums"):
            why = f"all pages are here, but no checksums after {state.drain_timeout:g} s more"
            return _drain(state, Failure("failed", why))
        case Late(timer="answer") if state.silent and not state.landed:
            names = ", ".join(name for source, name in state.names.items() if source in state.silent)
            why = f"prefiller {names} did not say within {state.answer_timeout:g} s that it has the request"
            return _drain(state, Failure("failed", why))
    return state, ()


def _ended(state: TicketState, event: Ended) -> _Result:
    if event.source not in state.busy:
        return state, ()
    why = f"prefiller {state.names[event.source]}: {event.reason}"
    if state.phase == "open":
        # It has told us itself: draining asks the others only.
        return _drain(replace(state, busy=state.busy - {event.source}), Failure("failed", why))
    failure = state.failure
    if failure is not None and failure.kind == "failed" and event.reason != CANCELLED and not state.told:
        # The counter failed first; the prefiller's own message says why.
        state = replace(state, failure=replace(failure, text=why))
    return _quiet(state, event.source)


def _quiet(state: TicketState, source: int) -> _Result:
    state = replace(state, busy=state.busy - {source})
    if state.phase == "draining" and not state.busy:
        return _over(state)
    return state, ()


def _not_fenced(state: TicketState, why: str) -> _Result:
    if state.phase != "draining" or state.failure is None or state.told:
        return state, ()
    failure = replace(state.failure, text=f"{state.failure.text}; and {why}", reusable=False)
    return replace(state, failure=failure, told=True), (End(failure),)


def _sums(state: TicketState, event: SumsCame) -> _Result:
    missing = {**state.missing, event.source: state.missing.get(event.source, 0) - event.units}
    state = replace(state, missing=missing)
    if state.landed and not any(missing.values()) and state.phase in ("open", "draining") and not state.told:
        return _arrived(state)  # everything is here after all, though it may have been cancelled
    return state, ()


def _arrived(state: TicketState) -> _Result:
    if state.checksum:
        return replace(state, phase="verifying"), (Verify(),)
    return _verified(replace(state, phase="verifying"), None)


def _verified(state: TicketState, failure: Failure | None) -> _Result:
    if state.phase != "verifying":
        return state, ()
    if failure is not None:
        return _over(replace(state, failure=failure))
    return replace(state, phase="arrived", failure=None), (*_CLEAR, Release(), End(None))


def _drain(state: TicketState, failure: Failure) -> _Result:
    state = replace(state, phase="draining", failure=failure)
    if not state.busy:
        state, actions = _over(state)
        return state, (StopCounting(), *actions)
    asks = [Withdraw(source) for source in state.names if source in state.busy]
    return state, (Clear("answer"), Clear("sums"), StopCounting(), *asks, Set("drain", state.drain_timeout))


def _over(state: TicketState) -> _Result:
    assert state.failure is not None
    state = replace(state, phase="cancelled" if state.failure.kind == "cancelled" else "failed")
    end = () if state.told else (End(state.failure),)
    return replace(state, told=True), (*_CLEAR, Release(), *end)


_CLEAR = (Clear("answer"), Clear("sums"), Clear("drain"))
