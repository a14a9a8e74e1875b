"""What all ranks of an expert-parallel group must agree on, checked once and compared at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from railwire.errors import ConfigurationError

Layout = Literal["grouped", "batched", "standard"]
Dtype = Literal["bfloat16", "float16", "float32"]
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALE_BLOCK = 128  # channels that share one fp8 scale
MAX_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Shape of an expert-parallel group.

    Args:
        ranks: processes; the experts are dealt out in rank order, ``ceil(experts / ranks)`` to each but the last ones.
        experts: of the whole model.
        hidden: channels of a token.
        max_tokens: most tokens that a rank may dispatch at once.
        top_k: experts per token.
        dtype: of tokens, expert outputs and combined tokens.
        fp8: tokens travel to the experts as float8_e4m3fn, with one float32 scale for 128 channels.
        layout: of what dispatch returns. ``grouped``: one row per (token, expert), expert after expert. ``batched``:
            ``[local experts, ranks * max_tokens, hidden]``. ``standard``: one row per (token, rank), with its top-k.
        expert_alignment: ``grouped``: each expert's rows begin at a multiple of this many.
        slot_rows: tokens that each rank may send to each other one unasked; 0: from the mean and its spread, then
            tuned from what arrives.
        overflow_rows: room, in tokens, for what does not fit the slots; 0: ``max_tokens * top_k``.
        context: number of this group among those that share engines: micro-batches in flight need one each.

    Raises:
        ConfigurationError: a value that cannot be.
    """

    ranks: int
    experts: int
    hidden: int
    max_tokens: int
    top_k: int
    dtype: Dtype = "bfloat16"
    fp8: bool = False
    layout: Layout = "grouped"
    expert_alignment: int = 1
    slot_rows: int = 0
    overflow_rows: int = 0
    context: int = 0

    def __post_init__(self) -> None:
        for name in ("ranks", "experts", "hidden", "max_tokens", "top_k", "expert_alignment"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} is a whole number of at least 1, not {value!r}")
        for name in ("slot_rows", "overflow_rows", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{name} is a whole number of at least 0, not {value!r}")
        if self.ranks > MAX_RANKS:
            raise ConfigurationError(f"a group has at most {MAX_RANKS} ranks, not {self.ranks}")
        if self.dtype not in ITEM_BYTES:
            raise ConfigurationError(f"dtype is one of {', '.join(ITEM_BYTES)}, not {self.dtype!r}")
        if self.layout not in ("grouped", "batched", "standard"):
            raise ConfigurationError(f"layout is grouped, batched or standard, not {self.layout!r}")
        if self.context > 15:
            raise ConfigurationError(f"context is 0 to 15, not {self.context}")
        if self.max_tokens * self.top_k >= 1 << 31:
            raise ConfigurationError(f"max_tokens * top_k must stay below 2**31, not {self.max_tokens * self.top_k}")

    @property
    def local_experts(self) -> int:
        """Experts per rank, the last ranks' missing ones included."""
        return -(-self.experts // self.ranks)

    @property
    def max_rows(self) -> int:
        """Most rows that a rank sends in one dispatch."""
        return self.max_tokens * (min(self.top_k, self.ranks) if self.layout == "standard" else self.top_k)

    def experts_of(self, rank: int) -> range:
        """Experts that live on a rank."""
        first = min(rank * self.local_experts, self.experts)
        return range(first, min(first + self.local_experts, self.experts))


def check_equal(configs: Mapping[int, MoeConfig]) -> None:
    """Raises ConfigurationError, with both values, if two ranks disagree."""
    first = min(configs)
    for rank, config in configs.items():
        for field in fields(MoeConfig):
            ours, theirs = getattr(configs[first], field.name), getattr(config, field.name)
            if ours != theirs:
                raise ConfigurationError(
                    f"ranks disagree: {field.name} is {ours!r} on rank {first} and {theirs!r} on rank {rank}"
                )


def to_dict(config: MoeConfig) -> dict[str, object]:
    """Plain values, for the wire."""
    return asdict(config)
