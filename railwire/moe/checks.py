"""Bad input is refused here, before anything moves."""

from __future__ import annotations

from typing import Any

import torch

from railwire.moe.config import SCALE_BLOCK, MoeConfig

Tensor = torch.Tensor


def check_dispatch(
    config: MoeConfig, device: torch.device, x: Any, topk_ids: Any, topk_weights: Any, *, values: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(tokens, scales or None). Raises TypeError, ValueError, IndexError. ``values``: look at the ids, too, which waits
    for the device."""
    scales: Tensor | None = None
    if isinstance(x, tuple):
        if not config.fp8 or len(x) != 2:
            raise TypeError("x is one tensor, or (float8_e4m3fn tokens, float32 scales) in a group with fp8")
        x, scales = x
    _tensor("x", x, device)
    dtype = torch.float8_e4m3fn if scales is not None else getattr(torch, config.dtype)
    if x.dtype != dtype:
        raise TypeError(f"x is {dtype}, not {x.dtype}")
    if x.dim() != 2 or x.shape[1] != config.hidden:
        raise ValueError(f"x is [tokens, {config.hidden}], not {list(x.shape)}")
    tokens = x.shape[0]
    if tokens > config.max_tokens:
        raise ValueError(f"at most {config.max_tokens} tokens at a time, not {tokens}")
    if scales is not None:
        _tensor("scales", scales, device)
        blocks = -(-config.hidden // SCALE_BLOCK)
        if scales.dtype != torch.float32 or tuple(scales.shape) != (tokens, blocks):
            raise ValueError(f"scales are float32 [{tokens}, {blocks}], not {scales.dtype} {list(scales.shape)}")
    _tensor("topk_ids", topk_ids, device)
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids are int32 or int64, not {topk_ids.dtype}")
    if tuple(topk_ids.shape) != (tokens, config.top_k):
        raise ValueError(f"topk_ids are [{tokens}, {config.top_k}], not {list(topk_ids.shape)}")
    if topk_weights is not None:
        check_weights(config, device, topk_weights, tokens)
    if tokens and values:
        low, high = int(topk_ids.min()), int(topk_ids.max())
        if low < -1 or high >= config.experts:
            raise IndexError(f"topk_ids are -1 to {config.experts - 1}, not {low} to {high}")
    return x, scales


def check_weights(config: MoeConfig, device: torch.device, topk_weights: Any, tokens: int) -> None:
    """Raises TypeError, ValueError."""
    _tensor("topk_weights", topk_weights, device)
    if topk_weights.dtype != torch.float32:
        raise TypeError(f"topk_weights are float32, not {topk_weights.dtype}")
    if tuple(topk_weights.shape) != (tokens, config.top_k):
        raise ValueError(f"topk_weights are [{tokens}, {config.top_k}], not {list(topk_weights.shape)}")


def check_results(config: MoeConfig, device: torch.device, y: Any, rows: int) -> Tensor:
    """The results as ``[rows, hidden]``. Raises TypeError, ValueError."""
    _tensor("y", y, device)
    if y.dtype != getattr(torch, config.dtype):
        raise TypeError(f"y is {config.dtype}, not {y.dtype}")
    if y.dim() not in (2, 3) or y.shape[-1] != config.hidden or y.numel() != rows * config.hidden:
        raise ValueError(f"y has {rows} rows of {config.hidden}, not {list(y.shape)}")
    flat: Tensor = y.reshape(rows, config.hidden)
    return flat


def _tensor(name: str, value: Any, device: torch.device) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a torch tensor, not {type(value).__name__}")
    if value.device.type != device.type:
        raise ValueError(f"{name} is on {value.device}, the group on {device}")
