"""`railwire demo moe`: a mixture-of-experts model over several processes, one of which dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_OUT = typer.Option(Path(), "--out", help="Directory for the picture.")
_NICS = typer.Option([], "--nic", help="NIC of the engines, tcp://127.0.0.1 or shm; repeatable; default: automatic.")


def moe(
    out: Path = _OUT,
    model: str = typer.Option("olmoe", "--model", help="olmoe or qwen: 2 layers, 16 experts, random weights."),
    ranks: int = typer.Option(4, "--ranks", min=2, max=16, help="Processes."),
    steps: int = typer.Option(12, "--steps", min=2, max=200, help="Tokens of each answer."),
    seed: int = typer.Option(1, "--seed", help="Of the weights and the prompts."),
    nic: list[str] = _NICS,
    kill: bool = typer.Option(True, help="Kill one rank in the middle."),
) -> None:
    """Deals the experts of a small transformers model out to processes and decodes in all of them, each its own
    prompts. Every logit is compared with the unchanged model in one process, bit for bit; after the death of a rank,
    with that model without its experts. Needs no GPU. The exit status is 0 only if all are equal."""
    from railwire.demo.moe import picture
    from railwire.demo.moe.run import DemoFailed, play

    console = Console()
    if model not in ("olmoe", "qwen"):
        raise typer.BadParameter(f"{model!r} is not olmoe or qwen", param_hint="--model")
    try:
        out.mkdir(parents=True, exist_ok=True)
        played = play(
            model=model, ranks=ranks, steps=steps, seed=seed, nics=nic, victim=ranks // 2 if kill else -1,
            tell=lambda text: console.print(text, markup=False, highlight=False),
        )  # fmt: skip
        path = out / "railwire-demo-moe.png"
        picture.write(played, path)
    except (DemoFailed, OSError, ImportError) as error:
        console.print(f"The demo failed: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    table = Table(title="Expert-parallel decoding")
    for column in ("rank", "steps", "logits equal", "MB sent", "rows computed", "masked at the end"):
        table.add_column(column, justify="right")
    traffic = played.traffic()
    for rank in range(ranks):
        done = played.of(rank)
        last: dict[str, Any] = done[-1] if done else {"masked": [], "rows": 0}
        masked = ", ".join(map(str, last["masked"])) or "-"
        table.add_row(
            f"{rank}{' (killed)' if rank == played.victim else ''}", str(len(done)),
            f"{sum(step['equal'] for step in done)} of {len(done)}", f"{sum(traffic[rank]) / 1e6:.2f}",
            str(last["rows"]), masked,
        )  # fmt: skip
    console.print(table)
    reasons = {(dead, why) for step in played.steps for dead, why in step["why"].items()}
    for dead, why in sorted(reasons)[:3]:
        console.print(f"Rank {dead} was masked: {why}", markup=False, highlight=False)
    console.print(f"Picture: {path}", soft_wrap=True, markup=False)
    if not played.equal:
        console.print("The logits differ.", style="bold red")
        raise typer.Exit(1)
    console.print(f"All logits equal, bit for bit ({played.seconds:.0f} s).")
