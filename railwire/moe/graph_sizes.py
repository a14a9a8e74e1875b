"""Where everything lies in a group for CUDA graphs: slots of one size, a rank's own included."""

from __future__ import annotations

from dataclasses import dataclass

from railwire.errors import ConfigurationError
from railwire.moe.config import MoeConfig
from railwire.moe.geometry import Geometry, round_up


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Where everything lies. Sizes in bytes unless they say rows."""

    geometry: Geometry
    slot_rows: int
    most_of_expert: int

    @classmethod
    def of(cls, config: MoeConfig) -> GraphSizes:
        """Raises ConfigurationError for the layout ``standard``."""
        if config.layout == "standard":
            raise ConfigurationError("a group for CUDA graphs has the layout grouped or batched, not standard")
        most = config.max_tokens * min(config.top_k, config.local_experts)
        rows = min(config.slot_rows or most, config.max_rows)
        return cls(Geometry(config), rows, config.max_tokens if config.layout == "batched" else rows)

    @property
    def slot(self) -> int:
        """One dispatch slot: a header and its rows."""
        return self.geometry.header + self.slot_rows * self.geometry.row

    @property
    def dispatch(self) -> int:
        """The dispatch send region, and the receive region."""
        return self.geometry.config.ranks * self.slot

    @property
    def result_slot(self) -> int:
        """One slot of the combine send region."""
        return self.slot_rows * self.geometry.combine_row

    @property
    def combine_send(self) -> int:
        return self.geometry.config.ranks * self.result_slot

    @property
    def registered(self) -> int:
        """All registered memory of a rank."""
        return 2 * self.dispatch + self.combine_send + self.geometry.combine_region

    @property
    def output_rows(self) -> int:
        """Rows of the output, whatever comes."""
        c = self.geometry.config
        if c.layout == "batched":
            return c.local_experts * c.ranks * c.max_tokens
        most = c.ranks * self.slot_rows + c.local_experts * (c.expert_alignment - 1)
        return round_up(most, c.expert_alignment)
