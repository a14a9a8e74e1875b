"""`railwire demo`: a real model, prefilled in two processes and decoded in a third, one of which dies in the middle."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:
    from railwire.demo.record import Record
    from railwire.demo.run import Plan


_OUT = typer.Option(Path(), "--out", help="Directory for the timeline picture and the trace file.")
_PROMPTS = typer.Option(
    None, "--prompts", exists=True, dir_okay=False, help="File of prompts between lines of '---'; default: our own."
)
_OPTIONS = typer.Option([], "--runner-option", help="NAME=VALUE for the runner; repeatable.")
_NICS = typer.Option([], "--nic", help="NIC of the engines, tcp://127.0.0.1 or shm; repeatable; default: automatic.")


def demo(
    context: typer.Context,
    out: Path = _OUT,
    prompts: Path | None = _PROMPTS,
    runner: str = typer.Option("reference", "--runner", help="Model runner."),
    model: str = typer.Option("smollm2", "--model", help="smollm2, tiny (random weights), or the path of a GGUF file."),
    runner_option: list[str] = _OPTIONS,
    nic: list[str] = _NICS,
    max_tokens: int = typer.Option(24, "--max-tokens", min=1, max=512, help="Tokens of each answer."),
    concurrency: int = typer.Option(6, "--concurrency", min=1, max=64, help="Requests under way at a time."),
) -> None:
    """Runs a router, two prefill workers and a decode worker on this host, sends them real prompts, and compares every
    answer with that of a single process. In the middle one prefiller is killed, and another joins.

    Needs no GPU. Writes railwire-demo.png and railwire-demo.trace.json (for ui.perfetto.dev). The exit status is 0 only
    if every answer is equal."""
    if context.invoked_subcommand is not None:
        return
    # Here, so that the other commands need none of it.
    from railwire.demo import table, timeline, trace
    from railwire.demo.cluster import Failed
    from railwire.demo.run import Plan, read_prompts
    from railwire.errors import RailwireError
    from railwire.serve.config import parse_options

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)  # what the table needs: a file or a pipe has no width of its own
    began = time.monotonic()
    try:
        if prompts is None:
            text = importlib.resources.files("railwire.demo").joinpath("prompts.txt").read_text(encoding="utf-8")
        else:
            text = prompts.read_text(encoding="utf-8")
        options: dict[str, Any] = {"threads": 1, "num_blocks": 384, **parse_options(runner_option)}
        plan = Plan(
            read_prompts(text),
            runner=runner,
            model=model,
            options=options,
            nics=tuple(nic),
            max_tokens=max_tokens,
            concurrency=concurrency,
        )
        out.mkdir(parents=True, exist_ok=True)
        record, warnings = _play(plan, console)
    except Failed as error:
        console.print(f"The demo failed: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    except (RailwireError, OSError, UnicodeDecodeError) as error:
        console.print(f"railwire: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    summary = record.summary()
    picture, traced = out / "railwire-demo.png", out / "railwire-demo.trace.json"
    timeline.write(record, picture)
    trace.write(record, traced)
    for warning in warnings:
        console.print(f"Note: {warning}", style="yellow", markup=False)
    console.print(table.table(record))
    console.print(table.summary_table(record, summary, time.monotonic() - began))
    console.print(f"Timeline: {picture}\nTrace, for ui.perfetto.dev: {traced}", soft_wrap=True, markup=False)
    for request in record.requests:
        if request.error:
            console.print(f"Request {request.index + 1} failed: {request.error}", style="bold red", markup=False)
        elif request.equal is False:
            text = f"Request {request.index + 1}: {request.answer} instead of {request.expected}"
            console.print(text, style="bold red", markup=False)
    if not summary.ok:
        raise typer.Exit(1)


def _play(plan: Plan, console: Console) -> tuple[Record, list[str]]:
    """Runs it with a live table; where there is no terminal, with a line for each act."""
    from railwire.demo import table
    from railwire.demo.run import Demo

    last = ""

    def line(headline: str) -> None:
        nonlocal last
        if headline != last:
            last = headline
            console.print(headline, soft_wrap=True, markup=False, highlight=False)

    if not console.is_terminal:
        play = Demo(plan, line)
        return asyncio.run(play.run()), play.warnings
    # Transient: what is too high for the terminal is cut while it lives, and printed whole afterwards.
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        play = Demo(plan, lambda headline: live.update(table.view(play.record, headline)))
        return asyncio.run(play.run()), play.warnings
