"""The shape of a Llama-like model, and its fingerprint."""

from __future__ import annotations

import hashlib

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a model's computation besides its weights.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the MLP.
        q_heads, kv_heads, head_dim: attention; ``q_heads`` is a multiple of ``kv_heads`` (GQA).
        context: the most tokens a sequence may have.
        stop_tokens: ids that end a generation.
    """

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    norm_eps: float
    context: int
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "intermediate", "layers", "q_heads", "kv_heads", "head_dim", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"{self.q_heads} query heads cannot share {self.kv_heads} KV heads: no multiple")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embeddings need an even one")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight of ``llama.Llama``: q, k and v rows fused, gate and up rows fused."""
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab, self.hidden), "norm": (self.hidden,)}
        for layer in range(self.layers):
            shapes |= {
                f"{layer}.attn_norm": (self.hidden,),
                f"{layer}.qkv": (q + 2 * kv, self.hidden),
                f"{layer}.o": (self.hidden, q),
                f"{layer}.ffn_norm": (self.hidden,),
                f"{layer}.gate_up": (2 * self.intermediate, self.hidden),
                f"{layer}.down": (self.hidden, self.intermediate),
            }
        return shapes

    def fingerprint(self, weights_identity: str) -> str:
        """Equal if and only if the KV of one instance is meaningful to the other: same config, same weights.

        The name is for people and does not count. The dtype of the cache is not in it: the layouts compare that.
        """
        data = msgspec.json.encode(msgspec.structs.replace(self, name=""), order="deterministic")
        digest = hashlib.sha256(data + b"\0" + weights_identity.encode()).hexdigest()
        return f"{self.name}:{digest[:32]}"
