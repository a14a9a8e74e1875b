"""Boxes of DTensors against torch itself; recording of loaders; fp8 against a plain reference."""

from __future__ import annotations

import itertools
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from railwire.weights.errors import PlanError, RecordingError
from railwire.weights.placements import from_dtensor, local_parts
from railwire.weights.recording import record
from railwire.weights.source import describe
from railwire.weights.tables import RankTable


def fake_world(rank: int, size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())


@pytest.fixture(autouse=True)
def _no_world():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_parts_are_what_torch_distributes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    cases = [
        ((10, 6), (4, 2), (_StridedShard(0, split_factor=2), Shard(0))),
        ((10, 6), (4, 2), (Shard(0), Shard(0))),
        ((7, 5), (4, 2), (Shard(1), Shard(0))),
        ((3, 8), (4, 2), (Shard(0), Replicate())),
        ((3, 8), (4, 2), (Replicate(), Shard(-1))),
        ((16, 2, 3), (2, 4), (_StridedShard(0, split_factor=4), Shard(0))),
        ((13, 4), (2, 4), (_StridedShard(0, split_factor=3), Shard(1))),
    ]
    for rank in range(8):
        fake_world(rank, 8)
        for shape, mesh_shape, placements in cases:
            mesh = init_device_mesh("cpu", mesh_shape)
            whole = torch.arange(int(np.prod(shape))).view(shape)
            local = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
            ours, parts = local_parts(shape, mesh_shape, mesh.get_coordinate(), from_dtensor(placements, len(shape)))
            assert ours == tuple(local.shape), (shape, placements, rank)
            seen = torch.full(ours, -1)
            for part in parts:
                here = tuple(slice(a, a + n) for a, n in zip(part.local, part.size, strict=True))
                there = tuple(slice(a, a + n) for a, n in zip(part.lo, part.size, strict=True))
                seen[here] = whole[there]
            assert torch.equal(seen, local), (shape, placements, rank)


def fsdp_on_tp(rank: int) -> bytes:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    fake_world(rank, 8)
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(10, 22), nn.Linear(22, 10), nn.Linear(10, 10))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return describe(f"t{rank}", model.named_parameters(remove_duplicate=False)).table.encode()


def test_fsdp2_on_tensor_parallel() -> None:
    boxes: dict[str, np.ndarray] = {}
    # A process each: torch keeps meshes of equal shape, and with them the rank that made them.
    context = multiprocessing.get_context("fork")
    for rank in range(8):
        with context.Pool(1) as pool:
            table = RankTable.decode(pool.apply_async(fsdp_on_tp, (rank,)).get(60))
        assert set(table.names) == {f"{i}.{w}" for i in range(3) for w in ("weight", "bias")}
        for held in table.held:
            count = boxes.setdefault(held.name, np.zeros(held.shape, dtype=int))
            count[tuple(slice(a, a + n) for a, n in zip(held.lo, held.size, strict=True))] += 1
    for name, count in boxes.items():
        assert count.min() == count.max() >= 1, name  # every element, as often as every other


def test_sources_that_cannot_be() -> None:
    tied = nn.Embedding(4, 3)
    head = nn.Linear(3, 4, bias=False)
    head.weight = tied.weight
    model = nn.ModuleDict({"embed": tied, "head": head})
    source = describe("t", model.named_parameters(remove_duplicate=False))
    assert source.table.tied == {"head.weight": "embed.weight"}
    assert len(source.storages.buffers) == 1
    with pytest.raises(PlanError, match="x: two parameters"):
        describe("t", [("x", torch.zeros(2)), ("x", torch.ones(2))])
    with pytest.raises(PlanError, match="x: 5 dimensions"):
        describe("t", {"x": torch.zeros(1, 1, 1, 1, 1)})


