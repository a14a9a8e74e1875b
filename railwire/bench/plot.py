"""Results as a picture: bandwidth and time, by NIC. Needs matplotlib (the `bench` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from railwire.bench.measure import Result

_COLOURS = {"railwire": "#1f5fa8", "raw": "#8a8a8a", "raw-landed": "#b5b5b5", "nixl": "#76b900", "mooncake": "#d98c1f"}


def plot(results: Sequence[Result], path: Path) -> None:
    """Writes bars per work and contender: GB/s (logarithmic), and microseconds for the latency rows.

    Raises ImportError without matplotlib, ValueError if there is nothing to show.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [result for result in results if result.gbytes_per_s is not None]
    if not measured:
        raise ValueError("no figures to plot")
    panels = []
    for nic in dict.fromkeys(result.nic for result in measured):
        for latency in (False, True):
            chosen = [result for result in measured if result.nic == nic and result.scenario.latency == latency]
            if chosen:
                panels.append((nic, latency, chosen))
    widths = [max(1, len({result.scenario.title for result in chosen})) for _, _, chosen in panels]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.5 + 1.5 * sum(widths), 4.8), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, (nic, latency, chosen) in zip(axes[0], panels, strict=True):
        _bars(axis, chosen, latency)
        axis.set_title(f"{nic}: {'time (shorter is better)' if latency else 'bandwidth'}", fontsize=10)
        axis.set_ylabel("µs, median" if latency else "GB/s")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, results: Sequence[Result], latency: bool) -> None:
    works = list(dict.fromkeys(result.scenario.title for result in results))
    contenders = list(dict.fromkeys(result.contender for result in results))
    width = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        own = {result.scenario.title: result for result in results if result.contender == contender}
        places = [i + (index - (len(contenders) - 1) / 2) * width for i, work in enumerate(works) if work in own]
        shown = [own[work] for work in works if work in own]
        heights = [(result.us_p50 if latency else result.gbytes_per_s) or 0.0 for result in shown]
        bars = axis.bar(places, heights, width, label=contender, color=_COLOURS.get(contender))
        axis.bar_label(bars, fmt="{:.3g}", fontsize=6, padding=1)
    axis.set_yscale("log")
    axis.set_xticks(range(len(works)), [work.replace(", ", ",\n") for work in works], fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
