"""`railwire demo weights`: trainers write straight into inference ranks; one of them is killed in the middle."""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

_OUT = typer.Option(Path(), "--out", help="Directory for the picture of the timeline.")
_NICS = typer.Option([], "--nic", help="NIC of the engines, tcp://127.0.0.1 or shm; repeatable; default: tcp.")


def weights(
    out: Path = _OUT,
    model: str = typer.Option("smollm2", "--model", help="smollm2, tiny (random weights), or the path of a GGUF file."),
    nic: list[str] = _NICS,
    max_tokens: int = typer.Option(12, "--max-tokens", min=1, max=128, help="Tokens that are generated to compare."),
) -> None:
    """Trains SmolLM2 in four processes (FSDP2 x TP), updates two tensor-parallel inference ranks, and compares what
    they generate with the trainers' full state dict. A trainer is killed in the middle of an update: the old version
    goes on being served, and the next update succeeds after its return.

    Needs no GPU. Writes railwire-weights.png. The exit status is 0 only if everything was equal."""
    from railwire.demo.weights import picture
    from railwire.demo.weights.run import Demo
    from railwire.errors import RailwireError

    console = Console()
    began = time.monotonic()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=console, transient=True)
    task = bar.add_task("", total=1.0, visible=False)

    def note(text: str, share: float) -> None:
        if share < 0:
            bar.update(task, visible=False)
            bar.console.print(f"[{time.monotonic() - began:5.1f} s] {text}", markup=False, highlight=False)
        else:
            bar.update(task, description=text, completed=share, visible=True)

    try:
        with bar:
            result = Demo(model, tuple(nic), max_tokens, note).run()
    except (RailwireError, OSError) as error:
        console.print(f"The demo failed: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    table = Table(title="Bytes per trainer")
    table.add_column("trainer")
    names = sorted({name for by in result.acts[-1].nbytes.values() for name in by})
    for name in names:
        table.add_column(f"to {name.partition('#')[0]}", justify="right")
    for rank, by in sorted(result.acts[-1].nbytes.items()):
        table.add_row(str(rank), *(f"{by.get(name, 0) / 1e6:.1f} MB" for name in names))
    console.print(table)
    console.print(f"Converted on the way, at most at a time: {result.high_water / 1e6:.1f} MB of each trainer")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "railwire-weights.png"
    last = result.acts[-1]
    total = sum(sum(by.values()) for by in last.nbytes.values())
    title = f"{model}: {total / 1e6:.0f} MB from 4 trainers to 2 inference ranks in {last.seconds:.2f} s"
    picture.write(last, title, path)
    console.print(f"Timeline: {path}", soft_wrap=True, markup=False)
