"""Reads a Llama out of a GGUF file: config, tokenizer and dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from railwire.runner.config import ModelConfig
from railwire.runner.tokenizer import build

_ARCHITECTURE = "llama"


def read(path: Path, dtype: torch.dtype) -> tuple[ModelConfig, str, dict[str, torch.Tensor]]:
    """Config, tokenizer (JSON of the ``tokenizers`` library) and the tensors of ``config.weight_shapes()``.

    Raises:
        ValueError: not a Llama with tied embeddings and a byte-level BPE, or a tensor is missing.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no GGUF file: {error}") from error
    fields = reader.fields

    def value(name: str, default: Any = None) -> Any:
        if name in fields:
            return fields[name].contents()
        if default is None:
            raise ValueError(f"{path} has no {name}")
        return default

    if (architecture := value("general.architecture")) != _ARCHITECTURE:
        raise ValueError(f"{path} holds a model of architecture {architecture!r}; only {_ARCHITECTURE!r} is known here")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in stored or "rope_freqs.weight" in stored:
        raise ValueError(f"{path}: untied embeddings and scaled rotary frequencies are not known here")
    hidden, q_heads = int(value("llama.embedding_length")), int(value("llama.attention.head_count"))
    stop = {int(value("tokenizer.ggml.eos_token_id"))}
    # Base text ends with <|endoftext|>, a turn of a conversation with the eos token.
    tokens: list[str] = value("tokenizer.ggml.tokens")
    stop |= {tokens.index(token) for token in ("<|endoftext|>", "<|im_end|>") if token in tokens}
    config = ModelConfig(
        name=str(value("general.basename", path.stem)),
        vocab=len(tokens),
        hidden=hidden,
        intermediate=int(value("llama.feed_forward_length")),
        layers=int(value("llama.block_count")),
        q_heads=q_heads,
        kv_heads=int(value("llama.attention.head_count_kv", q_heads)),
        head_dim=int(value("llama.rope.dimension_count", hidden // q_heads)),
        rope_base=float(value("llama.rope.freq_base", 10000.0)),
        norm_eps=float(value("llama.attention.layer_norm_rms_epsilon")),
        context=int(value("llama.context_length")),
        stop_tokens=tuple(sorted(stop)),
    )
    model, pre = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "default")
    tokenizer = build(model, pre, tokens, value("tokenizer.ggml.merges"), value("tokenizer.ggml.token_type"))

    used = set[str]()

    def tensor(name: str) -> torch.Tensor:
        if name not in stored:
            raise ValueError(f"{path} has no tensor {name}")
        used.add(name)
        found = stored[name]
        array = gguf.dequantize(found.data, found.tensor_type).astype(np.float32, copy=True)
        return torch.from_numpy(array)

    tensors = {"embed": tensor("token_embd.weight"), "norm": tensor("output_norm.weight")}
    for layer in range(config.layers):
        block = f"blk.{layer}"
        q = half_split(tensor(f"{block}.attn_q.weight"), config.q_heads)
        k = half_split(tensor(f"{block}.attn_k.weight"), config.kv_heads)
        tensors |= {
            f"{layer}.attn_norm": tensor(f"{block}.attn_norm.weight"),
            f"{layer}.qkv": torch.cat((q, k, tensor(f"{block}.attn_v.weight"))).to(dtype),
            f"{layer}.o": tensor(f"{block}.attn_output.weight").to(dtype),
            f"{layer}.ffn_norm": tensor(f"{block}.ffn_norm.weight"),
            f"{layer}.gate_up": torch.cat((tensor(f"{block}.ffn_gate.weight"), tensor(f"{block}.ffn_up.weight"))).to(
                dtype
            ),
            f"{layer}.down": tensor(f"{block}.ffn_down.weight").to(dtype),
        }
    if len(used) != len(stored):
        # A bias or a second norm that is left out would give wrong answers, not an error.
        raise ValueError(f"{path} has tensors that are not known here: {', '.join(sorted(stored.keys() - used)[:5])}")
    return config, tokenizer, tensors


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of q and k rows.

    llama.cpp rotates the pairs (0, 1), (2, 3), ... of a head, and its converter interleaves the rows to suit
    (convert_hf_to_gguf.py, LlamaModel.permute). Everyone else rotates (i, i + head_dim / 2); in that order K in the
    cache is what it is in other engines.
    """
    return rows.view(heads, rows.shape[0] // heads // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
