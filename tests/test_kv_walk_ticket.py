"""A ticket's machine, walked through every order of events: it ends, frees what it holds once, and never after."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from railwire.kvcache.driver import Driver
from railwire.kvcache.protocol import ticket as protocol
from railwire.kvcache.protocol.messages import CANCELLED
from railwire.kvcache.protocol.ticket import TicketState

REASONS = (CANCELLED, "it broke")


class World(NamedTuple):
    """What the shell, the sources and the network are at: says which events can come."""

    sent: bool = False
    counter: str = "counting"  # or stopping, over
    landed: bool = False
    timers: frozenset[str] = frozenset()
    writers: frozenset[int] = frozenset()
    fencing: frozenset[int] = frozenset()
    verifying: bool = False
    released: bool = False
    told: bool = False


def hashable(state: TicketState) -> Any:
    return (
        state.phase, state.busy, state.silent, state.landed, state.failure, state.told,
        tuple(sorted(state.missing.items())),
    )  # fmt: skip


def events(state: TicketState, world: World) -> Iterator[tuple[protocol.Event, World]]:
    """All that may come next, and what that makes of the world."""
    if not world.sent:
        yield protocol.Sent(), world._replace(sent=True)
        yield protocol.NotSent("no room"), world._replace(sent=True)
        return
    if world.verifying:
        for found in (None, protocol.Failure("mismatch", "wrong"), protocol.Failure("failed", "unreadable")):
            yield protocol.Verified(found), world._replace(verifying=False)
    if world.counter == "counting":
        yield protocol.Landed(), world._replace(counter="over", landed=True)
    if world.counter != "over":
        yield protocol.CounterFailed("lost"), world._replace(counter="over")
    for timer in world.timers:
        yield protocol.Late(timer), world._replace(timers=world.timers - {timer})  # type: ignore[arg-type]
    yield protocol.Cancel("unwanted"), world
    for source in state.names:
        yield protocol.Accepted(source), world
        for reason in REASONS:  # as often as it likes
            yield protocol.Ended(source, reason), world._replace(writers=world.writers - {source})
        if source in world.fencing:
            idle = world.fencing - {source}
            yield protocol.Fenced(source), world._replace(fencing=idle, writers=world.writers - {source})
            yield protocol.NotFenced(source, "it may run"), world  # and is fenced again
        if state.missing.get(source, 0):
            yield protocol.SumsCame(source, 1), world


def carry_out(world: World, actions: Any) -> World:
    """The shell, and what must be true of every action."""
    for action in actions:
        match action:
            case protocol.Clear():
                world = world._replace(timers=world.timers - {action.timer})
            case protocol.Release():
                assert not world.released, "released twice"
                assert world.landed or not world.writers, "released, and somebody may still write"
                world = world._replace(released=True)
            case protocol.End():
                assert not world.told, "its owner is told twice"
                assert world.released or (action.failure is not None and not action.failure.reusable)
                assert action.failure is not None or world.landed, "arrived, and not landed"
                world = world._replace(told=True)
            case _:
                assert not world.released, f"{action} after the end"
                match action:
                    case protocol.Set():
                        assert action.seconds > 0
                        world = world._replace(timers=world.timers | {action.timer})
                    case protocol.StopCounting():
                        world = world._replace(counter="stopping" if world.counter == "counting" else world.counter)
                    case protocol.Fence():
                        world = world._replace(fencing=world.fencing | {action.source})
                    case protocol.Verify():
                        world = world._replace(verifying=True)
                    case protocol.Withdraw():
                        assert action.source in world.writers, "asked to stop, and had stopped"
    return world


def ends(state: TicketState, world: World, counter_ends: bool) -> bool:
    """Whether it ends if no source says a word more: only the shell's own promises are kept."""
    for _ in range(100):
        if state.over:
            return world.released and world.told
        event: protocol.Event
        if not world.sent:
            event, world = protocol.Sent(), world._replace(sent=True)
        elif world.verifying:
            event, world = protocol.Verified(), world._replace(verifying=False)
        elif world.fencing:
            source = min(world.fencing)
            event = protocol.Fenced(source)
            world = world._replace(fencing=world.fencing - {source}, writers=world.writers - {source})
        elif world.timers:
            timer = min(world.timers)
            event, world = protocol.Late(timer), world._replace(timers=world.timers - {timer})  # type: ignore[arg-type]
        elif world.counter != "over" and (counter_ends or world.counter == "stopping"):
            event, world = protocol.CounterFailed("time"), world._replace(counter="over")
        else:
            return False
        state, actions = protocol.step(state, event)
        world = carry_out(world, actions)
    return False


