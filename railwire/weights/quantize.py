"""bf16 to fp8: e4m3 values with one float32 scale for each 128x128 block, as DeepSeek-V3's checkpoints have them.

``scale = amax / 448`` of the block (1 where the block is zero) and ``q = x / scale`` in float32, rounded to the nearest
even e4m3. ``weight = q * scale``: the scale is stored as it is, under the name ``..._scale_inv`` that those checkpoints
give it. Imports torch.
"""

from __future__ import annotations

import torch

from railwire.weights.tables import FP8_BLOCK

E4M3_MAX = 448.0


def quantize_into(weight: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantises ``weight`` [..., n, k] into ``out`` (float8_e4m3fn, the same shape) and ``scales`` (float32, one
    value a block). Temporary memory is that of one row of blocks in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    matrix = weight if weight.ndim >= 2 else weight.unsqueeze(0)
    target = out if out.ndim >= 2 else out.unsqueeze(0)
    grid = scales if scales.ndim >= 2 else scales.unsqueeze(0)
    *batch, rows, columns = matrix.shape
    blocks = (*batch, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if target.shape != matrix.shape or tuple(grid.shape) != blocks:
        raise ValueError(f"{tuple(weight.shape)} cannot be quantised into {tuple(out.shape)}, {tuple(scales.shape)}")
    if out.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32:
        raise ValueError(f"the output is float8_e4m3fn with float32 scales, not {out.dtype} with {scales.dtype}")
    for index in _indices(batch):
        for block in range(blocks[-2]):
            strip = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
            _strip(matrix[index][strip], target[index][strip], grid[index][block])


def _strip(rows: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    values = rows.float()
    columns = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, -columns % FP8_BLOCK)) if columns % FP8_BLOCK else values
    blocks = padded.view(values.shape[0], -1, FP8_BLOCK)
    peak = blocks.abs().amax(dim=(0, 2))
    scale = torch.where(peak > 0, peak / E4M3_MAX, torch.ones_like(peak))
    scales.copy_(scale)
    quantised = (blocks / scale.view(1, -1, 1)).view(values.shape[0], -1)[:, :columns]
    out.copy_(quantised.to(torch.float8_e4m3fn))


def _indices(batch: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for extent in batch:
        found = [(*index, i) for index in found for i in range(extent)]
    return found
