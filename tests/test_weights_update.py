"""Weight updates over real engines: byte-exact, and nothing moves that does not fit."""

from __future__ import annotations

import re

import pytest
import torch
from weights_bed import Bed, Model, World, good, reference_fp8, together

from railwire import TransferEngine
from railwire.weights.errors import UpdateError
from railwire.weights.landing import values
from railwire.weights.plan import Plan
from railwire.weights.quantize import quantize_into
from railwire.weights.receiver import Receiver
from railwire.weights.recording import record
from railwire.weights.rendezvous import Rendezvous
from railwire.weights.source import Box, describe_boxes
from railwire.weights.trainer import Trainer


def test_fp8_is_bit_exact() -> None:
    for shape in ((256, 256), (300, 130), (1, 1), (129, 640)):
        weight = (torch.randn(shape) * torch.logspace(-6, 3, shape[0]).unsqueeze(1)).to(torch.bfloat16)
        weight[: shape[0] // 3] = 0
        blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
        ours, theirs = torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(shape, dtype=torch.float8_e4m3fn)
        scales, expected = torch.empty(blocks), torch.empty(blocks)
        quantize_into(weight, ours, scales)
        reference_fp8(weight, theirs, expected)
        assert torch.equal(scales, expected)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert torch.isfinite(ours.float()).all()


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_updates_are_exact_and_versions_follow(bed: Bed, mode: str) -> None:
    world = World(bed, 3)
    models = [Model(bed, f"r{i}", i, 2, mode=mode) for i in range(2)]
    world.trainers[0].await_receivers(2)
    for version in (1, 2, 5):
        world.step()
        reports = world.update(version)
        good(reports)
        for model in models:
            assert model.receiver.wait(version, 5) == version
            model.check(world.whole)
    back = world.update(5)
    assert all(isinstance(error, UpdateError) and "does not follow 5" in str(error) for error in back)
    assert [model.receiver.version for model in models] == [5, 5]


def test_a_live_tensor_that_was_replaced_is_named(bed: Bed) -> None:
    world = World(bed, 2)
    model = Model(bed, "r")
    other = Model(bed, "o", live=lambda: other.live)
    world.trainers[0].await_receivers(2)
    good(world.update(1))
    kept = other.live["norm"]
    other.live["norm"] = kept.clone()  # as a module's parameter is replaced after loading
    for problem in world.update(2):
        assert isinstance(problem, UpdateError) and re.search(r"receiver o\b.*norm: has been replaced", str(problem))
    assert [one.receiver.version for one in (model, other)] == [1, 1]
    other.live["norm"] = kept
    model.live["qk"].data = model.live["qk"].t().contiguous().t()  # the same shape, packed otherwise
    for problem in world.update(3):
        assert isinstance(problem, UpdateError) and re.search(r"receiver r\b.*qk: has been replaced", str(problem))


def shuffle(model: Model) -> None:
    """What some engines do to weights after loading, in the same memory."""
    model.live["qk"].copy_(model.live["qk"].roll(1, 0))


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_values_that_were_shuffled_are_named(bed: Bed, mode: str) -> None:
    world = World(bed, 2)
    model = Model(bed, "r", mode=mode, watch_values=True)
    # Where the engine's shuffle has its place.
    shuffled = Model(bed, "s", mode=mode, watch_values=True, on_publish=lambda version: shuffle(shuffled))
    world.trainers[0].await_receivers(2)
    for version in (1, 2):
        world.step()
        good(world.update(version))
        model.check(world.whole)
    shuffle(model)
    for problem in world.update(3):
        assert isinstance(problem, UpdateError)
        assert re.search(r"receiver r\b.*qk: its values have changed since they were published", str(problem))
    assert model.receiver.version == 2
    if mode == "in_place":
        shuffle(shuffled)  # whose weights are nobody's version since the update that failed
    model.live["qk"].copy_(model.live["qk"].roll(-1, 0))
    good(world.update(3))
    model.check(world.whole)


def test_a_sample_of_values_knows_their_order() -> None:
    for shape, dtype in (
        ((300, 64), torch.bfloat16),
        ((7,), torch.float32),
        ((5, 4, 3), torch.float8_e4m3fn),
        ((), torch.int8),
    ):
        tensor = torch.randn(shape).mul(50).to(dtype)
        kept = values(tensor)
        assert values(tensor.clone()) == kept == values(tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
        if tensor.ndim:
            assert values(tensor.flip(0)) != kept
    assert values(torch.zeros(0, 4)) == 0


def test_100_000_runs_are_one_submission(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 100_000
    whole = torch.arange(rows * 64, dtype=torch.int32).view(rows, 64)
    engine, calls = bed.engine(), []
    trainer = Trainer(
        engine, bed.rendezvous(), describe_boxes("t", {"w": Box(whole, (rows, 64), (0, 0))}),
        rank=0, world_size=1, epoch=1, timeout=30.0,
    )  # fmt: skip
    live = {"w": torch.zeros(rows, 32, dtype=torch.int32)}
    receiver = Receiver(
        bed.engine(), bed.rendezvous(), "r",
        lambda checkpoint: record("r", lambda ws: [live["w"].copy_(w[:, 32:]) for _, w in ws], checkpoint, live),
    )  # fmt: skip
    bed.things += [trainer, receiver]
    trainer.await_receivers(1)
    write_pages = TransferEngine.write_pages

    def counted(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(args)
        return write_pages(self, *args, **kwargs)

    monkeypatch.setattr(TransferEngine, "write_pages", counted)
    trainer.update(1)
    receiver.wait(1, 10)
    assert len(calls) == 1 and calls[0][1].runs[0] * len(calls[0][1]) == rows
    assert torch.equal(live["w"], whole[:, 32:])


def test_fp8_and_casts_on_the_way_within_the_watermark(bed: Bed) -> None:
    world = World(bed, 4, staging_bytes=60_000)
    model = Model(bed, "r", fp8=True)
    plain = Model(bed, "p", mode="in_place")
    world.trainers[0].await_receivers(2)
    for version in (1, 2):
        world.step()
        good(world.update(version))
        model.check(world.whole)
        plain.check(world.whole)
    waters = [trainer.staging_high_water for trainer in world.trainers]
    assert 0 < max(waters) <= 60_000
    kinds = {unit.kind for unit in world.trainers[0].plans[0].units}
    assert kinds == {"fp8", "cast"}


def test_wrong_receivers_and_wrong_runs_are_refused(bed: Bed) -> None:
    world = World(bed, 2, timeout=3.0)
    model = Model(bed, "r")
    world.trainers[0].await_receivers(1)
    good(world.update(1))
    # Ranks that do not agree on the version.
    found: list[object] = [None, None]

    def one(rank: int) -> None:
        try:
            world.trainers[rank].update(3 - rank)
        except UpdateError as error:
            found[rank] = error

    together([lambda rank=rank: one(rank) for rank in range(2)])
    assert "trainer rank 1 is about to publish version 2, not 3" in str(found[0])
    # A plan that is not the one the receiver has checked.
    machine = model.receiver._machine
    assert machine is not None
    right, machine.digest = machine.digest, b"x" * 16
    model.receiver._part, kept = None, model.receiver._part
    model.receiver._plan = lambda begin: setattr(model.receiver, "_part", kept)  # type: ignore[method-assign]
    results = world.update(4)
    assert "the trainers' plan is" in str(results[0])
    machine.digest = right
    good(world.update(4))
    model.check(world.whole)
    # A stranger, who does not know the secret, gets nowhere.
    stranger = Rendezvous(bed.store, secret="other")
    with pytest.raises(Exception, match="not signed"):
        stranger.get("1/lead")


def test_missing_parameters_are_named_before_the_first_byte(bed: Bed) -> None:
    world = World(bed, 1)

    class Greedy(Model):
        def describe(self, checkpoint):  # type: ignore[no-untyped-def]
            self.live["more"] = torch.zeros(4)
            return record("r", self.load, {**checkpoint, "more": ((4,), torch.float32)}, self.live)

    Greedy(bed, "r")
    world.trainers[0].await_receivers(1)
    result = world.update(1)[0]
    assert isinstance(result, UpdateError) and "more: receiver r wants it, no trainer has it" in str(result)


def test_a_checksum_finds_one_flipped_bit(bed: Bed) -> None:
    world = World(bed, 4, checksum=True)
    models = [Model(bed, "r0", fp8=True), Model(bed, "r1", 0, 2)]
    world.trainers[0].await_receivers(2)
    for version in (1, 2):
        world.step()
        good(world.update(version))
        for model in models:
            model.check(world.whole)
    receiver = models[1].receiver
    landing = receiver._landing
    assert landing is not None
    right = landing.checksum

    def flipped(part: Plan) -> int:
        landing.buffers[0][5] ^= 1
        return right(part)

    landing.checksum = flipped  # type: ignore[method-assign]
    world.step()
    result = world.update(3)[0]
    assert isinstance(result, UpdateError)
    # The number behind the name is the order in which the two joined.
    assert re.search(r"receiver r1#\d+: the checksum of what has landed is wrong", str(result))
    assert receiver.version == 2
    landing.checksum = right  # type: ignore[method-assign]
    good(world.update(3))
    models[1].check(world.whole)


def test_shards_that_cut_blocks_and_cannot_be_gathered_are_named(bed: Bed) -> None:
    world = World(bed, 3)
    Model(bed, "r0", fp8=True)
    world.trainers[0].await_receivers(1)
    result = world.update(1)[0]
    assert isinstance(result, UpdateError) and "q: its shards cut fp8 blocks" in str(result)
