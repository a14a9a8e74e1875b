"""What can go wrong with a weight update: errors that name the parameter, or the rank."""

from __future__ import annotations

from collections.abc import Sequence

from railwire.errors import RailwireError

_SHOWN = 8


class WeightsError(RailwireError):
    """Base of the errors of :mod:`railwire.weights`."""


class PlanError(WeightsError, ValueError):
    """Trainers and receivers cannot be mapped onto each other.

    Attributes:
        problems: one sentence for each parameter, or rank, that is wrong.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        shown = self.problems[:_SHOWN]
        rest = len(self.problems) - len(shown)
        super().__init__("\n".join([*shown, *([f"... and {rest} more"] if rest else [])]))


class ProofError(PlanError):
    """A plan that does not cover its destinations exactly: a defect of the planner, never of the input."""


class RecordingError(PlanError):
    """A loader did something to a weight that is no copy of a part of it."""


class UpdateError(WeightsError):
    """An update failed. Receivers serve what they served before, or nothing; never a mixture.

    Attributes:
        version: that was to be published.
        problems: one sentence for each rank that failed.
    """

    def __init__(self, version: int, problems: Sequence[str]) -> None:
        self.version = version
        self.problems = tuple(problems)
        super().__init__(f"version {version} was not published: " + "; ".join(self.problems[:_SHOWN]))


class RendezvousError(WeightsError):
    """The store cannot be reached, or says something else than was expected."""
