"""Weight updates over real engines: byte-exact, all or nothing, whoever dies."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from railwire import TransferEngine
from railwire.weights.errors import UpdateError
from railwire.weights.quantize import quantize_into
from railwire.weights.receiver import Receiver
from railwire.weights.recording import record
from railwire.weights.rendezvous import MemoryStore, Rendezvous
from railwire.weights.source import Box, describe_boxes
from railwire.weights.trainer import Report, Trainer

ROWS, COLS = 512, 384
LIVENESS = 1.5


class Bed:
    """Trainers and receivers in one process, an engine each."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.engines: list[TransferEngine] = []
        self.things: list[Trainer | Receiver] = []

    def engine(self) -> TransferEngine:
        self.engines.append(TransferEngine(nics=["tcp://127.0.0.1"], liveness=LIVENESS, secret="s"))
        return self.engines[-1]

    def rendezvous(self) -> Rendezvous:
        return Rendezvous(self.store, secret="s")

    def close(self) -> None:
        for thing in self.things:
            thing.close()
        for engine in self.engines:
            engine.close()


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.close()


class World:
    """A model whose rows are cut over ``size`` trainers."""

    def __init__(self, bed: Bed, size: int, *, epoch: int = 1, cut: int = 0, **options: object) -> None:
        self.bed, self.size = bed, size
        generator = torch.Generator().manual_seed(epoch)
        self.whole = {
            name: torch.randn(shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)
            for name, shape in {"q": (ROWS, COLS), "k": (ROWS, COLS), "norm": (ROWS,), "head": (130, 70)}.items()
        }
        self.parts = []
        for rank in range(size):
            boxes = {}
            for name, tensor in self.whole.items():
                each = cut or -(-tensor.shape[0] // size)
                begin, end = min(each * rank, tensor.shape[0]), min(each * (rank + 1), tensor.shape[0])
                boxes[name] = Box(tensor[begin:end].clone(), tuple(tensor.shape), (begin, *[0] * (tensor.ndim - 1)))
            self.parts.append(boxes)
        self.trainers: list[Trainer] = [None] * size  # type: ignore[list-item]

        def make(rank: int) -> None:
            self.trainers[rank] = Trainer(
                bed.engine(), bed.rendezvous(), describe_boxes(f"trainer {rank}", self.parts[rank]),
                rank=rank, world_size=size, epoch=epoch, timeout=options.get("timeout", 20.0),
                staging_bytes=options.get("staging_bytes", 1 << 20), allow_extra=bool(options.get("allow_extra")),
                checksum=bool(options.get("checksum")),
            )  # fmt: skip

        together([lambda rank=rank: make(rank) for rank in range(size)])
        bed.things += self.trainers

    def step(self) -> None:
        """A training step: every weight changes."""
        for name, tensor in self.whole.items():
            tensor.mul_(-0.75).add_(0.125)
            for boxes in self.parts:
                box = boxes[name]
                box.tensor.copy_(tensor[box.lo[0] : box.lo[0] + box.tensor.shape[0]])

    def update(
        self, version: int, during: Callable[[int], object] = lambda rank: None, *, welcome: bool = False
    ) -> list[Report | UpdateError]:
        found: list[Report | UpdateError] = [None] * self.size  # type: ignore[list-item]

        def one(rank: int) -> None:
            try:
                trainer = self.trainers[rank]
                if welcome:
                    found[rank] = trainer.welcome(version)
                else:
                    found[rank] = trainer.update(version, progress=lambda done, total: during(rank))
            except UpdateError as error:
                found[rank] = error

        together([lambda rank=rank: one(rank) for rank in range(self.size)])
        return found


def together(tasks: list[Callable[[], object]]) -> None:
    errors: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def good(results: list[Report | UpdateError]) -> None:
    assert all(isinstance(result, Report) for result in results), results


class Model:
    """An inference rank: q and k fused, cut by columns; "norm" and "head" whole."""

    def __init__(
        self, bed: Bed, name: str, rank: int = 0, size: int = 1, *, fp8: bool = False, **options: object
    ) -> None:
        self.bed, self.rank, self.size, self.fp8 = bed, rank, size, fp8
        width = COLS // size
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        self.live = {
            "qk": torch.zeros(2 * ROWS, width).to(dtype),
            "norm": torch.zeros(ROWS, dtype=torch.float32 if fp8 else torch.bfloat16),
            "head": torch.zeros(130, 70, dtype=torch.bfloat16),
        }
        if fp8:
            self.live["qk_scale"] = torch.zeros(2 * ROWS // 128, -(-width // 128))
        self.engine = bed.engine()
        self.receiver = Receiver(self.engine, bed.rendezvous(), name, self.describe, **options)  # type: ignore[arg-type]
        bed.things.append(self.receiver)

    def describe(self, checkpoint):  # type: ignore[no-untyped-def]
        names = {n: s for n, s in checkpoint.items() if n != "extra"}
        if self.fp8:
            names |= {f"{n}_scale_inv": ((ROWS // 128, -(-COLS // 128)), torch.float32) for n in "qk"}
        return record(self.receiver_name, self.load, names, self.live)

    receiver_name = "r"

    def load(self, weights) -> None:  # type: ignore[no-untyped-def]
        for name, weight in weights:
            if name.endswith("_scale_inv"):
                half = ROWS // 128
                blocks = weight.shape[1] // self.size
                at = half * "qk".index(name[0])
                self.live["qk_scale"][at : at + half].copy_(weight[:, blocks * self.rank : blocks * (self.rank + 1)])
            elif name in "qk":
                width = COLS // self.size
                at = ROWS * "qk".index(name)
                self.live["qk"][at : at + ROWS].copy_(weight[:, width * self.rank : width * (self.rank + 1)])
            else:
                self.live[name].copy_(weight)

    def check(self, whole: dict[str, torch.Tensor]) -> None:
        width = COLS // self.size
        columns = slice(width * self.rank, width * (self.rank + 1))
        qk = torch.cat((whole["q"], whole["k"]))[:, columns].contiguous()
        if self.fp8:
            out, scales = torch.empty(qk.shape, dtype=torch.float8_e4m3fn), torch.empty_like(self.live["qk_scale"])
            reference_fp8(qk, out, scales)
            assert torch.equal(self.live["qk_scale"], scales)
            assert torch.equal(self.live["qk"].view(torch.uint8), out.view(torch.uint8))
        else:
            assert torch.equal(self.live["qk"], qk)
        assert torch.equal(self.live["norm"], whole["norm"].to(self.live["norm"].dtype))
        assert torch.equal(self.live["head"], whole["head"])


def reference_fp8(weight: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    """Block by block, as plainly as it can be said."""
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            block = weight[at].float()
            peak = block.abs().max()
            scale = peak / 448.0 if peak > 0 else torch.tensor(1.0)
            scales[i, j] = scale
            out[at] = (block / scale).to(torch.float8_e4m3fn)


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


def test_a_trainer_without_the_others_says_so(bed: Bed) -> None:
    world = World(bed, 2, timeout=1.0)
    with pytest.raises(UpdateError, match="trainer rank 1 did not call update"):
        world.trainers[0].update(1)
    good(world.update(2))


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
    right = receiver._sum

    def flipped() -> int:
        receiver._shadows[0][5] ^= 1
        return right()

    receiver._sum = flipped  # type: ignore[method-assign]
    world.step()
    result = world.update(3)[0]
    assert isinstance(result, UpdateError)
    # The number behind the name is the order in which the two joined.
    assert re.search(r"receiver r1#\d+: the checksum of what has landed is wrong", str(result))
    assert receiver.version == 2
    receiver._sum = right  # type: ignore[method-assign]
    good(world.update(3))
    models[1].check(world.whole)


def test_shards_that_cut_blocks_and_cannot_be_gathered_are_named(bed: Bed) -> None:
    world = World(bed, 3)
    Model(bed, "r0", fp8=True)
    world.trainers[0].await_receivers(1)
    result = world.update(1)[0]
    assert isinstance(result, UpdateError) and "q: its shards cut fp8 blocks" in str(result)