@pytest.mark.parametrize("units", [(), (1,), (2, 1)])
@pytest.mark.parametrize("sources", [1, 2])
def test_every_order_of_events_ends(sources: int, units: tuple[int, ...]) -> None:
    names = {source: f"p{source}" for source in range(sources)}
    state = protocol.opened(names, dict(zip(names, units, strict=False)), bool(units), 30.0, 5.0)
    first = (state, World(writers=frozenset(names)))
    seen = {(hashable(state), first[1])}
    queue = deque([first])
    phases = set()
    while queue:
        state, world = queue.popleft()
        phases.add(state.phase)
        assert state.over == (world.released and world.told)
        accepted = not state.silent and not world.landed and state.phase == "open"
        assert ends(state, world, counter_ends=True)
        assert accepted or ends(state, world, counter_ends=False), "time alone does not end it"
        for event, after in events(state, world):
            made, actions = protocol.step(state, event)
            then = carry_out(after, actions)
            if (hashable(made), then) not in seen:
                seen.add((hashable(made), then))
                queue.append((made, then))
    assert phases >= {"open", "draining", "arrived", "failed", "cancelled"}
    assert len(seen) > 50


def test_what_an_owner_is_told() -> None:
    """The first reason counts, but for a prefiller's own, which says more than that the counter failed."""

    def run(*events: protocol.Event) -> protocol.Failure | None:
        state = protocol.opened({1: "a", 2: "b"}, {}, False, 30.0, 5.0)
        told = []
        for event in (protocol.Sent(), *events):
            state, actions = protocol.step(state, event)
            told += [action.failure for action in actions if isinstance(action, protocol.End)]
        assert len(told) == 1
        return told[0]

    lost = protocol.CounterFailed("writer failed")
    quiet = (protocol.Ended(1, CANCELLED), protocol.Ended(2, CANCELLED))
    assert run(protocol.Landed()) is None
    assert run(lost, *quiet) == protocol.Failure("failed", "writer failed")
    assert run(lost, protocol.Ended(1, "no KV"), quiet[1]) == protocol.Failure("failed", "prefiller a: no KV")
    assert run(protocol.Cancel("bored"), protocol.Ended(1, "no KV"), quiet[1]) == protocol.Failure("cancelled", "bored")
    unfenced = run(protocol.Cancel("bored"), quiet[0], protocol.NotFenced(2, "it may run"), protocol.Fenced(2))
    assert unfenced == protocol.Failure("cancelled", "bored; and it may run", reusable=False)
    silent = run(protocol.Accepted(1), protocol.Late("answer"), *quiet)
    assert silent is not None and "prefiller b did not say within 30 s" in silent.text


def test_checksums_that_come_after_a_lost_source_end_nothing_twice() -> None:
    """All pages are here, one source is lost and cannot be fenced, so its owner has been told; then the last checksums
    come of the other."""
    state = protocol.opened({1: "a", 2: "b"}, {1: 1, 2: 1}, True, 30.0, 5.0)
    ends = 0
    for event in (
        protocol.Sent(), protocol.Landed(), protocol.SumsCame(1, 1), protocol.Late("sums"),
        protocol.NotFenced(1, "it may run"), protocol.SumsCame(2, 1), protocol.Ended(2, CANCELLED), protocol.Fenced(1),
    ):  # fmt: skip
        state, actions = protocol.step(state, event)
        ends += sum(isinstance(action, protocol.End) for action in actions)
    assert state.phase == "failed" and ends == 1


def test_a_driver_finishes_a_step_before_the_next_and_lets_no_failure_stop_it() -> None:
    """An action that feeds an event, and one that fails: the rest is carried out in order, then the failure is told."""
    done: list[str] = []

    def step(state: int, event: str) -> tuple[int, list[str]]:
        return state + 1, [f"{event}{number}" for number in range(3)]

    def perform(action: str) -> None:
        done.append(action)
        if action == "a0":
            driver.feed("b")
        if action == "a1":
            raise ValueError("a1")

    driver = Driver(0, step, perform)
    with pytest.raises(ValueError, match="a1"):
        driver.feed("a")
    assert done == ["a0", "a1", "a2", "b0", "b1", "b2"] and driver.state == 2
    driver.feed("c")
    assert done[-1] == "c2"
