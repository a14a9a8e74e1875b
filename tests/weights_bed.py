"""Trainers and receivers in one process: what the tests of weight updates are built on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from railwire import TransferEngine
from railwire.weights.errors import UpdateError
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
