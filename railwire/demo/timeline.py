"""The picture of a run: compute and transfer of one request layer by layer, and below it what every prefiller did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from railwire.demo.record import Attempt, Record, Request

_COMPUTE, _TRANSFER, _LOST = "#4c72b0", "#dd8452", "#c44e52"


def shown(record: Record) -> Request | None:
    """The request of the upper picture: the one with the most bytes of those done in one attempt; or None."""
    clean = [r for r in record.requests if len(r.attempts) == 1 and r.attempts[0].layers and r.attempts[0].nbytes]
    return max(clean, key=lambda request: request.attempts[0].nbytes, default=None)


def write(record: Record, path: Path) -> None:
    """Draws it as a PNG."""
    # The object interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    request = shown(record)
    if request is not None:
        _layers(upper, record, request)
    else:
        upper.text(0.5, 0.5, "no request was pushed in one piece", ha="center", transform=upper.transAxes)
    _lanes(lower, record)
    figure.savefig(path, dpi=130, format="png")


def _layers(axes: Any, record: Record, request: Request) -> None:
    attempt = request.attempts[0]
    zero, before = attempt.compute_began, attempt.compute_began
    for layer in attempt.layers:
        axes.barh(layer.index, (layer.ready - before) * 1e3, left=(before - zero) * 1e3, height=0.8, color=_COMPUTE)
        if layer.landed:
            width = max(layer.landed - layer.began, 0.0) * 1e3
            axes.barh(layer.index, width, left=(layer.began - zero) * 1e3, height=0.8, color=_TRANSFER)
        before = layer.ready
    end = (attempt.compute_ended - zero) * 1e3
    axes.axvline(end, color="black", linestyle="--", linewidth=1)
    axes.text(end, 0, "prefill ends ", ha="right", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms since the prefill began")
    axes.set_ylabel("layer")
    rate = f", {attempt.gbytes_per_s:.2f} GB/s on the wire" if attempt.gbytes_per_s else ""
    axes.set_title(
        f"{record.model}: request {request.index + 1}, {attempt.tokens} tokens on {record.name_of(attempt.prefiller)}, "
        f"{attempt.nbytes / 1e6:.1f} MB of KV{rate}, {attempt.hidden or 0.0:.0%} landed before the prefill ended",
        fontsize=10,
    )
    _legend(
        axes,
        {"compute until the layer's KV is there": _COMPUTE, "transfer": _TRANSFER},
    )


def _lanes(axes: Any, record: Record) -> None:
    lanes = {worker.instance: place for place, worker in enumerate(record.prefillers) if worker.instance}
    zero = record.began
    for request in record.requests:
        for number, attempt in enumerate(request.attempts):
            place = lanes.get(attempt.prefiller)
            if place is None:
                continue
            if attempt.compute_began:
                _attempt(axes, place, zero, request, attempt)
            else:  # it died with its prefiller: only when it was given up is known
                later = request.attempts[number + 1].began if number + 1 < len(request.attempts) else request.ended
                began = attempt.began - zero
                axes.barh(
                    place, later - attempt.began, left=began, height=0.7, color="none", edgecolor=_LOST, hatch="///"
                )
    for place, worker in enumerate(record.prefillers):
        for when, text, colour in ((worker.joined, "joined", "green"), (worker.killed, "SIGKILL", _LOST)):
            if when >= zero:
                axes.plot([when - zero] * 2, [place - 0.45, place + 0.45], color=colour, linewidth=2.5)
                axes.text(when - zero, place - 0.47, text, color=colour, ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(record.prefillers)), [worker.name for worker in record.prefillers])
    axes.set_ylim(len(record.prefillers) - 0.4, -0.75)
    axes.set_xlim(left=0)
    axes.set_xlabel("s since the first prompt was sent; numbers are requests")
    _legend(axes, {"compute": _COMPUTE, "transfer": _TRANSFER, "lost with its prefiller, done again elsewhere": _LOST})


def _attempt(axes: Any, place: int, zero: float, request: Request, attempt: Attempt) -> None:
    began, ended = attempt.compute_began - zero, attempt.compute_ended - zero
    axes.barh(place - 0.15, ended - began, left=began, height=0.4, color=_COMPUTE, edgecolor="white", linewidth=0.5)
    axes.text(
        (began + ended) / 2, place - 0.15, str(request.index + 1), ha="center", va="center", fontsize=7, color="white"
    )
    for layer in attempt.layers:
        if layer.nbytes and layer.landed:
            axes.barh(place + 0.2, layer.landed - layer.began, left=layer.began - zero, height=0.25, color=_TRANSFER)


def _legend(axes: Any, entries: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=colour, label=text) for text, colour in entries.items()], fontsize=8, loc="best")
