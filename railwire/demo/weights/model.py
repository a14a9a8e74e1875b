"""SmolLM2 twice: as a module that is trained (the checkpoint's names, ready for FSDP2 and tensor parallelism), and as
an inference rank of a tensor-parallel pair (fused qkv and gate_up, heads cut unevenly), which generates greedily.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from railwire.runner.config import ModelConfig


def rotation(config: ModelConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), 1.0 / config.rope_base**half)
    return angles.cos().float(), angles.sin().float()


def turn(x: torch.Tensor, by: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of [..., tokens, head_dim], half-split form."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * by[0] - second * by[1], second * by[0] + first * by[1]), dim=-1)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, q, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, by: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        c, (batch, tokens, _) = self.config, x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, tokens, -1, c.head_dim).transpose(1, 2)

        q, k, v = turn(heads(self.q_proj(x)), by), turn(heads(self.k_proj(x)), by), heads(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, by: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), by)
        result: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Trained(nn.Module):
    """The model that is trained. ``model.named_parameters()`` gives the checkpoint's names but for the first word."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting each token from those before it."""
        by = rotation(self.config, tokens.shape[1] - 1)
        x = self.embed_tokens(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, by)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def checkpoint(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The runner's fused tensors under the names of :class:`Trained`, float32."""
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    found = {"embed_tokens.weight": tensors["embed"], "norm.weight": tensors["norm"]}
    for layer in range(config.layers):
        base, fused, gate_up = f"layers.{layer}.", tensors[f"{layer}.qkv"], tensors[f"{layer}.gate_up"]
        found |= {
            base + "self_attn.q_proj.weight": fused[:q],
            base + "self_attn.k_proj.weight": fused[q : q + kv],
            base + "self_attn.v_proj.weight": fused[q + kv :],
            base + "self_attn.o_proj.weight": tensors[f"{layer}.o"],
            base + "mlp.gate_proj.weight": gate_up[: config.intermediate],
            base + "mlp.up_proj.weight": gate_up[config.intermediate :],
            base + "mlp.down_proj.weight": tensors[f"{layer}.down"],
            base + "input_layernorm.weight": tensors[f"{layer}.attn_norm"],
            base + "post_attention_layernorm.weight": tensors[f"{layer}.ffn_norm"],
        }
    return {name: tensor.float() for name, tensor in found.items()}


class Served:
    """One of ``size`` tensor-parallel inference ranks, bf16 weights, float32 arithmetic between them.

    Rank r has KV heads [first, end) with their query heads, a part of the MLP, and the whole embedding.
    """

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        self.config = config
        each = -(-config.kv_heads // size)
        self.first = min(config.kv_heads, rank * each)
        self.end = min(config.kv_heads, self.first + each)
        self.group = config.q_heads // config.kv_heads
        self.width = config.intermediate // size
        self.rank = rank
        held, hidden = (self.end - self.first) * config.head_dim, config.hidden
        self.live: dict[str, torch.Tensor] = {"embed": torch.zeros(config.vocab, hidden, dtype=torch.bfloat16)}
        self.live["norm"] = torch.zeros(hidden, dtype=torch.bfloat16)
        for layer in range(config.layers):
            self.live |= {
                f"{layer}.qkv": torch.zeros((self.group + 2) * held, hidden, dtype=torch.bfloat16),
                f"{layer}.o": torch.zeros(hidden, self.group * held, dtype=torch.bfloat16),
                f"{layer}.gate_up": torch.zeros(2 * self.width, hidden, dtype=torch.bfloat16),
                f"{layer}.down": torch.zeros(hidden, self.width, dtype=torch.bfloat16),
                f"{layer}.attn_norm": torch.zeros(hidden, dtype=torch.bfloat16),
                f"{layer}.ffn_norm": torch.zeros(hidden, dtype=torch.bfloat16),
            }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """An ordinary loader: takes the checkpoint's tensors, keeps this rank's share."""
        dim, live = self.config.head_dim, self.live
        heads = (self.end - self.first) * dim
        for name, weight in weights:
            if not name.startswith("layers."):
                live["embed" if name.startswith("embed") else "norm"].copy_(weight)
                continue
            _, layer, *rest = name.split(".")
            which = rest[-2]
            if which in ("q_proj", "k_proj", "v_proj"):
                factor = self.group if which == "q_proj" else 1
                at = {"q_proj": 0, "k_proj": self.group * heads, "v_proj": (self.group + 1) * heads}[which]
                share = weight[self.first * dim * factor : self.end * dim * factor]
                live[f"{layer}.qkv"].narrow(0, at, factor * heads).copy_(share)
            elif which == "o_proj":
                begin = self.first * dim * self.group
                live[f"{layer}.o"].copy_(weight[:, begin : begin + self.group * heads])
            elif which in ("gate_proj", "up_proj"):
                at = 0 if which == "gate_proj" else self.width
                share = weight[self.rank * self.width : (self.rank + 1) * self.width]
                live[f"{layer}.gate_up"].narrow(0, at, self.width).copy_(share)
            elif which == "down_proj":
                live[f"{layer}.down"].copy_(weight[:, self.rank * self.width : (self.rank + 1) * self.width])
            else:
                live[f"{layer}.{'attn' if which.startswith('input') else 'ffn'}_norm"].copy_(weight)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy tokens. All ranks call it alike."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self._logits(torch.tensor(tokens)).argmax()))
        return tokens[len(prompt) :]

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        config, live = self.config, {name: tensor.float() for name, tensor in self.live.items() if "norm" in name}
        by = rotation(config, len(tokens))
        embed = self.live["embed"]
        x = F.embedding(tokens, embed).float()
        heads = self.end - self.first
        for layer in range(config.layers):
            h = norm(x, live[f"{layer}.attn_norm"], config.norm_eps)
            fused = (
                F.linear(h, self.live[f"{layer}.qkv"].float()).view(len(tokens), -1, config.head_dim).transpose(0, 1)
            )
            q, k, v = torch.split(fused, [self.group * heads, heads, heads])
            out = F.scaled_dot_product_attention(
                turn(q, by)[None], turn(k, by)[None], v[None], is_causal=True, enable_gqa=True
            )[0]
            out = out.transpose(0, 1).reshape(len(tokens), -1)
            x = x + self._sum(F.linear(out, self.live[f"{layer}.o"].float()))
            h = norm(x, live[f"{layer}.ffn_norm"], config.norm_eps)
            gate, up = F.linear(h, self.live[f"{layer}.gate_up"].float()).chunk(2, dim=-1)
            x = x + self._sum(F.linear(F.silu(gate) * up, self.live[f"{layer}.down"].float()))
        return F.linear(norm(x[-1], live["norm"], config.norm_eps), embed.float())

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            dist.all_reduce(x)
        return x
