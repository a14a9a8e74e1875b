"""Expert parallelism for models of the transformers library: OLMoE, Qwen-MoE and others whose sparse blocks keep their
experts in one module (``gate_up_proj``, ``down_proj``, ``act_fn``; ``forward(tokens, top_k_index, top_k_weights)``).

:func:`expert_parallel` replaces these modules by ones that hold this rank's experts only and exchange tokens with the
other ranks. The sums are in the order of that library (ascending experts, float32), and each expert computes the
tokens of each source by themselves, as a single process with that source's batch would: so the logits are equal bit
for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from railwire.moe import ExpertGroup

Tensor = torch.Tensor


class ParallelExperts(nn.Module):
    """The experts of one layer, dealt out to the ranks of a group.

    Args:
        experts: the module of the whole model; what this rank does not keep may be freed afterwards.
        group: of layout ``grouped``, in the dtype of the model.
        per_source: True: exact, see above. False: one matrix product per expert, faster.
    """

    def __init__(self, experts: Any, group: ExpertGroup, per_source: bool = True) -> None:
        super().__init__()
        here = group.config.experts_of(group.rank)
        self.group = group
        self.per_source = per_source
        self.act_fn = experts.act_fn
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[here.start : here.stop].clone(), False)
        self.down_proj = nn.Parameter(experts.down_proj.detach()[here.start : here.stop].clone(), False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        ids, order = torch.sort(top_k_index, dim=1)  # the library sums in the order of experts
        weights = torch.gather(top_k_weights.to(torch.float32), 1, order)
        got = self.group.dispatch(hidden_states, ids, weights)
        y = torch.empty_like(got.x)
        for expert in range(self.gate_up_proj.shape[0]):
            if self.per_source:
                runs = [got.rows.run(source, expert) for source in range(got.counts.shape[0])]
            else:
                runs = [(int(got.rows.bases[expert]), int(got.expert_rows[expert]))]
            for first, rows in runs:
                if rows:
                    y[first : first + rows] = self._expert(expert, got.x[first : first + rows])
        return self.group.combine(y)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.gate_up_proj[number]).chunk(2, dim=-1)
        return nn.functional.linear(self.act_fn(gate) * up, self.down_proj[number])


def expert_parallel(model: nn.Module, group: ExpertGroup, per_source: bool = True) -> int:
    """Replaces the experts of all layers; returns how many layers there are.

    Raises:
        ValueError: the model has none, or other numbers than the group.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_experts(child)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts of the form that is known here")
    for parent, name, child in found:
        experts, _, hidden = getattr(child, "gate_up_proj").shape  # noqa: B009  (a Tensor or a Module, to mypy)
        if (experts, hidden) != (group.config.experts, group.config.hidden):
            raise ValueError(
                f"the model has {experts} experts and {hidden} channels, the group {group.config.experts} and "
                f"{group.config.hidden}"
            )
        setattr(parent, name, ParallelExperts(child, group, per_source))
    return len(found)


def _is_experts(module: Any) -> bool:
    named = all(hasattr(module, attribute) for attribute in ("gate_up_proj", "down_proj", "act_fn"))
    return named and isinstance(module.gate_up_proj, Tensor) and module.gate_up_proj.dim() == 3


class MaskedExperts(nn.Module):
    """The experts of a single process as if some were gone: what a group that goes on without ranks computes."""

    def __init__(self, experts: nn.Module, number: int) -> None:
        super().__init__()
        self.experts = experts
        self.number = number
        self.gone: frozenset[int] = frozenset()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.gone:
            gone = torch.isin(top_k_index, torch.tensor(sorted(self.gone)))
            top_k_index = torch.where(gone, self.number, top_k_index)  # the library leaves this number out
        result: Tensor = self.experts(hidden_states, top_k_index, top_k_weights)
        return result
