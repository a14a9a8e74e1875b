"""Who dies, is late, comes back or comes later: the others go on, and what is served is a whole version."""

from __future__ import annotations

import re
import threading
import time

import pytest
import torch
from weights_bed import Bed, Model, World, good

from railwire.weights.errors import UpdateError
from railwire.weights.trainer import Report


def test_a_receiver_that_answers_too_late_is_left_out_and_joins_again(bed: Bed) -> None:
    world = World(bed, 2, timeout=1.0)
    slow = threading.Event()
    models = [Model(bed, "r"), Model(bed, "s", on_begin=lambda version: version == 2 and slow.wait(20))]
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    for problem in world.update(2):
        assert isinstance(problem, UpdateError) and re.search(r"receiver s\b.*did not answer in time", str(problem))
    world.step()
    good(world.update(3))  # without it
    models[0].check(world.whole)
    slow.set()
    world.trainers[0].await_receivers(3, 20)  # it has a place again
    world.step()
    good(world.update(4))
    for model in models:
        assert model.receiver.wait(4, 10) == 4
        model.check(world.whole)


def test_a_receiver_that_dies_leaves_and_one_that_comes_joins(bed: Bed) -> None:
    world = World(bed, 2)
    models = [Model(bed, f"r{i}") for i in range(2)]
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    gone = threading.Event()

    def kill(rank: int) -> None:
        if not gone.is_set():
            gone.set()
            models[1].engine.close(0.1)

    world.step()
    reports = world.update(2, kill)
    assert gone.is_set()
    good(reports)
    models[0].check(world.whole)
    models[1].receiver.close()
    again = Model(bed, "r1")
    world.trainers[0].await_receivers(3)
    world.step()
    good(world.update(3))
    assert set(world.trainers[0].receivers) == {"r0", "r1"}
    again.check(world.whole)
    models[0].check(world.whole)


def test_a_receiver_that_comes_late_is_given_the_published_version(bed: Bed) -> None:
    world = World(bed, 2)
    first = Model(bed, "r0")
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    second = Model(bed, "r1", mode="in_place")
    world.trainers[0].await_receivers(2)
    with first.receiver.serving():  # it is not disturbed
        reports = world.update(1, welcome=True)
    good(reports)
    assert all("r0#1" not in report.nbytes for report in reports if isinstance(report, Report))
    assert second.receiver.version == 1
    second.check(world.whole)
    assert "version 2 is not the published one, 1" in str(world.update(2, welcome=True)[0])
    world.step()
    good(world.update(2))
    for model in (first, second):
        model.check(world.whole)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_trainer_that_dies_poisons_the_version_only(bed: Bed, mode: str) -> None:
    world = World(bed, 3)
    model = Model(bed, "r", mode=mode)
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    before = {name: tensor.clone() for name, tensor in model.live.items()}
    world.step()

    def kill(rank: int) -> None:
        if rank == 2:
            bed.engines[world_engine(world, 2)].close(0.1)

    results = world.update(2, kill)
    assert isinstance(results[0], UpdateError) and isinstance(results[1], UpdateError), results
    assert "trainer rank 2" in str(results[0])
    assert model.receiver.version == (1 if mode == "staged" else None)
    if mode == "staged":
        for name, tensor in model.live.items():
            assert torch.equal(tensor, before[name])
    assert isinstance(world.update(3)[0], UpdateError)  # rank 2 is still missing
    # The job restarts, as torchrun does it: another life of all ranks. The receiver stays.
    for trainer in world.trainers:
        trainer.close()
        trainer._engine.close(0.1)
    reborn = World(bed, 3, epoch=2)
    reborn.trainers[0].await_receivers(1, 30)
    reports = reborn.update(4)
    good(reports)
    assert model.receiver.wait(4, 5) == 4
    model.check(reborn.whole)


def world_engine(world: World, rank: int) -> int:
    return world.bed.engines.index(world.trainers[rank]._engine)


def test_the_lead_dies(bed: Bed) -> None:
    world = World(bed, 2)
    model = Model(bed, "r")
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    before = {name: tensor.clone() for name, tensor in model.live.items()}
    world.step()
    results: list[object] = []

    def second() -> None:
        with pytest.raises(UpdateError, match="rank 0, which leads, is lost"):
            world.trainers[1].update(2)
        results.append(True)

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    time.sleep(0.2)
    world.trainers[0]._engine.close(0.1)
    thread.join(20)
    assert results
    assert model.receiver.version == 1
    for name, tensor in model.live.items():
        assert torch.equal(tensor, before[name])


def test_a_trainer_without_the_others_says_so(bed: Bed) -> None:
    world = World(bed, 2, timeout=1.0)
    with pytest.raises(UpdateError, match="trainer rank 1 did not call update"):
        world.trainers[0].update(1)
    good(world.update(2))
