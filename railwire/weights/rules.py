"""Where a receiver keeps what, from a small table of rules instead of the engine's own ``load_weights``.

A rule says into which live tensor a tensor of the checkpoint goes, which part of it this tensor-parallel rank holds,
and where that part begins: behind which others of a fused tensor, at which expert. The table becomes a loader, which
:func:`railwire.weights.recording.record` runs like any other; so what is not filled, or not known, is named as there.
Imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from railwire.weights.errors import PlanError
from railwire.weights.recording import Loader


@dataclass(frozen=True)
class Rule:
    r"""One kind of tensor.

    Attributes:
        pattern: a regular expression that must match the checkpoint's whole name.
        into: the live name; ``\1`` and so on are the pattern's groups.
        cut: the dimension along which tensor-parallel ranks divide it, evenly; None: every rank holds all of it.
        place: of several tensors that one live tensor holds behind each other (fused): this one's place, from 0.
        join: the live tensor's dimension along which they lie (without that of the experts).
        units: what must not be cut, by number: heads of k and v. Where there are fewer than ranks, neighbouring ranks
            hold the same one.
        expert: number of the pattern's group that is the expert's number: the live tensor has one more dimension in
            front, for this rank's experts.
        padded: the live tensor's extent along ``cut`` is what a rank holds; the last ranks' may reach over the end.
    """

    pattern: str
    into: str
    cut: int | None = None
    place: int = 0
    join: int = 0
    units: int | None = None
    expert: int | None = None
    padded: bool = False


def llama_rules(kv_heads: int) -> tuple[Rule, ...]:
    """Hugging Face's names of Llama, Qwen and Mixtral-like models into fused tensors named as vLLM names them.

    Args:
        kv_heads: of the model.
    """
    layer, end = r"(model\.layers\.\d+)", r"\.(weight|bias|weight_scale_inv)"
    expert = rf"{layer}\.(mlp|block_sparse_moe)\.experts\.(\d+)\."
    scale = "(_scale_inv)?"
    return (
        Rule(rf"{layer}\.self_attn\.q_proj{end}", r"\1.self_attn.qkv_proj.\2", 0, 0),
        Rule(rf"{layer}\.self_attn\.k_proj{end}", r"\1.self_attn.qkv_proj.\2", 0, 1, units=kv_heads),
        Rule(rf"{layer}\.self_attn\.v_proj{end}", r"\1.self_attn.qkv_proj.\2", 0, 2, units=kv_heads),
        Rule(rf"{layer}\.self_attn\.o_proj\.(weight|weight_scale_inv)", r"\1.self_attn.o_proj.\2", 1),
        Rule(rf"{layer}\.mlp\.gate_proj{end}", r"\1.mlp.gate_up_proj.\2", 0, 0),
        Rule(rf"{layer}\.mlp\.up_proj{end}", r"\1.mlp.gate_up_proj.\2", 0, 1),
        Rule(rf"{layer}\.mlp\.down_proj\.(weight|weight_scale_inv)", r"\1.mlp.down_proj.\2", 1),
        Rule(rf"{expert}(?:gate_proj|w1)\.weight{scale}", r"\1.\2.experts.w13_weight\4", 0, 0, expert=3),
        Rule(rf"{expert}(?:up_proj|w3)\.weight{scale}", r"\1.\2.experts.w13_weight\4", 0, 1, expert=3),
        Rule(rf"{expert}(?:down_proj|w2)\.weight{scale}", r"\1.\2.experts.w2_weight\4", 1, expert=3),
        Rule(r"(model\.embed_tokens|lm_head)\.weight", r"\1.weight", 0, padded=True),
        Rule(rf"{layer}\.(\w+\.)?(\w*norm|gate)\.(weight|bias)", r"\1.\2\3.\4"),
        Rule(r"model\.norm\.weight", r"model.norm.weight"),
    )


def rule_loader(
    rules: Sequence[Rule], live: Mapping[str, torch.Tensor], *, rank: int = 0, size: int = 1,
    experts: range | None = None,
) -> Loader:  # fmt: skip
    """A ``load_weights`` for :func:`record`.

    Args:
        live: the receiver's tensors, by name.
        rank, size: of tensor parallelism.
        experts: those of this rank, one after the other; None: all.

    The loader raises PlanError, tensor by tensor: no rule for it, no live tensor, a dimension that cannot be cut.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} cannot be")
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        problems: list[str] = []
        moves: list[tuple[str, Rule, torch.Tensor, str, int | None]] = []
        extents: dict[tuple[str, int | None], dict[int, int]] = {}  # of a live tensor: place -> extent along join
        for name, weight in weights:
            try:
                rule, into, expert = _find(compiled, name, experts)
                if rule is None:
                    continue
                if into not in live:
                    raise PlanError(f"there is no live tensor {into}")
                part = _part(rule, weight, rank, size, live[into])
            except PlanError as error:
                problems.append(f"{name}: {error}")
                continue
            places = extents.setdefault((into, expert), {})
            if rule.place in places:
                problems.append(f"{name}: another tensor has place {rule.place} of {into}")
                continue
            places[rule.place] = part.shape[rule.join] if part.ndim else 0
            moves.append((name, rule, part, into, expert))
        for name, rule, part, into, expert in moves:
            target = live[into] if expert is None else live[into][expert]
            begin = sum(n for place, n in extents[into, expert].items() if place < rule.place)
            fits = part.ndim == target.ndim and all(
                n + (begin if dim == rule.join else 0) <= m
                for dim, (n, m) in enumerate(zip(part.shape, target.shape, strict=True))
            )
            if not fits:
                problems.append(f"{name}: {tuple(part.shape)} from {begin} does not fit {into}, {tuple(target.shape)}")
            elif not problems and part.numel():
                target[_box(part, rule.join, begin)].copy_(part)
        if problems:
            raise PlanError(problems)

    return load


def _find(
    compiled: Sequence[tuple[re.Pattern[str], Rule]], name: str, experts: range | None
) -> tuple[Rule | None, str, int | None]:
    """The first rule that matches, the live name, and the expert's place there; no rule: another rank's expert."""
    for pattern, rule in compiled:
        found = pattern.fullmatch(name)
        if found is None:
            continue
        into = found.expand(rule.into)
        if rule.expert is None:
            return rule, into, None
        number = int(found.group(rule.expert))
        if experts is None:
            return rule, into, number
        return (rule, into, experts.index(number)) if number in experts else (None, into, None)
    raise PlanError("no rule matches it")


def _part(rule: Rule, weight: torch.Tensor, rank: int, size: int, live: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor of the checkpoint."""
    if rule.cut is None or size == 1:
        return weight
    dim = rule.cut
    if dim >= weight.ndim:
        raise PlanError(f"has no dimension {dim} to be cut")
    extent = weight.shape[dim]
    if rule.padded:
        each = live.shape[dim + (rule.expert is not None)]
        begin = min(each * rank, extent)
        return weight.narrow(dim, begin, min(each, extent - begin))
    units = rule.units or size
    if units < size:
        if size % units:
            raise PlanError(f"{units} heads cannot be shared by {size} ranks")
        rank, size = rank * units // size, units
    if units % size or extent % units:
        raise PlanError(f"dimension {dim}, {extent} in {units} units, cannot be cut over {size} ranks")
    return weight.narrow(dim, extent // size * rank, extent // size)


def _box(part: torch.Tensor, join: int, begin: int) -> tuple[slice, ...]:
    return tuple(
        slice(begin, begin + n) if dim == join else slice(0, n) for dim, n in enumerate(part.shape)
    )  # fmt: skip
