"""Writes a model's weights as Hugging Face's libraries and vLLM read them: config.json, model.safetensors, tokenizer.

python -m railwire.runner.export smollm2 FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from railwire.runner import gguf_file, weights
from railwire.runner.config import ModelConfig

_ENDS = ("<|im_end|>", "<|endoftext|>")


def export(model: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes ``model`` ("smollm2" or the path of a GGUF file) to ``folder``.

    Raises:
        FileNotFoundError, ValueError: as ``weights.load``.
        ModuleNotFoundError: safetensors is not installed.
    """
    config, tokenizer, tensors = gguf_file.read(weights.find(model), dtype)
    write(config, tokenizer, tensors, folder, dtype)


def write(
    config: ModelConfig, tokenizer: str, tensors: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """As :func:`export`, of weights by the names of ``config.weight_shapes()``; ``tokenizer`` is JSON."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    out: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": tensors["embed"],
        "model.norm.weight": tensors["norm"],
    }
    for layer in range(config.layers):
        name, base = f"{layer}.", f"model.layers.{layer}."
        fused = tensors[name + "qkv"]
        for part, matrix in (("q", fused[:q]), ("k", fused[q : q + kv]), ("v", fused[q + kv :])):
            out[f"{base}self_attn.{part}_proj.weight"] = matrix
        out[base + "mlp.gate_proj.weight"] = tensors[name + "gate_up"][: config.intermediate]
        out[base + "mlp.up_proj.weight"] = tensors[name + "gate_up"][config.intermediate :]
        out[base + "mlp.down_proj.weight"] = tensors[name + "down"]
        out[base + "self_attn.o_proj.weight"] = tensors[name + "o"]
        out[base + "input_layernorm.weight"] = tensors[name + "attn_norm"]
        out[base + "post_attention_layernorm.weight"] = tensors[name + "ffn_norm"]
    save_file(
        {key: value.to(dtype).contiguous() for key, value in out.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    stop = list(config.stop_tokens)
    described: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": stop[0] if len(stop) == 1 else stop,
    }
    _write(folder / "config.json", described)
    _write(folder / "generation_config.json", {"eos_token_id": described["eos_token_id"]})
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    vocab = json.loads(tokenizer)["model"]["vocab"]
    end = next((token for token in _ENDS if token in vocab), None)
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", help="smollm2 or the path of a GGUF file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    export(arguments.model, arguments.folder, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
