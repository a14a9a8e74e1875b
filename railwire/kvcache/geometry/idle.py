"""Plans of source ranks that no destination rank needs.

Where the prefiller has more replicas of a head than the decoder has use for, some of its ranks send nothing. They
still have to learn when a request has left the instance: one destination rank, the same for everybody who computes
it, sends them tickets that ask for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from railwire.kvcache.geometry.layout import RankLayout
from railwire.kvcache.geometry.plan import RankPlan

DIGEST = b"nothing to send!"


def informing_rank(source_rank: int, plans: Sequence[Sequence[RankPlan | None]]) -> int | None:
    """The destination rank that keeps this source rank informed; None if some rank needs it anyway.

    Args:
        plans: by destination rank, then by source rank.
    """
    if any(by_source[source_rank] is not None for by_source in plans):
        return None
    return source_rank % len(plans)


def idle_plan(source_rank: int, source: RankLayout, destination: RankLayout, destination_rank: int) -> RankPlan:
    """A plan with no steps."""
    return RankPlan(
        source_rank=source_rank,
        destination_rank=destination_rank,
        unit_tokens=gcd(source.block_tokens, destination.block_tokens),
        src_block_tokens=source.block_tokens,
        dst_block_tokens=destination.block_tokens,
        src_num_blocks=source.num_blocks,
        dst_num_blocks=destination.num_blocks,
        steps={},
        shares={},
        digest=DIGEST,
        num_steps=0,
        bytes_per_unit=0,
    )
