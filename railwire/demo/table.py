"""The live table, and the summary below it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from railwire.demo.record import Attempt, Record, Request, Summary

_STATES = {"ready": "green", "starting": "yellow", "killed": "bold red", "draining": "yellow"}


def view(record: Record, headline: str) -> Group:
    """What is shown now: workers, headline, one row per request."""
    known = sum(request.expected is not None for request in record.requests)
    if known < len(record.requests):
        headline += f" ({known} of {len(record.requests)})"
    return Group(_workers(record), Text(headline, style="bold"), table(record))


def _workers(record: Record) -> Text:
    line = Text()
    for worker in record.workers:
        line.append(f"{worker.name} ", style="bold").append(worker.state, style=_STATES.get(worker.state, ""))
        line.append(f" (pid {worker.pid})  " if worker.pid else "  ", style="dim")
    return line


def table(record: Record) -> Table:
    """One row per request."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in (
        "#",
        "prompt",
        "tokens",
        "prefiller",
        "pages",
        "MB",
        "GB/s",
        "hidden",
        "first token",
        "single process",
    ):
        justify: Literal["left", "right"] = "left" if name in ("prompt", "prefiller", "single process") else "right"
        # These two give way on a narrow terminal.
        narrow = name in ("prompt", "prefiller")
        grid.add_column(name, justify=justify, no_wrap=not narrow, min_width=9 if narrow else None)
    for request in record.requests:
        grid.add_row(*_row(record, request))
    return grid


def _row(record: Record, request: Request) -> Iterable[Text | str]:
    attempt = request.last
    ttft = f"{request.ttft * 1000:,.0f} ms" if request.ttft is not None else ""
    yield str(request.index + 1)
    yield Text(" ".join(request.prompt.split())[-28:], overflow="ellipsis", no_wrap=True)
    yield str(request.prompt_tokens or "")
    yield _prefiller(record, request)
    yield from _transfer(record, attempt)
    yield ttft
    yield _verdict(request)


def _prefiller(record: Record, request: Request) -> Text:
    if not request.attempts:
        return Text("under way", style="yellow") if request.sent and not request.ended else Text("")
    text = Text(no_wrap=True, overflow="ellipsis")
    for attempt in request.attempts[:-1]:
        text.append(record.name_of(attempt.prefiller), style="strike red").append(" > ")
    return text.append(record.name_of(request.attempts[-1].prefiller) or "none needed")


def _transfer(record: Record, attempt: Attempt | None) -> list[str]:
    if attempt is None or not attempt.nbytes:
        return ["", "", "", ""]
    rate = f"{attempt.gbytes_per_s:.2f}" if attempt.gbytes_per_s is not None else ""
    hidden = f"{attempt.hidden:.0%}" if attempt.hidden is not None else ""
    return [str(record.pages(attempt)), f"{attempt.nbytes / 1e6:.2f}", rate, hidden]


def _verdict(request: Request) -> Text:
    if request.error:
        return Text(f"FAILED: {request.error}"[:60], style="bold red")
    if request.equal is None:
        return Text(f"{len(request.answer)} tokens", style="dim") if request.answer else Text("")
    return Text("equal", style="green") if request.equal else Text("DIFFERS", style="bold red")


def summary_table(record: Record, summary: Summary, seconds: float) -> Table:
    """The summary.

    Args:
        seconds: of the whole demo, start of the processes included.
    """
    grid = Table.grid(padding=(0, 2))
    style = "bold green" if summary.ok else "bold red"
    served = ", ".join(f"{name} {count}" for name, count in summary.per_prefiller.items())
    grid.add_row("requests", f"{summary.requests}, {summary.failed} failed")
    grid.add_row("equal to the single process", Text(f"{summary.equal} of {summary.requests}", style=style))
    grid.add_row("re-routed after the kill", str(summary.rerouted))
    grid.add_row("answers by prefiller", served)
    grid.add_row(
        "KV moved", f"{summary.nbytes / 1e6:.1f} MB" + _and(summary.gbytes_per_s, ", at {:.2f} GB/s while under way")
    )
    grid.add_row("hidden behind compute", _and(summary.hidden, "{:.1%} of the bytes"))
    grid.add_row("first token", _and(summary.ttft, "median {:.2f} s, waiting included"))
    grid.add_row("time", f"{summary.seconds:.1f} s for the requests, {seconds:.1f} s in all")
    return grid


def _and(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
