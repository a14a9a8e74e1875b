"""A dense float32 Llama straight from a GGUF's tensors: llama.cpp's own row order and interleaved rotation, numpy only.

It shares nothing with railwire.runner but the file, so it also checks the undone permutation of q and k rows.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def dense_logits(path: Path, tokens: list[int]) -> Array:
    """Logits after every token, float32 [len(tokens), vocab]."""
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> Array:
        return np.asarray(gguf.dequantize(stored[name].data, stored[name].tensor_type), dtype=np.float32)

    def field(name: str) -> float:
        return float(reader.fields[f"llama.{name}"].contents())

    q_heads, kv_heads = int(field("attention.head_count")), int(field("attention.head_count_kv"))
    dim, n = int(field("rope.dimension_count")), len(tokens)
    angles = np.outer(np.arange(n), field("rope.freq_base") ** (-np.arange(0, dim, 2) / dim))
    turn = np.exp(1j * angles)[:, None]

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + field("attention.layer_norm_rms_epsilon")) * weight(name)

    def rotate(x: Array) -> Array:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape).astype(np.float32)

    embed = weight("token_embd.weight")
    x = embed[tokens]
    hidden = np.triu(np.full((n, n), -np.inf, dtype=np.float32), 1)
    for layer in range(int(field("block_count"))):
        block = f"blk.{layer}."
        normed = norm(x, f"{block}attn_norm.weight")
        q, k, v = (
            (normed @ weight(f"{block}attn_{part}.weight").T).reshape(n, heads, dim)
            for part, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q), rotate(k)
        outputs = []
        for head in range(q_heads):
            shared = head * kv_heads // q_heads
            scores = np.exp(q[:, head] @ k[:, shared].T / np.sqrt(dim) + hidden)
            outputs.append(scores / scores.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(outputs, axis=-1) @ weight(f"{block}attn_output.weight").T
        normed = norm(x, f"{block}ffn_norm.weight")
        gate, up = (normed @ weight(f"{block}ffn_{part}.weight").T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{block}ffn_down.weight").T
    logits: Array = norm(x, "output_norm.weight") @ embed.T
    return logits
