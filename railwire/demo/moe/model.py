"""The model of the demo: a 2-layer OLMoE or Qwen2-MoE configuration with random weights, the same in every process."""

from __future__ import annotations

from typing import Any

import torch

EXPERTS, TOP_K, HIDDEN, VOCABULARY = 16, 4, 64, 512
PROMPTS, PROMPT_TOKENS, STEPS = 3, 20, 12


def build(kind: str, seed: int) -> Any:
    """Raises ImportError without transformers, ValueError for a kind there is not."""
    import transformers

    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts_per_tok=TOP_K, num_experts=EXPERTS, max_position_embeddings=256, use_cache=True,
    )  # fmt: skip
    config: Any
    cls: Any
    if kind == "olmoe":
        config = transformers.OlmoeConfig(intermediate_size=96, pad_token_id=0, **common)
        cls = transformers.OlmoeForCausalLM
    elif kind == "qwen":
        config = transformers.Qwen2MoeConfig(
            moe_intermediate_size=96, shared_expert_intermediate_size=128, intermediate_size=128, decoder_sparse_step=1,
            **common,
        )  # fmt: skip
        cls = transformers.Qwen2MoeForCausalLM
    else:
        raise ValueError(f"the demo has the models olmoe and qwen, not {kind!r}")
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = cls(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    return model


def prompts(rank: int, seed: int) -> torch.Tensor:
    """The prompts of one rank, ``[prompts, tokens]``: each rank has its own, and another number of them."""
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    return torch.randint(1, VOCABULARY, (PROMPTS - rank % 2, PROMPT_TOKENS), generator=generator)


class Decoder:
    """Greedy decoding, a step at a time: the first step is the whole prompt."""

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self._model = model
        self._next = tokens
        self._cache: Any = None

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Logits of the last position, ``[prompts, vocabulary]``."""
        out = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[:, -1]
        self._next = logits.argmax(dim=-1, keepdim=True)
        return logits
