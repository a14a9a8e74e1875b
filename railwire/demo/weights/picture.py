"""The picture of a weight update: what each trainer did when, and how many bytes it wrote to whom."""

from __future__ import annotations

from pathlib import Path

from railwire.demo.weights.run import Act

_COLOURS = {"gather": "#8172b3", "convert": "#4c72b0", "submit": "#dd8452", "wait": "#c7c7c7"}


def write(act: Act, title: str, path: Path) -> None:
    """Draws it as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    begin = min((span[2] for spans in act.spans.values() for span in spans), default=0.0)
    for rank, spans in act.spans.items():
        for stage, _, start, end in spans:
            left.barh(rank, (end - start) * 1e3, left=(start - begin) * 1e3, height=0.7, color=_COLOURS[stage])
    left.set_yticks(list(act.spans), [f"trainer {rank}" for rank in act.spans])
    left.invert_yaxis()
    left.set_xlabel("ms")
    left.set_title(title, fontsize=10)
    handles = [Patch(color=colour, label=stage) for stage, colour in _COLOURS.items()]
    left.legend(handles=handles, loc="lower right", fontsize=8)
    names = sorted({name for by in act.nbytes.values() for name in by})
    base = [0.0] * len(act.nbytes)
    for name in names:
        megabytes = [act.nbytes[rank].get(name, 0) / 1e6 for rank in act.nbytes]
        right.barh(list(act.nbytes), megabytes, left=base, height=0.7, label=name.partition("#")[0])
        base = [a + b for a, b in zip(base, megabytes, strict=True)]
    right.set_yticks(list(act.nbytes), ["" for _ in act.nbytes])
    right.invert_yaxis()
    right.set_xlabel("MB written")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