# ---- recording -------------------------------------------------------------------------------------------------------
def recorded(live: dict[str, torch.Tensor], checkpoint: dict[str, torch.Tensor], load, **options):
    shapes = {name: (t.shape, t.dtype) for name, t in checkpoint.items()}
    before = {name: t.clone() for name, t in live.items()}
    destination = record("r", load, shapes, live, **options)
    for name, tensor in live.items():
        assert torch.equal(tensor, before[name])  # recording writes nothing
    # What the record says, done by hand, must be what the loader does.
    for held in destination.table.held:
        box = checkpoint[held.name][tuple(slice(a, a + n) for a, n in zip(held.lo, held.size, strict=True))]
        buffer = destination.storages.buffers[held.region].view(box.dtype)
        size = box.element_size()
        torch.as_strided(buffer, held.size, [s // size for s in held.strides], held.offset // size).copy_(box)
    ours = {name: t.clone() for name, t in live.items()}
    for name, tensor in live.items():
        tensor.copy_(before[name])
    with torch.no_grad():
        load(iter(checkpoint.items()))
    for name, tensor in live.items():
        assert torch.equal(tensor, ours[name]), name
    return destination


def test_fused_split_and_expert_loaders_are_recorded() -> None:
    hidden, heads, width, experts, tp, rank = 12, 4, 8, 3, 2, 1
    live = {
        "qkv": torch.zeros(3 * hidden // tp, hidden),
        "w13": torch.zeros(experts, 2 * width // tp, hidden),
        "w2": torch.zeros(experts, hidden, width // tp),
        "norm": torch.zeros(hidden),
        "turned": torch.zeros(hidden, width),
        "scalar": torch.zeros(()),
    }
    checkpoint = {f"{p}_proj": torch.randn(hidden, hidden) for p in "qkv"}
    for e in range(experts):
        checkpoint |= {f"experts.{e}.w1": torch.randn(width, hidden), f"experts.{e}.w3": torch.randn(width, hidden)}
        checkpoint[f"experts.{e}.w2"] = torch.randn(hidden, width)
    checkpoint |= {"norm": torch.randn(hidden), "turned": torch.randn(width, hidden), "scalar": torch.randn(())}

    def load(weights) -> None:
        for name, weight in weights:
            if name.endswith("_proj"):
                part = hidden // tp
                place = "qkv".index(name[0]) * part
                shard = weight.view(heads, hidden // heads, hidden)[heads // tp * rank : heads // tp * (rank + 1)]
                live["qkv"].data.narrow(0, place, part).copy_(shard.reshape(part, hidden))
            elif name.startswith("experts"):
                _, expert, which = name.split(".")
                if which == "w2":
                    live["w2"][int(expert)].copy_(weight.chunk(tp, dim=1)[rank].contiguous())
                else:
                    half = width // tp
                    at = 0 if which == "w1" else half
                    live["w13"][int(expert), at : at + half] = weight[rank * half : (rank + 1) * half].to(torch.float32)
            elif name == "turned":
                live["turned"].copy_(weight.t())
            else:
                live[name].copy_(weight)

    destination = recorded(live, checkpoint, load)
    assert destination.unwritten == ()
    assert len(destination.storages.buffers) == len(live)


def test_loaders_that_compute_or_leave_out_are_named() -> None:
    live = {"a": torch.zeros(4, 4), "b": torch.zeros(4)}
    shapes = {"a": ((4, 4), torch.float32), "b": ((4,), torch.float32)}

    def doubling(weights) -> None:
        for name, weight in weights:
            live[name].copy_(weight * 2 if name == "a" else weight)

    with pytest.raises(RecordingError, match="a: the checkpoint fills 0"):
        record("r", doubling, shapes, live)
    with pytest.raises(RecordingError, match="b: the checkpoint fills 0"):
        record("r", lambda weights: live["a"].copy_(dict(weights)["a"]), shapes, live)
    elsewhere = torch.zeros(4, 4)
    with pytest.raises(RecordingError, match="a: is copied into memory of no live parameter"):
        record("r", lambda weights: elsewhere.copy_(dict(weights)["a"]), shapes, live, allow_unwritten=["a", "b"])
    with pytest.raises(RecordingError, match="no copy of a part"):
        record("r", lambda weights: dict(weights)["a"].sum().item(), shapes, live)

    def shuffling(weights) -> None:
        loaded = dict(weights)
        live["a"].copy_(loaded["a"].view(-1)[::2].repeat(2).view(4, 4))

    with pytest.raises(RecordingError):
        record("r", shuffling, shapes, live)
    assert list(itertools.chain(live["a"].view(-1).tolist())) == [0.0] * 16
