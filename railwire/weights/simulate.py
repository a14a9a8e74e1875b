"""An update of a cluster that is not here: the real plan of a published model, over a network model.

Each trainer goes through its units in the plan's order. A unit passes the stages of the pipeline (copy to the device,
gather, fuse, quantise, submit), each stage one unit at a time, stages at the same time; what it has made is then to be
written. Trainers wait while more than the watermark is made but not written. NICs share their bandwidth fairly among
the flows of both ends, in steps of ``step`` seconds; a work request costs a NIC a fixed time besides its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from railwire.weights.plan import Plan

Floats = npt.NDArray[np.float64]
STAGES = ("h2d", "gather", "fuse", "quantise", "submit")


@dataclass(frozen=True)
class Costs:
    """Seconds. The defaults are those that the TransferEngine paper (arXiv 2510.27656, Table 5) gives per call for
    Kimi-K2 on 256 H200; ``gather`` is two calls of full_tensor(). ``submit`` is ours, per engine call.

    Attributes:
        work_request: what a WR costs a NIC besides its bytes.
        latency: from the last write to the version's being visible everywhere: landing, deciding, publishing.
    """

    h2d: float = 378e-6
    gather: float = 2 * 532e-6
    fuse: float = 37e-6
    quantise: float = 137e-6
    submit: float = 5e-6
    work_request: float = 0.1e-6
    latency: float = 2e-3
    gather_always: bool = True


@dataclass(frozen=True)
class Outcome:
    """What the simulation found; seconds and bytes.

    Attributes:
        ideal: bytes over bandwidth of the most loaded NIC, all that physics asks for.
        stages: seconds that the busiest trainer spends in each stage.
        waiting: seconds that the last trainer to finish had nothing ready to write.
        sent_peak, received_peak: most loaded over mean, per NIC.
        trace: by step: time, bytes per second received by all.
    """

    seconds: float
    ideal: float
    stages: dict[str, float]
    made: float
    waiting: float
    nbytes: int
    work_requests: int
    sent_peak: float
    received_peak: float
    trace: Floats = field(repr=False)


def simulate(
    plan: Plan, *, nic_gbps: float = 400.0, nics_per_gpu: int = 1, costs: Costs | None = None,
    watermark: int = 4 << 30, step: float = 1e-3,
) -> Outcome:  # fmt: skip
    """Plays one update of ``plan``.

    Args:
        nic_gbps: of each NIC, each way. nics_per_gpu: writes are striped evenly over them.
        watermark: bytes that a trainer may have made but not written.
        step: seconds.

    Raises:
        ValueError: figures that are not positive.
    """
    if nic_gbps <= 0 or nics_per_gpu < 1 or step <= 0 or watermark <= 0:
        raise ValueError("bandwidth, NICs, watermark and step must be positive")
    costs = costs or Costs()
    capacity = nic_gbps / 8 * 1e9 * nics_per_gpu
    schedules = [_schedule(plan, rank, costs) for rank in range(len(plan.sources))]
    sources, destinations = len(plan.sources), len(plan.destinations)
    rows = plan.batches
    nbytes = rows[:, 5] * rows[:, 6] * rows[:, 10]
    requests = np.bincount(rows[:, 0], weights=rows[:, 6] * rows[:, 10], minlength=sources)
    sent = np.bincount(rows[:, 0], weights=nbytes, minlength=sources)
    received = np.bincount(rows[:, 1], weights=nbytes, minlength=destinations)
    # A NIC that is busy with requests as such has that much less time for bytes.
    busy = sent / capacity + requests * costs.work_request / nics_per_gpu
    send_capacity = np.where(busy > 0, sent / np.maximum(busy, 1e-12), capacity)
    at = np.zeros(sources, dtype=np.int64)  # next entry of each schedule
    clock = np.zeros(sources)
    backlog = np.zeros((sources, destinations))
    left = sent.copy()
    idle = np.zeros(sources)
    trace: list[tuple[float, float]] = []
    now, last = 0.0, 0
    while left.max(initial=0.0) > 0.5:
        ready = backlog.sum(axis=1)
        clock += np.where(ready < watermark, step, 0.0)
        for rank, schedule in enumerate(schedules):
            end = int(np.searchsorted(schedule.when, clock[rank], side="right"))
            if end > at[rank]:
                backlog[rank] += schedule.upto(int(at[rank]), end, destinations)
                at[rank] = end
        moved = _share(backlog / step, send_capacity, capacity) * step
        moved = np.minimum(moved, backlog)
        idle += np.where((backlog.sum(axis=1) < 1) & (left > 0.5), step, 0.0)
        backlog -= moved
        backlog[backlog < 0.5] = 0.0
        by_source = moved.sum(axis=1)
        left = np.maximum(left - by_source, 0.0)
        finished = (at == [len(s.when) for s in schedules]) & (backlog.sum(axis=1) < 0.5)
        left[finished] = 0.0
        now += step
        last = int(np.argmax(by_source)) if by_source.any() else last
        trace.append((now, float(moved.sum()) / step))
    made = max((float(s.when[-1]) for s in schedules if len(s.when)), default=0.0)
    stages = {name: max(float(s.stages[i]) for s in schedules) for i, name in enumerate(STAGES)}
    return Outcome(
        now + costs.latency,
        float(max(sent.max(initial=0), received.max(initial=0)) / capacity),
        stages, made, float(idle[last]), int(nbytes.sum()), int(requests.sum()),
        float(sent.max() / max(sent.mean(), 1e-9)), float(received.max() / max(received.mean(), 1e-9)),
        np.array(trace),
    )  # fmt: skip


@dataclass(frozen=True)
class _Schedule:
    """When a trainer has made what: entry i is there at ``when[i]``; ``dst`` and ``nbytes`` of its batches lie in
    ``[first[i], first[i + 1])``."""

    when: Floats
    first: npt.NDArray[np.int64]
    dst: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]
    stages: Floats

    def upto(self, begin: int, end: int, destinations: int) -> Floats:
        rows = slice(int(self.first[begin]), int(self.first[end]))
        result: Floats = np.bincount(self.dst[rows], weights=self.nbytes[rows], minlength=destinations).astype(
            np.float64
        )
        return result


def _schedule(plan: Plan, rank: int, costs: Costs) -> _Schedule:
    low, high = np.searchsorted(plan.batches[:, 0], [rank, rank + 1])
    rows = plan.batches[low:high]
    numbers, first, count = np.unique(rows[:, 2], return_index=True, return_counts=True)
    cost = np.zeros((len(numbers), len(STAGES)))
    for index, number in enumerate(numbers.tolist()):
        cost[index, 4] = costs.submit * count[index]
        if number < 0:
            continue
        unit = plan.units[number]
        gathers = unit.kind == "fp8-gather" or costs.gather_always
        cost[index, :4] = (
            costs.h2d, costs.gather if gathers else 0.0, costs.fuse, costs.quantise if unit.kind != "cast" else 0.0,
        )  # fmt: skip
    when = np.zeros(len(numbers))
    stage_end = np.zeros(len(STAGES))
    for index in range(len(numbers)):
        ended = 0.0
        for stage in range(len(STAGES)):
            ended = max(ended, stage_end[stage]) + cost[index, stage]
            stage_end[stage] = ended
        when[index] = ended
    return _Schedule(
        when, np.append(first, len(rows)), rows[:, 1], rows[:, 5] * rows[:, 6] * rows[:, 10], cost.sum(axis=0)
    )


def _share(wanted: Floats, send: Floats, receive: float) -> Floats:
    """Rates of all flows: scaled to what both NICs can do, then what is left is dealt out again."""
    rates = np.zeros_like(wanted)
    for _ in range(6):
        open_ = wanted - rates
        row_left = np.maximum(send - rates.sum(axis=1), 0.0)
        column_left = np.maximum(receive - rates.sum(axis=0), 0.0)
        by_row = open_ * np.minimum(1.0, row_left / np.maximum(open_.sum(axis=1), 1e-9))[:, None]
        by_column = by_row * np.minimum(1.0, column_left / np.maximum(by_row.sum(axis=0), 1e-9))[None, :]
        if by_column.sum() < 1e-3 * receive:
            break
        rates += by_column
    return rates


def plot(outcome: Outcome, title: str, path: Path) -> None:
    """Throughput over time, and the stages, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    left.plot(outcome.trace[:, 0] * 1e3, outcome.trace[:, 1] / 1e12)
    left.axvline(outcome.ideal * 1e3, color="black", linestyle="--", linewidth=1, label="bytes over bandwidth")
    left.axvline(outcome.seconds * 1e3, color="#c44e52", linewidth=1, label="visible")
    left.set_xlabel("ms")
    left.set_ylabel("TB/s, all receivers")
    left.legend()
    left.set_title(title, fontsize=10)
    names = [*STAGES, "network"]
    right.barh(names, [*(outcome.stages[name] * 1e3 for name in STAGES), outcome.ideal * 1e3])
    right.invert_yaxis()
    right.set_xlabel("ms, busiest rank")
    figure.savefig(path, dpi=130, format="png")
