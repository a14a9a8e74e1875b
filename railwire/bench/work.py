"""What one measured run does, in terms that every contender understands, and the order in which pages move.

Runs in the measured processes: standard library and numpy only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

OPS = ("write", "pages", "scatter", "read", "send", "pingpong")
PATTERNS = ("contiguous", "random")

_MOST_GROUPS = 4096  # contenders that prepare each list ahead should not have to prepare a million

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """One run: `rounds` rounds of `pages` pages of `page_bytes` bytes.

    A round is one submission: one page list, one scatter, or (with `pages` = 1) one write, read or message. At most
    `window` rounds are in flight. `pingpong` is one small write each way per round, one after the other; the target
    writes back what it has received.
    """

    op: str
    page_bytes: int
    pages: int = 1
    rounds: int = 1
    window: int = 2
    pattern: str = "random"
    buffer_bytes: int = 64 << 20
    seed: int = 1

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op {self.op!r} is not one of {', '.join(OPS)}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern {self.pattern!r} is not one of {', '.join(PATTERNS)}")
        if min(self.page_bytes, self.pages, self.rounds, self.window) < 1:
            raise ValueError("page_bytes, pages, rounds and window are at least 1")
        if self.page_bytes * self.pages > self.buffer_bytes:
            raise ValueError(
                f"{self.pages} pages of {self.page_bytes} bytes do not fit into a buffer of {self.buffer_bytes} bytes"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Work:
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def with_rounds(self, rounds: int) -> Work:
        return dataclasses.replace(self, rounds=rounds)

    @property
    def slots(self) -> int:
        """Pages that the buffer holds."""
        return self.buffer_bytes // self.page_bytes

    @property
    def groups(self) -> int:
        """Different page lists; round r moves list r % groups."""
        return min(self.slots // self.pages, _MOST_GROUPS)

    @property
    def total_pages(self) -> int:
        return self.pages * self.rounds

    @property
    def total_bytes(self) -> int:
        return self.total_pages * self.page_bytes

    @property
    def echo_offset(self) -> int:
        """Where a ping-pong's target puts back what it has received, in the initiator's buffer."""
        return self.buffer_bytes // 2

    def source_at(self, initiator: bool) -> bool:
        """Whether that side's buffer holds the data at the start."""
        return initiator != (self.op == "read")

    def checked_at(self, initiator: bool) -> bool:
        """Whether that side's buffer tells afterwards if the data is right."""
        return initiator == (self.op in ("read", "pingpong"))

    def order(self) -> tuple[Slots, Slots]:
        """Source and destination slots, `groups` x `pages` each: row r % groups is the page list of round r.

        `random`: two independent permutations of all slots of the buffer, so that no two pages meet. `contiguous`:
        the identity on both sides.
        """
        count = self.groups * self.pages
        if self.pattern == "contiguous" or self.op == "send":
            source = destination = np.arange(count, dtype=np.int64)
        else:
            rng = np.random.default_rng(self.seed)
            source = rng.permutation(self.slots).astype(np.int64)[:count]
            destination = rng.permutation(self.slots).astype(np.int64)[:count]
        shape = (self.groups, self.pages)
        return np.ascontiguousarray(source.reshape(shape)), np.ascontiguousarray(destination.reshape(shape))

    def arrivals(self, slots_per_receiver: int) -> Slots:
        """Pages of each list that go to each receiver: `groups` x receivers, where receiver r owns destination slots
        from r * slots_per_receiver on."""
        receivers = self.slots // slots_per_receiver
        owner = self.order()[1] // slots_per_receiver
        return np.stack([np.count_nonzero(owner == r, axis=1) for r in range(receivers)], axis=1)

    def total(self, per_group: Slots) -> Slots:
        """Sums something that is known for each page list (rows) over all rounds."""
        whole, rest = divmod(self.rounds, self.groups)
        total: Slots = whole * per_group.sum(axis=0) + per_group[:rest].sum(axis=0)
        return total


@dataclass(frozen=True)
class Laps:
    """What an initiator measured: first submission, last completion (monotonic clock, ns), and each round's time."""

    start_ns: int
    end_ns: int
    us: npt.NDArray[np.float64]

    def summary(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.us, [50, 99]) if len(self.us) else (0.0, 0.0)
        return {"start_ns": self.start_ns, "end_ns": self.end_ns, "us_p50": float(p50), "us_p99": float(p99)}
