"""Which ranks go on, when some say that others are gone.

Every header carries the mask of its sender. Ranks are heard in ascending order, and the word of a rank that a lower one
has already put out does not count. So all who hear the same headers come to the same set, also when two ranks accuse
each other: the higher one goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def agree(masked: Iterable[int], said: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The new mask.

    Args:
        masked: ranks that all have put out before.
        said: the mask of each rank that was heard, one's own included.
    """
    out = set(masked)
    for rank in sorted(said):
        if rank not in out:
            out |= said[rank] - {rank}
    return frozenset(out)
