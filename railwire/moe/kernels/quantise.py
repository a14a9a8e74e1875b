"""float8_e4m3fn with one float32 scale for 128 channels, as DeepEP's dispatch does it: scale = max|x| / 448."""

from __future__ import annotations

import torch

from railwire.moe.config import SCALE_BLOCK

FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4  # of a block of zeros


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn ``[tokens, hidden]``, float32 scales ``[tokens, ceil(hidden / 128)]``); value = fp8 * scale."""
    tokens, hidden = x.shape
    blocks = -(-hidden // SCALE_BLOCK)
    wide = torch.zeros((tokens, blocks * SCALE_BLOCK), dtype=torch.float32, device=x.device)
    wide[:, :hidden] = x.to(torch.float32)
    wide = wide.view(tokens, blocks, SCALE_BLOCK)
    amax = wide.abs().amax(dim=2).clamp_min(FP8_MIN_AMAX)
    factor = torch.full_like(amax, FP8_MAX) / amax  # of two tensors: torch makes 448 / amax a product with 1 / amax
    values = (wide * factor.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX)
    values = values.view(tokens, blocks * SCALE_BLOCK)[:, :hidden].contiguous()
    return values.to(torch.float8_e4m3fn), amax * (1.0 / FP8_MAX)


def dequantise(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values."""
    wide = scales.repeat_interleave(SCALE_BLOCK, dim=1)[:, : x.shape[1]]
    return x.to(torch.float32) * wide
