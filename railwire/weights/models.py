"""Shapes of published models, and how a training and an inference cluster hold them: what `railwire weights simulate`
plans. The figures are those of the models' config.json on Hugging Face (moonshotai/Kimi-K2-Instruct,
deepseek-ai/DeepSeek-V3, Qwen/Qwen3-235B-A22B).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from railwire.weights.errors import PlanError
from railwire.weights.placements import Placement, local_parts, shard
from railwire.weights.tables import FP8, FP8_BLOCK, ITEMSIZE, SCALE_SUFFIX, Held, RankTable, contiguous


class Model(NamedTuple):
    """A mixture-of-experts transformer.

    Attributes:
        dense_layers: how many of the first layers have a dense MLP.
        q_rank, kv_rank, nope, rope, v_dim: multi-head latent attention; ``q_rank`` 0: grouped-query attention with
            ``kv_heads`` heads of ``v_dim``.
        fp8: the checkpoint's matrices are e4m3 with 128x128 block scales.
    """

    name: str
    layers: int
    dense_layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    v_dim: int
    intermediate: int
    experts: int
    shared_experts: int
    expert_intermediate: int
    fp8: bool


MODELS = {
    "kimi-k2": Model(
        "kimi-k2", 61, 1, 7168, 163840, 64, 64, 1536, 512, 128, 64, 128, 18432, 384, 1, 2048, True
    ),
    "deepseek-v3": Model(
        "deepseek-v3", 61, 3, 7168, 129280, 128, 128, 1536, 512, 128, 64, 128, 18432, 256, 1, 2048, True
    ),
    "qwen3-235b": Model(
        "qwen3-235b", 94, 0, 4096, 151936, 64, 4, 0, 0, 0, 0, 128, 12288, 128, 0, 1536, True
    ),
}  # fmt: skip


class Tensor(NamedTuple):
    """One tensor of the checkpoint.

    Attributes:
        layer: -1 of the embedding, ``layers`` of what follows the last layer.
        expert: -1, or its number.
        cut: the dimension along which inference cuts it over tensor-parallel ranks; None: replicated.
        matrix: quantised where the receivers take fp8.
    """

    name: str
    shape: tuple[int, ...]
    layer: int
    expert: int
    cut: int | None
    matrix: bool


def tensors(model: Model) -> Iterator[Tensor]:
    """All tensors in the order of the checkpoint."""
    m = model
    yield Tensor("model.embed_tokens.weight", (m.vocab, m.hidden), -1, -1, 0, False)
    for layer in range(m.layers):
        base = f"model.layers.{layer}."

        def of(name: str, *shape: int, cut: int | None = None, expert: int = -1, matrix: bool = True) -> Tensor:
            return Tensor(base + name, shape, layer, expert, cut, matrix and len(shape) > 1)  # noqa: B023

        yield of("input_layernorm.weight", m.hidden)
        yield of("post_attention_layernorm.weight", m.hidden)
        if m.q_rank:
            yield of("self_attn.q_a_proj.weight", m.q_rank, m.hidden)
            yield of("self_attn.q_a_layernorm.weight", m.q_rank)
            yield of("self_attn.q_b_proj.weight", m.heads * (m.nope + m.rope), m.q_rank, cut=0)
            yield of("self_attn.kv_a_proj_with_mqa.weight", m.kv_rank + m.rope, m.hidden)
            yield of("self_attn.kv_a_layernorm.weight", m.kv_rank)
            yield of("self_attn.kv_b_proj.weight", m.heads * (m.nope + m.v_dim), m.kv_rank, cut=0)
        else:
            yield of("self_attn.q_proj.weight", m.heads * m.v_dim, m.hidden, cut=0)
            yield of("self_attn.k_proj.weight", m.kv_heads * m.v_dim, m.hidden, cut=0)
            yield of("self_attn.v_proj.weight", m.kv_heads * m.v_dim, m.hidden, cut=0)
            yield of("self_attn.q_norm.weight", m.v_dim)
            yield of("self_attn.k_norm.weight", m.v_dim)
        yield of("self_attn.o_proj.weight", m.hidden, m.heads * m.v_dim, cut=1)
        if layer < m.dense_layers:
            yield from _mlp(of, "mlp.", m.hidden, m.intermediate, -1)
            continue
        yield of("mlp.gate.weight", m.experts, m.hidden, matrix=False)
        if m.q_rank:
            yield of("mlp.gate.e_score_correction_bias", m.experts)
        if m.shared_experts:
            yield from _mlp(of, "mlp.shared_experts.", m.hidden, m.shared_experts * m.expert_intermediate, -1)
        for expert in range(m.experts):
            yield from _mlp(of, f"mlp.experts.{expert}.", m.hidden, m.expert_intermediate, expert)
    yield Tensor("model.norm.weight", (m.hidden,), m.layers, -1, None, False)
    yield Tensor("lm_head.weight", (m.vocab, m.hidden), m.layers, -1, 0, False)


def _mlp(of: object, prefix: str, hidden: int, width: int, expert: int) -> Iterator[Tensor]:
    assert callable(of)
    yield of(f"{prefix}gate_proj.weight", width, hidden, cut=0, expert=expert)
    yield of(f"{prefix}up_proj.weight", width, hidden, cut=0, expert=expert)
    yield of(f"{prefix}down_proj.weight", hidden, width, cut=1, expert=expert)


class Layout(NamedTuple):
    """How the clusters hold a model.

    Attributes:
        pp, ep: pipeline stages and expert-parallel ranks of the trainers; what is left of them shards (FSDP).
        dense_shard: ranks over which FSDP cuts what is no expert; the groups of so many ranks are replicas (HSDP).
        inference_ep, inference_tp: of an inference instance; there are ``receivers / inference_ep`` instances, and in
            each ``inference_ep / inference_tp`` copies of what is no expert.
    """

    trainers: int
    receivers: int
    pp: int
    ep: int
    dense_shard: int
    inference_ep: int
    inference_tp: int


def default_layout(model: Model, trainers: int, receivers: int) -> Layout:
    """The paper's (PP 2, EP 8, FSDP with what is left; EP 32 for inference), as far as the numbers of ranks allow."""
    pp = 2 if trainers % 2 == 0 and trainers >= 4 else 1
    ep = _divisor(trainers // pp, 8)
    return Layout(
        trainers, receivers, pp, ep, _divisor(trainers // pp, 8), _divisor(receivers, 32), _divisor(receivers, 8)
    )


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if number % d == 0)


def trainer_tables(model: Model, layout: Layout, dtype: str = "bfloat16") -> list[RankTable]:
    """What each trainer holds: experts over EP and, whole, over FSDP; the rest over ``dense_shard`` ranks."""
    stage_ranks = layout.trainers // layout.pp
    if stage_ranks * layout.pp != layout.trainers or stage_ranks % layout.ep or stage_ranks % layout.dense_shard:
        raise PlanError(f"{layout.trainers} trainers cannot be {layout} ")
    fsdp = stage_ranks // layout.ep
    held: list[list[Held]] = [[] for _ in range(layout.trainers)]
    names: list[dict[str, tuple[tuple[int, ...], str]]] = [{} for _ in range(layout.trainers)]
    regions: list[list[int]] = [[] for _ in range(layout.trainers)]
    itemsize = ITEMSIZE[dtype]
    per_ep = -(-model.experts // layout.ep)
    per_rank = -(-per_ep // fsdp)
    cuts = _stages(model, layout.pp)
    for tensor in tensors(model):
        stage = sum(tensor.layer >= cut for cut in cuts[1:])
        base = stage * stage_ranks
        if tensor.expert >= 0:
            ep_rank, place = divmod(tensor.expert, per_ep)
            rank = base + ep_rank * fsdp + place // per_rank
            _add(held[rank], regions[rank], tensor, dtype, (0, 0), tensor.shape, 1, itemsize)
            names[rank][tensor.name] = (tensor.shape, dtype)
            continue
        local_of = [
            local_parts(tensor.shape, (layout.dense_shard,), (i,), (shard(0),))[1] for i in range(layout.dense_shard)
        ]
        for rank in range(base, base + stage_ranks):
            names[rank][tensor.name] = (tensor.shape, dtype)
            for part in local_of[rank % layout.dense_shard]:
                _add(held[rank], regions[rank], tensor, dtype, part.lo, part.size, 0, itemsize)
    return [RankTable(f"trainer {i}", tuple(held[i]), tuple(regions[i]), {}, names[i]) for i in range(layout.trainers)]


def receiver_tables(model: Model, layout: Layout, *, fp8: bool) -> list[RankTable]:
    """What each inference rank wants: its experts with gate and up in one tensor, its part of the rest."""
    per_rank = -(-model.experts // layout.inference_ep)
    made: list[RankTable] = []
    for rank in range(layout.receivers):
        held: list[Held] = []
        regions: list[int] = []
        first = rank % layout.inference_ep * per_rank
        tp_rank = rank % layout.inference_tp
        for tensor in tensors(model):
            if tensor.expert >= 0 and not first <= tensor.expert < first + per_rank:
                continue
            cut: list[Placement] = [shard(tensor.cut) if tensor.cut is not None and tensor.expert < 0 else Placement()]
            ranks, at = (layout.inference_tp, tp_rank) if tensor.expert < 0 else (1, 0)
            quantised = fp8 and tensor.matrix and _whole_blocks(tensor, ranks)
            dtype = FP8 if quantised else "bfloat16"
            _, parts = local_parts(tensor.shape, (ranks,), (at,), cut)
            for part in parts:
                _add(held, regions, tensor, dtype, part.lo, part.size, 0, ITEMSIZE[dtype])
                if quantised:
                    scale = tensor._replace(name=tensor.name + SCALE_SUFFIX, shape=_blocks(tensor.shape))
                    lo = tuple(x // FP8_BLOCK for x in part.lo)
                    _add(held, regions, scale, "float32", lo, _blocks(part.size), 0, 4)
        made.append(RankTable(f"receiver {rank}", tuple(held), tuple(regions)))
    return made


def _whole_blocks(tensor: Tensor, ranks: int) -> bool:
    return tensor.cut is None or tensor.expert >= 0 or tensor.shape[tensor.cut] % (ranks * FP8_BLOCK) == 0


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // FP8_BLOCK) for n in shape)


def _stages(model: Model, pp: int) -> list[int]:
    """First layer of each stage: equal numbers of layers with experts."""
    moe = model.layers - model.dense_layers
    return [-1] + [model.dense_layers + moe * stage // pp for stage in range(1, pp)]


_STORAGE = 512 << 20  # tensors are packed into regions of about so much, as a caching allocator's segments do


def _add(
    held: list[Held], regions: list[int], tensor: Tensor, dtype: str, lo: tuple[int, ...], size: tuple[int, ...],
    mesh: int, itemsize: int,
) -> None:  # fmt: skip
    strides = contiguous(size, itemsize)
    nbytes = -(-size[0] * strides[0] // 256) * 256
    if not regions or regions[-1] + nbytes > _STORAGE:
        regions.append(0)
    held.append(Held(tensor.name, tensor.shape, dtype, lo, size, len(regions) - 1, regions[-1], strides, mesh))
    regions[-1] += nbytes
