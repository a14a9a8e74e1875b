"""Errors of expert-parallel groups."""

from __future__ import annotations

from railwire.errors import RailwireError


class MoeError(RailwireError):
    """Base of what an expert-parallel group raises on its own account."""


class RankLostError(MoeError):
    """A rank is dead, late, or has sent what it must not; the group does not shrink, so it has ended.

    Attributes:
        rank: the first such rank.
        generation: the dispatch in which it was missed.
    """

    def __init__(self, message: str, *, rank: int, generation: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.generation = generation


class MaskedOutError(MoeError):
    """The others have masked this rank (it was late) and go on without it. ``reform()`` takes it back."""


class PhaseError(MoeError):
    """dispatch and combine were not called in turn."""
