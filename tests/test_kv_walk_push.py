"""A push's machine with its tickets, walked: small ones through every order of events, larger ones at random. It ends,
posts everything once and nothing too late, frees what it holds once, and never after."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from railwire.kvcache.protocol import delivery
from railwire.kvcache.protocol import push as protocol
from railwire.kvcache.protocol.delivery import DeliveryState
from railwire.kvcache.protocol.push import Key, PushState


class Seen(NamedTuple):
    """What the shell, the NICs and the receiver have seen of one ticket."""

    attached: bool = False
    doing: Any = None  # Post, SendTail or SendSums
    under_way: int = 0
    cancelled: bool = False
    failed: bool = False  # somebody or something has stopped it
    told: bool = False
    accepted: int = 0
    forgotten: bool = False
    posted: tuple[tuple[int, int], ...] = ()  # (layer, end)
    sums: int = 0
    tails: int = 0


class World(NamedTuple):
    tickets: tuple[tuple[Key, Seen], ...]
    timer: bool = False
    closed: bool = False
    failure: protocol.Failure | None = None

    def __getitem__(self, key: Any) -> Any:
        return dict(self.tickets)[key]

    def put(self, key: Key, **changes: Any) -> World:
        return self._replace(
            tickets=tuple((k, seen._replace(**changes) if k == key else seen) for k, seen in self.tickets)
        )


class Case(NamedTuple):
    """What is pushed."""

    layers: int
    num_tokens: int
    unit: int
    tickets: dict[Key, DeliveryState]
    tail: bool
    ends: tuple[int, ...]  # what a layer may be ready up to

    def begin(self) -> tuple[PushState, World]:
        state = PushState("r", self.num_tokens, 30.0)
        return state, World(tuple((key, Seen()) for key in self.tickets))


def case(tickets: int, layers: int, num_tokens: int, unit: int, *, tail: bool, sums: bool, first: int = 0) -> Case:
    held = frozenset(range(layers))
    states = {
        (peer, 7): delivery.taken(peer, tickets, first, num_tokens, unit, held, tail=tail, checksum=sums)
        for peer in range(tickets)
    }
    return Case(layers, num_tokens, unit, states, tail, tuple(range(1, num_tokens + 1)))


# ---- the world -------------------------------------------------------------------------------------------------------
def carry_out(what: Case, state: PushState, world: World, actions: Any) -> World:
    for action in actions:
        match action:
            case protocol.To():
                assert not world.closed, f"{action} after the end"
                world = carry_out_ticket(what, state, world, action.key, action.action)
            case protocol.Refuse():
                seen: Seen = world[action.key]
                assert not seen.doing and not seen.forgotten
                own, stopped = delivery.step(what.tickets[action.key], delivery.Stop(action.reason), {}, False)
                assert own.over
                world = world.put(action.key, failed=True)
                for each in stopped:
                    world = carry_out_ticket(what, state, world, action.key, each)
            case protocol.Set():
                assert not world.closed and action.seconds > 0
                world = world._replace(timer=True)
            case protocol.Clear():
                world = world._replace(timer=False)
            case protocol.Close():
                assert not world.closed, "closed twice"
                for key in state.tickets:
                    assert world[key].forgotten, "closed, and a ticket holds something"
                if action.failure is None:
                    assert len(state.tickets) + len(state.absent) >= len(what.tickets), "closed, and a rank is to come"
                    assert state.tickets
                    for key in state.tickets:
                        complete(what, world[key], what.tickets[key])
                world = world._replace(closed=True, failure=action.failure)
            case protocol.Remember():
                assert not world.closed
    return world


def complete(what: Case, seen: Seen, ticket: DeliveryState) -> None:
    whole = {layer: what.num_tokens for layer in ticket.left}
    assert dict(seen.posted) == whole and not seen.failed
    assert seen.sums == ticket.sums and seen.tails == ticket.tail and seen.accepted == 1


def carry_out_ticket(what: Case, state: PushState, world: World, key: Key, action: delivery.Action) -> World:
    seen: Seen = world[key]
    assert not seen.forgotten, f"{action} after it was forgotten"
    match action:
        case delivery.Post():
            assert not seen.doing and not seen.failed and not seen.told
            posted = dict(seen.posted)
            assert action.begin == posted.get(action.layer, what.tickets[key].first_token) < action.end
            assert action.end <= state.ready[action.layer], "posted, and was not ready"
            assert action.end % what.unit == 0 or action.end == what.num_tokens
            posted[action.layer] = action.end
            return world.put(key, doing=action, posted=tuple(sorted(posted.items())))
        case delivery.SendTail():
            assert state.tail and not seen.doing and not seen.failed
            return world.put(key, doing=action, tails=seen.tails + 1)
        case delivery.SendSums():
            assert not seen.doing and not seen.failed
            assert dict(seen.posted) == {layer: what.num_tokens for layer in what.tickets[key].left}
            return world.put(key, doing=action, sums=seen.sums + 1)
        case delivery.CancelTransfers():
            assert seen.under_way
            return world.put(key, cancelled=True)
        case delivery.Accept():
            assert not seen.accepted and not seen.failed
            return world.put(key, accepted=1)
        case delivery.Tell():
            assert not seen.told and not seen.under_way and not seen.doing, "told, and something may land"
            return world.put(key, told=True)
        case delivery.Forget():
            assert not seen.under_way and not seen.doing, "forgotten, and NICs read its source"
            assert seen.told == seen.failed
            return world.put(key, forgotten=True)
    return world


def ticket_events(world: World, key: Key) -> Iterator[tuple[delivery.Event, World]]:
    """What may come of a ticket that is attached."""
    seen: Seen = world[key]
    if seen.doing:
        done = world.put(key, doing=None)
        if isinstance(seen.doing, delivery.SendSums):
            yield delivery.Posted(), done
            yield delivery.Posted(error="unreadable"), done.put(key, failed=True)
        else:
            yield delivery.Posted(1, 8), done.put(key, under_way=seen.under_way + 1)
            yield delivery.Posted(1, 8, "half"), done.put(key, under_way=seen.under_way + 1, failed=True)
            yield delivery.Posted(0, 0, "none"), done.put(key, failed=True)
    if seen.under_way:
        less = world.put(key, under_way=seen.under_way - 1)
        yield delivery.TransferEnded(), less
        yield delivery.TransferEnded("NIC died"), less if seen.forgotten else less.put(key, failed=True)
    stopped = world if seen.forgotten else world.put(key, failed=True)
    yield delivery.Stop("unwanted", by_receiver=True), stopped
    yield delivery.Stop("lost"), stopped


def events(what: Case, state: PushState, world: World) -> Iterator[tuple[protocol.Event, World]]:
    for key, ticket in what.tickets.items():
        seen: Seen = world[key]
        if not seen.attached:
            yield protocol.Attach(key, ticket), world.put(key, attached=True)
            if not state.absent:
                yield protocol.DoWithout(key[0]), world
        elif key in state.tickets and not seen.forgotten:
            for event, after in ticket_events(world, key):
                yield protocol.ForTicket(key, event), after
    if world.timer:
        yield protocol.Late(), fail_all(state, world._replace(timer=False))
    for layer in range(what.layers):
        for end in what.ends:
            if end > state.ready.get(layer, 0):
                yield protocol.Ready(layer, end), world
    if what.tail and not state.tail:
        yield protocol.TailReady(), world
    if state.ready:
        yield protocol.Withdraw(), after_withdraw(state, world)
    yield protocol.Abort("no"), fail_all(state, world)
    yield protocol.Decline("unwanted"), world
    yield protocol.AwaitDecoder(30.0), world


def fail_all(state: PushState, world: World) -> World:
    if not state.over:
        for key in state.tickets:
            if not world[key].forgotten:
                world = world.put(key, failed=True)
    return world


def after_withdraw(state: PushState, world: World) -> World:
    if any(ticket.checksum and ticket.nbytes for ticket in state.tickets.values()):
        return fail_all(state, world)
    return world


def feed(what: Case, state: PushState, event: protocol.Event, world: World) -> tuple[PushState, World]:
    made, actions = protocol.step(state, event)
    then = carry_out(what, made, world, actions)
    assert made.over == then.closed
    assert (made.timer is not None) == then.timer or isinstance(event, protocol.Late)
    assert not then.closed or not then.timer
    return made, then


def drain(what: Case, state: PushState, world: World) -> tuple[PushState, World]:
    """What was begun comes to its end: calls return, transfers end, timers run out."""
    while True:
        for key in state.tickets:
            seen: Seen = world[key]
            if seen.doing or seen.under_way:
                event, world = next(ticket_events(world, key))
                state, world = feed(what, state, protocol.ForTicket(key, event), world)
                break
        else:
            return state, world


def ends(what: Case, state: PushState, world: World) -> None:
    """Wherever it is: it ends when it is given up, it ends by itself when everything is there, and once something has
    failed it ends with its decoders."""
    state, world = drain(what, state, world)
    assert aborted(what, state, world).closed
    if state.failure is not None:
        last = world
        for key in state.tickets:
            if not last[key].forgotten:
                event = protocol.ForTicket(key, delivery.Stop("unwanted", by_receiver=True))
                state, last = feed(what, state, event, last.put(key, failed=True))
        assert last.closed and last.failure is not None
        return
    for layer in range(what.layers):
        state, world = drain(what, *feed(what, state, protocol.Ready(layer, what.num_tokens), world))
    state, world = drain(what, *feed(what, state, protocol.TailReady(), world))
    if world.timer and not world.closed:
        timed = feed(what, state, protocol.Late(), fail_all(state, world._replace(timer=False)))
        assert timed[1].closed
    for key, ticket in what.tickets.items():
        if not world[key].attached:
            event = protocol.Attach(key, ticket)
            state, world = drain(what, *feed(what, state, event, world.put(key, attached=True)))
    assert world.closed
    assert all(world[key].forgotten for key in what.tickets)


def aborted(what: Case, state: PushState, world: World) -> World:
    state, world = feed(what, state, protocol.Abort("closing"), fail_all(state, world))
    return drain(what, state, world)[1]


def hashable(state: PushState) -> Any:
    tickets = tuple(
        (k, t.phase, t.posting, t.under_way, t.nbytes > 0, t.tail, t.sums, t.left, tuple(sorted(t.posted.items())))
        for k, t in sorted(state.tickets.items())
    )
    kind = state.failure and state.failure.kind
    ready = tuple(sorted(state.ready.items()))
    return tickets, ready, kind, state.absent, state.tail, state.expected, state.timer, state.over


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(case(1, 1, 5, 2, tail=True, sums=True), id="units, tail and checksums"),
        pytest.param(case(1, 2, 2, 1, tail=False, sums=True), id="two layers"),
        pytest.param(case(1, 2, 1, 1, tail=True, sums=False, first=1), id="nothing but a tail"),
        pytest.param(case(2, 1, 1, 1, tail=True, sums=False), id="two ranks"),
        pytest.param(case(2, 0, 1, 1, tail=False, sums=False), id="idle ranks"),
    ],
)
def test_every_order_of_events_ends(what: Case) -> None:
    first = what.begin()
    seen = {(hashable(first[0]), first[1]._replace(failure=None))}
    queue = deque([first])
    closed = set()
    while queue:
        state, world = queue.popleft()
        ends(what, state, world)
        if world.closed:
            closed.add(world.failure and world.failure.kind)
        for event, after in events(what, state, world):
            made, then = feed(what, state, event, after)
            known = (hashable(made), then._replace(failure=None))
            if known not in seen:
                seen.add(known)
                queue.append((made, then))
    assert closed >= {None, "cancelled", "aborted"} and ("failed" in closed or not what.layers)
    print(f"{len(seen)} states")


@pytest.mark.parametrize("seed", range(3))
def test_random_orders_of_events_end(seed: int) -> None:
    """Three ranks, three layers, units of two tokens, tails and checksums."""
    rng = random.Random(seed)
    what = case(3, 3, 7, 2, tail=True, sums=True, first=2)
    ended: dict[Any, int] = {}
    for _ in range(100):
        state, world = what.begin()
        calm = rng.random() < 0.5  # where everything breaks at once, nothing gets far
        for _ in range(80):
            if world.closed and rng.random() < 0.2:
                break
            possible = list(events(what, state, world))
            if calm:
                possible = [(event, after) for event, after in possible if not rough(event)] or possible
            event, after = rng.choice(possible)
            state, world = feed(what, state, event, after)
        ends(what, state, world)
        kind = world.failure.kind if world.failure is not None else world.closed
        ended[kind] = ended.get(kind, 0) + 1
    assert ended.keys() >= {True, "failed", "cancelled", "aborted"}, ended


def rough(event: protocol.Event) -> bool:
    if isinstance(event, protocol.ForTicket):
        inner = event.event
        return isinstance(inner, delivery.Stop) or bool(getattr(inner, "error", ""))
    return isinstance(event, protocol.Abort | protocol.Decline | protocol.Late | protocol.DoWithout | protocol.Withdraw)


def test_tickets_that_wait_for_their_request() -> None:
    """Told once that the request is here; stopped at any moment; then gone."""
    for moment in range(3):
        state = delivery.taken(1, 1, 0, 4, 1, frozenset({0}), tail=False, checksum=False)
        actions: list[delivery.Action] = []
        for event in [delivery.Expected(), delivery.Expected()][:moment]:
            state, more = delivery.step(state, event, {}, False)
            actions += more
        state, more = delivery.step(state, delivery.Stop("nobody has it"), {0: 4}, True)
        actions += more
        assert [a for a in actions if not isinstance(a, delivery.ClearTimer)] == [
            *[delivery.Accept()][:moment], delivery.Tell("nobody has it"), delivery.Forget(),
        ]  # fmt: skip
        assert delivery.step(state, delivery.Stop("again"), {}, False) == (state, ())


def test_a_ticket_of_another_length_gets_nothing() -> None:
    state = PushState("r", 4, 30.0)
    ticket = delivery.taken(1, 1, 0, 5, 1, frozenset({0}), tail=False, checksum=False)
    after, actions = protocol.step(state, protocol.Attach((1, 1), ticket))
    assert (
        after == state
        and isinstance(actions[0], protocol.Refuse)
        and "5 tokens, the request has 4" in actions[0].reason
    )
