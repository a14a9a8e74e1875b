"""A receiver that comes between two updates gets the published version from others, whole or not at all."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

import pytest
import torch
from weights_bed import Bed, Model, World, good

from railwire.weights import catching, messages, peer_plan
from railwire.weights.errors import PlanError, RendezvousError, UpdateError
from railwire.weights.giving import Giver
from railwire.weights.writing import Writer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catching, "_PAUSE", 0.2)


def soon(condition: Callable[[], object], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_who_comes_between_updates_gets_the_version_without_the_trainers(bed: Bed, mode: str) -> None:
    world = World(bed, 2)
    first = Model(bed, "a", catch_up=True)
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    second = Model(bed, "b", mode=mode, catch_up=True)
    assert second.receiver.wait(1, 20) == 1
    second.check(world.whole)
    soon(lambda: not second.engine.peers[1:])  # only the lead is left of those it has talked to
    good(world.update(1, welcome=True))  # it says that it has it
    world.step()
    good(world.update(2))
    for model in (first, second):
        assert model.receiver.version == 2
        model.check(world.whole)
    third = Model(bed, "c", mode=mode, catch_up=True)  # from both
    assert third.receiver.wait(2, 20) == 2
    third.check(world.whole)


def test_holders_that_are_cut_otherwise_give_their_parts(bed: Bed) -> None:
    world = World(bed, 2)
    halves = [Model(bed, f"half {i}", i, 2, catch_up=True) for i in range(2)]
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    whole = Model(bed, "whole", catch_up=True)
    assert whole.receiver.wait(1, 20) == 1
    whole.check(world.whole)
    for half in halves:
        half.receiver.close()
    quarter = Model(bed, "quarter", 2, 4, catch_up=True)  # two of the holders are gone: from the third
    assert quarter.receiver.wait(1, 30) == 1
    quarter.check(world.whole)


def test_fp8_comes_from_fp8_only(bed: Bed) -> None:
    world = World(bed, 1)
    holders = [Model(bed, "a", catch_up=True), Model(bed, "b", fp8=True, catch_up=True)]
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    late = Model(bed, "c", fp8=True, catch_up=True)
    assert late.receiver.wait(1, 20) == 1
    late.check(world.whole)
    for model in holders:
        model.receiver.close()


class Held:
    """Gifts stop until they are let go: before the first byte, or after the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: bool = False) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        run = Writer.run

        def held(writer, works, imms, **options):  # type: ignore[no-untyped-def]
            gift = threading.current_thread().name == "railwire-weights-gift"
            outcome = run(writer, works, imms, **options) if after or not gift else None
            if gift:
                self.begun.set()
                assert self.go.wait(30)
            return run(writer, works, imms, **options) if outcome is None else outcome

        monkeypatch.setattr(Writer, "run", held)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_an_update_that_begins_meanwhile_goes_first(bed: Bed, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    held = Held(monkeypatch)
    world = World(bed, 2)
    first = Model(bed, "a", mode=mode, catch_up=True)
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    second = Model(bed, "b", mode=mode, catch_up=True)
    assert held.begun.wait(20)
    world.trainers[0].await_receivers(2)
    world.step()
    good(world.update(2))  # the gift of version 1 hangs
    held.go.set()
    for model in (first, second):
        assert model.receiver.version == 2
        model.check(world.whole)
    time.sleep(0.3)  # whatever the gift still does
    second.check(world.whole)
    assert second.receiver.version == 2


@pytest.mark.parametrize("after", [False, True])
def test_an_update_without_the_late_one_is_caught_up_with(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """The holder's memory changes before the gift has ended: it is declined, and what comes next is the new version."""
    held = Held(monkeypatch, after)
    world = World(bed, 2)
    first = Model(bed, "a", catch_up=True)
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    seen: list[int] = []

    assert world.trainers[0]._lead is not None
    welcome = world.trainers[0]._lead._welcome
    world.trainers[0]._lead._welcome = lambda: None  # type: ignore[method-assign]  # as if it came a little later
    second = Model(bed, "b", on_publish=seen.append, catch_up=True)
    assert held.begun.wait(20)
    world.step()
    good(world.update(2))
    held.go.set()
    assert second.receiver.wait(2, 20) == 2
    assert seen == [2]  # never 1, of which it had been promised whole weights
    second.check(world.whole)
    world.trainers[0]._lead._welcome = welcome  # type: ignore[method-assign]
    world.step()
    good(world.update(3))
    for model in (first, second):
        assert model.receiver.version == 3
        model.check(world.whole)


def test_a_holder_that_dies_midway_is_replaced(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    world = World(bed, 2)
    holders = [Model(bed, name, catch_up=True) for name in "ab"]
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    late = Model(bed, "c", catch_up=True)
    assert held.begun.wait(20)
    holders[0].engine.close(0.1)
    held.go.set()
    assert late.receiver.wait(1, 30) == 1
    late.check(world.whole)
    holders[0].receiver.close()
    holders[1].check(world.whole)


def test_after_a_failed_update_the_version_that_is_served_can_still_be_had(bed: Bed) -> None:
    world = World(bed, 2, checksum=True)
    staged = Model(bed, "a", catch_up=True)
    resting = Model(bed, "b", mode="in_place", catch_up=True)
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    before = {name: tensor.clone() for name, tensor in world.whole.items()}
    world.step()
    machine = resting.receiver._machine
    assert machine is not None
    publish, machine.landed = machine.landed, lambda attempt, checksum=None: machine.broken(attempt, "a test")  # type: ignore[method-assign, assignment]
    assert all(isinstance(result, UpdateError) for result in world.update(2))
    machine.landed = publish  # type: ignore[method-assign]
    # In place there is nothing whole any more; the other's copy was overwritten, but not what it serves.
    assert resting.receiver.wait(1, 20) == 1
    for model in (staged, resting):
        model.check(before)
    good(world.update(2))
    for model in (staged, resting):
        model.check(world.whole)


def test_while_the_trainers_restart_their_last_version_can_be_had(bed: Bed) -> None:
    world = World(bed, 1)
    first = Model(bed, "a", catch_up=True)
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    world.trainers[0].close()
    world.trainers[0]._engine.close(0.1)
    reborn = World(bed, 1, epoch=2)  # has published nothing yet
    late = Model(bed, "b", catch_up=True)
    assert late.receiver.wait(1, 30) == 1
    late.check(world.whole)
    reborn.trainers[0].await_receivers(2, 30)
    good(reborn.update(2))
    for model in (first, late):
        model.check(reborn.whole)


@pytest.mark.parametrize("error", [RendezvousError("the store is away"), PlanError("not what it should be")])
def test_a_store_that_cannot_be_asked_while_joining_costs_only_the_giving(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def published(catcher: catching.Catcher, epoch: int) -> catching.Version | None:
        raise error

    world = World(bed, 1)
    model = Model(bed, "a", catch_up=True)
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    monkeypatch.setattr(catching.Catcher, "published", published)
    world.trainers[0].close()
    world.trainers[0]._engine.close(0.1)
    reborn = World(bed, 1, epoch=2)
    reborn.trainers[0].await_receivers(1, 30)
    good(reborn.update(2))
    assert model.receiver.wait(2, 20) == 2
    model.check(reborn.whole)
    reborn.trainers[0].close()
    reborn.trainers[0]._engine.close(0.1)
    soon(lambda: model.receiver._left)  # it has noticed, and would join again


def test_shuffled_weights_are_not_given(bed: Bed) -> None:
    world = World(bed, 1)
    holder = Model(bed, "a", mode="in_place", catch_up=True, on_publish=lambda version: shuffle())

    def shuffle() -> None:
        holder.live["qk"].copy_(holder.live["qk"].flip(0))

    world.trainers[0].await_receivers(1)
    good(world.update(1))
    late = Model(bed, "b", catch_up=True)
    with pytest.raises(TimeoutError):
        late.receiver.wait(1, 2.5)
    world.trainers[0].await_receivers(2)
    good(world.update(1, welcome=True))
    late.check(world.whole)


def test_one_wrong_byte_is_found_and_another_holder_asked(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "railwire.weights")
    world = World(bed, 2, checksum=True)
    holders = [Model(bed, name, catch_up=True) for name in "ab"]
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    say, lies = Giver._say, []

    def lie(giver, peer, message):  # type: ignore[no-untyped-def]
        if not lies:
            lies.append(message)
            message = type(message)(message.attempt, message.checksum + 1)
        say(giver, peer, message)

    monkeypatch.setattr(Giver, "_say", lie)
    late = Model(bed, "c", catch_up=True)
    assert late.receiver.wait(1, 30) == 1
    late.check(world.whole)
    assert len(lies) == 1 and re.search("has not caught up with version 1: the checksum", caplog.text)
    del holders


def test_requests_that_cannot_be_are_declined(bed: Bed) -> None:
    """Of somebody else's memory, of another version, by a plan that is none."""
    world = World(bed, 1)
    holder = Model(bed, "a", catch_up=True)
    other = Model(bed, "b")
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    asker = bed.engine()
    answers: list[object] = []
    asker.on_message(lambda peer, data: answers.append(messages.decode(data)))
    peer = asker.connect(holder.engine.address)

    def ask(message: object) -> object:
        answers.clear()
        asker.send(peer, messages.encode(message))  # type: ignore[arg-type]
        soon(lambda: answers)
        return answers[0]

    assert ask(messages.Which(7)) == messages.Holds(7, 1, 1)
    for slot, version, epoch, expected in (
        (other.receiver._slot, 1, 1, "is not that of who asks"),
        (99, 1, 1, "is not in the store"),
        (other.receiver._slot, 2, 1, "does not hold version 2"),
        (other.receiver._slot, 1, 2, "does not hold version 1"),
    ):
        answer = ask(messages.Fetch(8, slot, 0, b"", epoch, version, 5))
        assert isinstance(answer, messages.Declined) and expected in answer.reason
    for message in (messages.Gave(3, 4), messages.Declined(3, "x"), messages.Holds(3, 1, 9)):  # nobody asked
        asker.send(peer, messages.encode(message))
    assert ask(messages.Which(9)) == messages.Holds(9, 1, 1)
    holder.check(world.whole)


def test_parts_of_several_holders_fit_together() -> None:
    from railwire.weights.tables import Held as Box
    from railwire.weights.tables import RankTable

    def table(rank: str, *boxes: tuple[tuple[int, int], tuple[int, int]], dtype: str = "bfloat16") -> RankTable:
        held, at = [], 0
        for lo, size in boxes:
            held.append(Box("w", (8, 6), dtype, lo, size, 0, at, (2 * size[1], 2)))
            at += 2 * size[0] * size[1]
        return RankTable(rank, tuple(held), (at,))

    wanted = table("x", ((2, 0), (4, 6)))
    upper, lower, left = table("u", ((0, 0), (4, 6))), table("l", ((4, 0), (4, 6))), table("c", ((0, 0), (8, 3)))
    plan = peer_plan.peer_plan([upper, lower, left], wanted)
    assert plan.nbytes()[:, 0].sum() == 4 * 6 * 2 and not plan.units
    assert plan.nbytes()[2, 0] == 0  # would be written twice
    for holders in ([upper], [upper, left], [table("d", ((0, 0), (8, 6)), dtype="float16")]):
        with pytest.raises(PlanError, match="w: receiver x wants a part of it that no receiver asked holds"):
            peer_plan.peer_plan(holders, wanted)
    alike = [table(f"a{i}", ((2, 0), (4, 6))) for i in range(3)]
    assert all(peer_plan.holds_all(one, wanted) for one in alike) and not peer_plan.holds_all(upper, wanted)
    assert int(peer_plan.peer_plan(alike, wanted).nbytes().sum()) == 48
    tied = RankTable("t", (*wanted.held, Box("v", (8, 6), "bfloat16", (2, 0), (4, 6), 0, 0, (12, 2))), (48,))
    assert int(peer_plan.peer_plan([upper, lower], tied).nbytes().sum()) == 48  # the memory is one
    assert torch.tensor(plan.dst_offsets).min() == 0
