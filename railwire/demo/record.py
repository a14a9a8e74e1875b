"""What a run of the demo has recorded: the requests with their attempts, the workers, and what happened to them.

All times are seconds of this host's monotonic clock, which its processes share; 0 for what has not been.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# A layer is posted right after it is ready if the ticket is there. Then the time that posting takes counts as transfer.
_AT_ONCE = 0.005


@dataclass(frozen=True)
class Layer:
    """One layer of one push."""

    index: int
    ready: float
    posted: float
    landed: float
    nbytes: int

    @property
    def began(self) -> float:
        """When its transfer began."""
        return self.ready if self.ready > 0 and self.posted - self.ready < _AT_ONCE else self.posted


@dataclass
class Attempt:
    """One try of a request on one prefiller."""

    prefiller: str
    """Instance id; empty if nothing had to be prefilled."""
    began: float
    error: str = ""
    queued: float = 0.0
    compute_began: float = 0.0
    compute_ended: float = 0.0
    pushed: float = 0.0
    tokens: int = 0
    """Tokens whose KV the prefiller had to provide."""
    first_token: int = 0
    """The first that was transferred; those before it were with the decoder already."""
    nbytes: int = 0
    hidden: float | None = None
    """Share of the bytes that had landed before the computing ended; None: nothing was pushed."""
    layers: tuple[Layer, ...] = ()

    @property
    def wire_seconds(self) -> float:
        """How long something was under way: the union of the layers' transfers."""
        total, end = 0.0, 0.0
        spans = ((layer.began, layer.landed) for layer in self.layers if layer.nbytes and layer.landed)
        for began, landed in sorted(spans):
            total += max(0.0, landed - max(began, end))
            end = max(end, landed)
        return total

    @property
    def gbytes_per_s(self) -> float | None:
        seconds = self.wire_seconds
        return self.nbytes / seconds / 1e9 if seconds > 0 and self.nbytes else None


@dataclass
class Request:
    """A prompt, its answer, and the answer that it should have."""

    index: int
    prompt: str
    expected: list[int] | None = None
    """Tokens of the single process."""
    answer: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    sent: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    error: str = ""
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def equal(self) -> bool | None:
        """Whether the answer is that of the single process; None: one of them is still to come."""
        if self.error:
            return False
        if not self.ended or self.expected is None:
            return None
        return self.answer == self.expected

    @property
    def rerouted(self) -> bool:
        return len(self.attempts) > 1

    @property
    def last(self) -> Attempt | None:
        """The attempt that gave the answer."""
        return self.attempts[-1] if self.attempts else None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token, waiting included."""
        return self.first_token - self.sent if self.first_token else None


@dataclass
class Worker:
    """A process of the demo."""

    name: str
    role: str
    pid: int = 0
    url: str = ""
    instance: str = ""
    state: str = "starting"
    joined: float = 0.0
    killed: float = 0.0


@dataclass
class Record:
    """Everything about one run."""

    model: str
    block_tokens: int = 16
    requests: list[Request] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    began: float = 0.0
    """The first prompt was sent."""
    ended: float = 0.0

    def name_of(self, instance: str) -> str:
        """The worker's name."""
        return next(
            (worker.name for worker in self.workers if worker.instance and worker.instance == instance), instance
        )

    @property
    def prefillers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.role == "prefill"]

    def pages(self, attempt: Attempt) -> int:
        """Pages per layer that were transferred, the first and the last perhaps in part."""
        if attempt.tokens <= attempt.first_token:
            return 0
        return -(-attempt.tokens // self.block_tokens) - attempt.first_token // self.block_tokens

    def summary(self) -> Summary:
        return summarise(self)


@dataclass(frozen=True)
class Summary:
    """The end of the story."""

    requests: int
    failed: int
    equal: int
    rerouted: int
    nbytes: int
    hidden: float | None
    """Share of all bytes that had landed before the computing of their request ended."""
    gbytes_per_s: float | None
    """While something was under way."""
    ttft: float | None
    """Median seconds."""
    seconds: float
    per_prefiller: Mapping[str, int]
    """Answers by the name of the prefiller that computed their KV."""

    @property
    def ok(self) -> bool:
        return self.requests > 0 and self.failed == 0 and self.equal == self.requests


def summarise(record: Record) -> Summary:
    """Counts a finished run."""
    final = [attempt for attempt in (request.last for request in record.requests) if attempt is not None]
    moved = [attempt for attempt in final if attempt.nbytes and attempt.hidden is not None]
    nbytes = sum(attempt.nbytes for attempt in moved)
    hidden = sum(attempt.nbytes * (attempt.hidden or 0.0) for attempt in moved)
    seconds = sum(attempt.wire_seconds for attempt in moved)
    served = {worker.name: 0 for worker in record.prefillers}
    for attempt in final:
        name = record.name_of(attempt.prefiller)
        if name in served:
            served[name] += 1
    return Summary(
        requests=len(record.requests),
        failed=sum(bool(request.error) or not request.ended for request in record.requests),
        equal=sum(request.equal is True for request in record.requests),
        rerouted=sum(request.rerouted for request in record.requests),
        nbytes=nbytes,
        hidden=hidden / nbytes if nbytes else None,
        gbytes_per_s=nbytes / seconds / 1e9 if seconds > 0 else None,
        ttft=_median(request.ttft for request in record.requests),
        seconds=record.ended - record.began,
        per_prefiller=served,
    )


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def attempt_from(entry: Mapping[str, Any]) -> Attempt:
    """An attempt from the router's ``railwire_timing``."""
    prefill, decode = entry.get("prefill") or {}, entry.get("decode") or {}
    attempt = Attempt(entry.get("prefiller") or "", float(entry["began"]), str(entry.get("error") or ""))
    attempt.first_token = int(decode.get("first_token", 0))
    if decode.get("need_prefill") is False:
        attempt.prefiller = ""
    if "began" in prefill:  # else it died, or was not wanted
        attempt.queued = float(prefill.get("queued", 0.0))
        attempt.compute_began = float(prefill["began"])
        attempt.compute_ended = float(prefill["ended"])
        attempt.pushed = float(prefill.get("pushed", 0.0))
        attempt.tokens = int(prefill.get("tokens", 0))
        attempt.nbytes = int(prefill.get("bytes", 0))
        attempt.hidden = float(prefill["hidden"]) if attempt.nbytes else None
        attempt.layers = tuple(
            Layer(int(one["layer"]), float(one["ready"]), float(one["posted"]), float(one["landed"]), int(one["bytes"]))
            for one in prefill.get("layers", ())
        )
    return attempt
