"""The picture of the demo: who sent how much to whom, and how long each step took."""

from __future__ import annotations

from pathlib import Path

from railwire.demo.moe.run import Played


def write(played: Played, path: Path) -> None:
    """Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6))
    traffic = played.traffic()
    image = left.imshow([[value / 1e6 for value in row] for row in traffic], cmap="Blues")
    for source, row in enumerate(traffic):
        for target, value in enumerate(row):
            if source != target:
                shade = "white" if value > 0.6 * max(map(max, traffic)) else "black"
                left.text(target, source, f"{value / 1e6:.2f}", ha="center", va="center", color=shade)
    left.set(xlabel="to rank", ylabel="from rank", title="MB sent, dispatch and combine")
    left.set_xticks(range(played.ranks))
    left.set_yticks(range(played.ranks))
    figure.colorbar(image, ax=left, shrink=0.8)
    for rank in range(played.ranks):
        steps = played.of(rank)
        right.plot([s["step"] for s in steps], [s["seconds"] * 1e3 for s in steps], marker="o", label=f"rank {rank}")
    if played.victim >= 0:
        right.axvline(played.kill_at - 0.5, color="red", linestyle="--", label=f"rank {played.victim} is killed")
    right.set(xlabel="step (0: the prompts)", ylabel="ms", yscale="log", title="Time of a step")
    right.legend(fontsize=8)
    equal = "equal" if played.equal else "NOT equal"
    figure.suptitle(f"Expert-parallel logits are {equal} to the single process's, bit for bit")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
