"""Dispatch and combine of all ranks in one process, written as plainly as possible: the oracle of tests, demo and GPU
checks. The payload of a test token is a function of its global number, so any rank can check any token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from railwire.moe.config import MoeConfig
from railwire.moe.geometry import round_up
from railwire.moe.kernels.quantise import quantise

Tensor = torch.Tensor


def token_payload(config: MoeConfig, numbers: Tensor) -> Tensor:
    """``[tokens, hidden]`` of tokens with these global numbers."""
    channels = torch.arange(config.hidden, dtype=torch.float64)
    values = torch.sin(numbers.to(torch.float64).unsqueeze(1) * 0.37 + channels * 0.011) * 3
    return values.to(getattr(torch, config.dtype))


@dataclass
class Expected:
    """What one rank gets from a dispatch."""

    x: Tensor
    scales: Tensor | None
    valid: list[int]
    expert_rows: list[int]
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None


def dispatch(
    config: MoeConfig, rank: int, x: list[Tensor], topk_ids: list[Tensor], topk_weights: list[Tensor] | None = None
) -> Expected:
    """What ``rank`` must get when each rank r dispatches ``x[r]``. ``valid``: which output rows mean something."""
    tokens: list[tuple[Tensor, Tensor | None]] = [quantise(t) if config.fp8 else (t, None) for t in x]
    if config.layout == "standard":
        return _standard(config, rank, tokens, topk_ids, topk_weights)
    rows: list[tuple[int, int, int]] = []
    expert_rows = []
    at = 0
    local = config.local_experts
    for number in range(local):
        expert = rank * local + number
        if config.layout == "batched":
            at = number * config.ranks * config.max_tokens
        begin = at
        for source in range(config.ranks):
            for token, ids in enumerate(topk_ids[source].tolist()):
                for j in range(config.top_k):
                    if ids[j] == expert:
                        rows.append((at, source, token))
                        at += 1
        expert_rows.append(at - begin)
        if config.layout == "grouped":
            at = round_up(at, config.expert_alignment)
    total = local * config.ranks * config.max_tokens if config.layout == "batched" else at
    out = torch.zeros((total, config.hidden), dtype=tokens[0][0].dtype)
    scales = None
    if config.fp8:
        scales = torch.zeros((total, -(-config.hidden // 128)))
    for at, source, token in rows:
        out.view(torch.uint8)[at] = tokens[source][0].view(torch.uint8)[token]
        if scales is not None:
            scale = tokens[source][1]
            assert scale is not None
            scales[at] = scale[token]
    return Expected(out, scales, [at for at, _, _ in rows], expert_rows)


def _standard(
    config: MoeConfig, rank: int, tokens: list[tuple[Tensor, Tensor | None]], topk_ids: list[Tensor],
    topk_weights: list[Tensor] | None,
) -> Expected:  # fmt: skip
    here = config.experts_of(rank)
    xs, scales, ids, weights = [], [], [], []
    for source, (x, scale) in enumerate(tokens):
        for token, row in enumerate(topk_ids[source].tolist()):
            if not any(expert in here for expert in row):
                continue
            xs.append(x[token])
            if scale is not None:
                scales.append(scale[token])
            ids.append([expert - here.start if expert in here else -1 for expert in row])
            weights.append(topk_weights[source][token].tolist() if topk_weights else [0.0] * config.top_k)
    n = len(xs)
    x = torch.stack(xs) if n else torch.zeros((0, config.hidden), dtype=tokens[0][0].dtype)
    return Expected(
        x,
        torch.stack(scales) if scales else None,
        list(range(n)),
        [n],
        torch.tensor(ids, dtype=torch.int32).reshape(n, config.top_k),
        torch.tensor(weights, dtype=torch.float32).reshape(n, config.top_k),
    )


def combine(
    config: MoeConfig,
    expert_of: Callable[[int, Tensor], Tensor],
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
) -> Tensor:
    """``out[t] = sum over j of w * expert(x[t])`` in float32, in the order of j; ``expert_of(expert, x)`` is the
    function of an expert, applied to one token."""
    out = torch.zeros((x.shape[0], config.hidden), dtype=torch.float32)
    for token, row in enumerate(topk_ids.tolist()):
        for j, expert in enumerate(row):
            if expert < 0:
                continue
            value = expert_of(expert, x[token]).to(torch.float32)
            if topk_weights is not None:
                value = value * topk_weights[token, j]
            out[token] += value
    return out.to(getattr(torch, config.dtype))
