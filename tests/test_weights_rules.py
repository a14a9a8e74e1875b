"""Rules instead of a loader: the boxes are those of a loader written by hand, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch

from railwire.weights.errors import PlanError, RecordingError
from railwire.weights.recording import record
from railwire.weights.rules import Rule, llama_rules, rule_loader

H, HEADS, KV, D, WIDE, EXPERTS, VOCAB = 32, 8, 2, 4, 48, 4, 70
A = "model.layers.0."


def checkpoint() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        A + "self_attn.q_proj.weight": (HEADS * D, H),
        A + "self_attn.k_proj.weight": (KV * D, H),
        A + "self_attn.v_proj.weight": (KV * D, H),
        A + "self_attn.k_proj.bias": (KV * D,),
        A + "self_attn.q_proj.bias": (HEADS * D,),
        A + "self_attn.v_proj.bias": (KV * D,),
        A + "self_attn.o_proj.weight": (H, HEADS * D),
        A + "input_layernorm.weight": (H,),
        A + "self_attn.q_norm.weight": (D,),
        A + "mlp.gate.weight": (EXPERTS, H),
        "model.embed_tokens.weight": (VOCAB, H),
        "model.norm.weight": (H,),
    }
    for expert in range(EXPERTS):
        for name, shape in (("gate_proj", (WIDE, H)), ("up_proj", (WIDE, H)), ("down_proj", (H, WIDE))):
            shapes[f"{A}mlp.experts.{expert}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def live(size: int, experts: range) -> dict[str, torch.Tensor]:
    kv = max(1, KV // size) * D
    rows = HEADS * D // size + 2 * kv
    return {
        A + "self_attn.qkv_proj.weight": torch.zeros(rows, H),
        A + "self_attn.qkv_proj.bias": torch.zeros(rows),
        A + "self_attn.o_proj.weight": torch.zeros(H, HEADS * D // size),
        A + "input_layernorm.weight": torch.zeros(H),
        A + "self_attn.q_norm.weight": torch.zeros(D),
        A + "mlp.gate.weight": torch.zeros(EXPERTS, H),
        A + "mlp.experts.w13_weight": torch.zeros(len(experts), 2 * WIDE // size, H),
        A + "mlp.experts.w2_weight": torch.zeros(len(experts), H, WIDE // size),
        "model.embed_tokens.weight": torch.zeros(-(-VOCAB // 64) * 64 // size, H),
        "model.norm.weight": torch.zeros(H),
    }


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_fused_tensors_experts_and_shared_heads(size: int, rank: int) -> None:
    whole, experts = checkpoint(), range(1, 3)
    tensors = live(size, experts)
    load = rule_loader(llama_rules(KV), tensors, rank=rank, size=size, experts=experts)
    # With real values: every element is where a loader by hand puts it.
    load(iter(whole.items()))

    def rows(name: str, parts: int, index: int) -> torch.Tensor:
        return whole[A + name].chunk(parts, 0)[index]

    kv_parts, kv_index = min(size, KV), rank * min(size, KV) // size
    for kind in ("weight", "bias"):
        qkv = [rows(f"self_attn.q_proj.{kind}", size, rank)]
        qkv += [rows(f"self_attn.{x}_proj.{kind}", kv_parts, kv_index) for x in "kv"]
        assert torch.equal(tensors[f"{A}self_attn.qkv_proj.{kind}"], torch.cat(qkv))
    assert torch.equal(
        tensors[A + "self_attn.o_proj.weight"], whole[A + "self_attn.o_proj.weight"].chunk(size, 1)[rank]
    )
    for place, expert in enumerate(experts):
        base = f"mlp.experts.{expert}."
        w13 = torch.cat([rows(f"{base}{x}_proj.weight", size, rank) for x in ("gate", "up")])
        assert torch.equal(tensors[A + "mlp.experts.w13_weight"][place], w13)
        w2 = whole[f"{A}{base}down_proj.weight"].chunk(size, 1)[rank]
        assert torch.equal(tensors[A + "mlp.experts.w2_weight"][place], w2)
    embed = tensors["model.embed_tokens.weight"]
    held = whole["model.embed_tokens.weight"][rank * len(embed) : (rank + 1) * len(embed)]
    assert torch.equal(embed[: len(held)], held) and not embed[len(held) :].any()
    # Recorded: every element of every tensor but the padding is wanted once.
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in whole.items()}
    found = record("r", load, shapes, tensors, allow_unwritten=["model.embed_tokens.weight"])
    wanted = sum(torch.Size(h.size).numel() for h in found.table.held)
    assert wanted == sum(t.numel() for t in tensors.values()) - (len(embed) - len(held)) * H


def test_what_does_not_fit_is_named() -> None:
    whole = checkpoint()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in whole.items()}
    tensors = live(2, range(EXPERTS))
    with pytest.raises(PlanError, match=r"surprise\.weight: no rule matches it"):
        rule_loader(llama_rules(KV), tensors, size=2)([("surprise.weight", torch.zeros(3))])
    with pytest.raises(PlanError, match="cannot be cut over 5 ranks"):
        rule_loader(llama_rules(KV), tensors, size=5)(iter(whole.items()))
    with pytest.raises(PlanError, match="there is no live tensor"):
        rule_loader(llama_rules(KV), {}, size=2)(iter(whole.items()))
    with pytest.raises(PlanError, match="does not fit"):
        rule_loader(llama_rules(KV), tensors)(iter(whole.items()))
    twice = [Rule("a|b", "x")]
    with pytest.raises(PlanError, match="another tensor has place 0"):
        rule_loader(twice, {"x": torch.zeros(2)})([("a", torch.ones(2)), ("b", torch.ones(2))])
    del shapes[A + "self_attn.o_proj.weight"]
    with pytest.raises(RecordingError, match="o_proj"):
        record("r", rule_loader(llama_rules(KV), tensors, size=2), shapes, tensors)
