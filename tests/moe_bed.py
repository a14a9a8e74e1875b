"""Ranks of an expert-parallel group as threads of the test process, each with an engine of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from railwire import TransferEngine
from railwire.moe import ExpertGroup, MoeConfig, NodeGroup, RankLostError, reference
from railwire.moe.kernels.quantise import dequantise

torch.set_num_threads(1)


class ThreadExchange:
    """An all-gather among threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=30)
        self._slots: list[bytes] = [b""] * ranks

    def of(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def exchange(data: bytes) -> list[bytes]:
            self._slots[rank] = data
            self._barrier.wait()
            result = list(self._slots)
            self._barrier.wait()
            return result

        return exchange

    def abort(self) -> None:
        self._barrier.abort()


class Ranks:
    """All ranks of a group; ``each(f)`` runs ``f(rank, group)`` in all of them at once."""

    def __init__(self, config: MoeConfig, nics: Callable[[int], list[str]], liveness: float = 5.0, **options: Any):
        self.config = config
        self.pool = ThreadPoolExecutor(config.ranks)
        self.engines = [
            TransferEngine(nics=nics(rank), name=f"rank{rank}", liveness=liveness) for rank in range(config.ranks)
        ]
        self.groups: list[ExpertGroup] = []
        self.groups = self.make(config, **options)

    def make(self, config: MoeConfig, **options: Any) -> list[ExpertGroup]:
        """One more group over the same engines."""
        exchange = ThreadExchange(config.ranks)

        def one(rank: int) -> ExpertGroup:
            return ExpertGroup(self.engines[rank], config, rank, exchange.of(rank), **options)

        return list(self.pool.map(one, range(config.ranks)))

    def over_nodes(self, config: MoeConfig, node_ranks: int) -> list[NodeGroup]:
        """A group over nodes on the same engines."""
        exchange = ThreadExchange(config.ranks)

        def one(rank: int) -> NodeGroup:
            return NodeGroup(self.engines[rank], config, rank, node_ranks, exchange.of(rank))

        return list(self.pool.map(one, range(config.ranks)))

    def each(self, function: Callable[[int, ExpertGroup], Any], ranks: Any = None) -> list[Any]:
        """Raises what went wrong first, rather than what followed from it at the others."""
        chosen = range(self.config.ranks) if ranks is None else ranks
        futures = [self.pool.submit(function, rank, self.groups[rank]) for rank in chosen]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, RankLostError)), errors[0])
        return [future.result() for future in futures]

    def close(self) -> None:
        list(self.pool.map(lambda group: group.close(), self.groups))
        list(self.pool.map(lambda engine: engine.close(), self.engines))
        self.pool.shutdown()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def expert(number: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert does to a token: exact in every dtype used here (a power of two) up to one rounding."""
    return x * (1.0 + number % 7) + 0.25 * (number % 3)


class Load:
    """The tokens, routes and weights of all ranks in one generation."""

    def __init__(self, config: MoeConfig, rng: np.random.Generator, kind: str | None = None) -> None:
        self.config = config
        kind = kind or str(rng.choice(["random", "hot", "few", "empty", "holes", "doubles", "one", "none"]))
        self.kind = kind
        self.x, self.ids, self.weights = [], [], []
        hot = int(rng.integers(config.experts))
        for _ in range(config.ranks):
            tokens = int(rng.integers(0, config.max_tokens + 1))
            if kind == "none" or (kind == "empty" and rng.random() < 0.5):
                tokens = 0
            if kind == "full":
                tokens = config.max_tokens
            if kind == "few":
                tokens = min(tokens, int(rng.integers(0, 2)))
            shape = (tokens, config.top_k)
            ids = self._distinct(rng, tokens)
            if kind == "hot":
                ids[rng.random(shape) < 0.8] = hot
            if kind == "one":
                ids[:] = hot
            if kind == "holes":
                ids[rng.random(shape) < 0.5] = -1
            if kind == "doubles":
                ids = rng.integers(-1, config.experts, shape)
            if config.layout == "batched" or config.layout == "standard":
                for j in range(1, config.top_k):  # no expert twice in a row
                    ids[(ids[:, :j] == ids[:, j : j + 1]).any(axis=1), j] = -1
            numbers = torch.from_numpy(rng.integers(0, 1 << 20, tokens))
            self.x.append(reference.token_payload(config, numbers))
            self.ids.append(torch.from_numpy(ids.astype(rng.choice([np.int32, np.int64]))))
            self.weights.append(torch.from_numpy(rng.random(shape, dtype=np.float32)))

    def _distinct(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        c = self.config
        order = rng.random((tokens, c.experts)).argsort(axis=1)[:, : c.top_k]
        ids = np.full((tokens, c.top_k), -1, np.int64)
        ids[:, : order.shape[1]] = order
        return ids


def run_experts(config: MoeConfig, rank: int, got: Any) -> torch.Tensor:
    """The results of a rank's experts; ``standard``: weighted and summed over the rank's experts, in top-k order."""
    dtype = getattr(torch, config.dtype)
    flat = got.x.reshape(-1, config.hidden)
    scales = None if got.scales is None else got.scales.reshape(flat.shape[0], got.scales.shape[-1])
    x = flat if scales is None else dequantise(flat, scales).to(dtype)
    y = torch.zeros(x.shape, dtype=dtype)
    first = rank * config.local_experts
    if config.layout == "standard":
        total = torch.zeros(x.shape, dtype=torch.float32)
        for j in range(config.top_k):
            for row in torch.nonzero(got.topk_ids[:, j] >= 0).flatten().tolist():
                value = expert(first + int(got.topk_ids[row, j]), x[row]).to(torch.float32)
                total[row] += value * got.topk_weights[row, j]
        return total.to(dtype)
    for number, (base, rows) in enumerate(zip(got.rows.bases.tolist(), got.expert_rows.tolist(), strict=True)):
        y[base : base + rows] = expert(first + number, x[base : base + rows])
    return y.reshape(got.x.shape)


def expected_output(config: MoeConfig, load: Load, rank: int, gone: frozenset[int] = frozenset()) -> torch.Tensor:
    """What combine must return to a rank when the ranks in ``gone`` give nothing back."""
    from railwire.moe.kernels.quantise import quantise

    dtype = getattr(torch, config.dtype)
    x = load.x[rank]
    if config.fp8:
        x = dequantise(*quantise(x)).to(dtype)
    ids, weights = load.ids[rank], load.weights[rank]
    total = torch.zeros((x.shape[0], config.hidden), dtype=torch.float32)
    if config.layout != "standard":
        for j in range(config.top_k):
            for token in range(x.shape[0]):
                number = int(ids[token, j])
                if number >= 0 and number // config.local_experts not in gone:
                    total[token] += expert(number, x[token]).to(torch.float32) * weights[token, j]
        return total.to(dtype)
    for token in range(x.shape[0]):
        seen: list[int] = []
        for j in range(config.top_k):
            owner = int(ids[token, j]) // config.local_experts if ids[token, j] >= 0 else -1
            if owner >= 0 and owner not in seen:
                seen.append(owner)
        for owner in seen:
            if owner in gone:
                continue
            part = torch.zeros(config.hidden, dtype=torch.float32)
            for j in range(config.top_k):
                number = int(ids[token, j])
                if number >= 0 and number // config.local_experts == owner:
                    part += expert(number, x[token]).to(torch.float32) * weights[token, j]
            total[token] += part.to(dtype).to(torch.float32)
    return total.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    )


def check_round(config: MoeConfig, load: Load, rank: int, group: ExpertGroup) -> None:
    """One dispatch and combine of one rank, compared with the reference."""
    got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
    want = reference.dispatch(config, rank, load.x, load.ids, load.weights)
    assert got.expert_rows.tolist() == want.expert_rows, load.kind
    flat = got.x.reshape(-1, config.hidden)
    assert flat.shape == want.x.shape
    assert same(flat[want.valid], want.x[want.valid]), load.kind
    if config.fp8 and want.scales is not None:
        assert got.scales is not None
        assert same(got.scales.reshape(flat.shape[0], got.scales.shape[-1])[want.valid], want.scales[want.valid])
    if config.layout == "standard":
        assert same(got.topk_ids, want.topk_ids)
        assert same(got.topk_weights, want.topk_weights)
    out = group.combine(run_experts(config, rank, got))
    assert same(out, expected_output(config, load, rank)), load.kind
