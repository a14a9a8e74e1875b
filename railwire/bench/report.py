"""Results as a table with ratios, and as JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import msgspec
from rich.table import Table
from rich.text import Text

from railwire.bench.measure import Result


def json_line(result: Result) -> str:
    """One JSON object, without line breaks."""
    return msgspec.json.encode(result).decode()


def read_json_lines(lines: Iterable[str]) -> list[Result]:
    """What json_line() wrote."""
    return [msgspec.json.decode(line, type=Result) for line in lines if line.strip()]


def same_work(result: Result) -> tuple[str, str, int, int, str, int, str]:
    """Equal for results that may be compared."""
    return (result.nic, result.op, result.page_bytes, result.pages, result.pattern, result.window, result.memory)


def advantage(ours: Result, theirs: Result) -> float | None:
    """How many times as good `ours` is: of rates for throughput, of the median time for latency; None if unknown."""
    if ours.scenario.latency:
        above, below = theirs.us_p50, ours.us_p50
    else:
        above, below = ours.gbytes_per_s, theirs.gbytes_per_s
    if not above or not below:
        return None
    return above / below


def advantages(results: Sequence[Result], subject: str = "railwire") -> list[tuple[Result, float | None]]:
    """Each result with `subject`'s advantage over it at the same work; None for the subject itself."""
    subjects = {same_work(result): result for result in results if result.contender == subject}
    pairs: list[tuple[Result, float | None]] = []
    for result in results:
        ours = subjects.get(same_work(result))
        known = ours is not None and result.contender != subject
        pairs.append((result, advantage(ours, result) if known and ours is not None else None))
    return pairs


def format_rate(value: float) -> str:
    """Three significant digits, no exponent."""
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if value >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def table(results: Sequence[Result], title: str = "") -> Table:
    """Side by side: one block per work, one line per contender."""
    grid = Table(title=title or None, title_justify="left", header_style="bold")
    grid.add_column("NIC")
    grid.add_column("Work")
    grid.add_column("Contender")
    for name in ("GB/s", "M ops/s", "p50 µs", "p99 µs"):
        grid.add_column(name, justify="right")
    grid.add_column("verified", justify="center")
    compared = len({result.contender for result in results}) > 1
    if compared:
        grid.add_column("railwire is", justify="right")
    for _, block in groupby(advantages(results), key=lambda pair: same_work(pair[0])):
        for index, (result, ratio) in enumerate(block):
            first = index == 0
            row = [_where(result) if first else "", result.scenario.title if first else "", result.contender]
            if result.gbytes_per_s is None:
                grid.add_row(*row[:2], Text(f"{result.contender}*", style="dim"))  # notes() says why
                continue
            grid.add_row(*row, *_figures(result), *([_ratio(ratio)] if compared else []))
        grid.add_section()
    return grid


def markdown(results: Sequence[Result]) -> str:
    """One line per work, one column per contender, Railwire's advantage in brackets: for a README."""
    contenders = list(dict.fromkeys(result.contender for result in results))
    lines = ["| NIC | Work | " + " | ".join(contenders) + " |", "|---|---|" + "---:|" * len(contenders)]
    pairs = advantages(results)
    for work in dict.fromkeys(same_work(result) for result in results):
        block = {result.contender: (result, ratio) for result, ratio in pairs if same_work(result) == work}
        first = next(iter(block.values()))[0]
        cells = [_cell(*block[name]) if name in block else "" for name in contenders]
        lines.append(f"| {_where(first)} | {first.scenario.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _where(result: Result) -> str:
    return result.nic if result.memory == "registered" else f"{result.nic}, {result.memory}"


def _cell(result: Result, ratio: float | None) -> str:
    if result.gbytes_per_s is None:
        return "–"  # noqa: RUF001 - a dash, as tables have it
    if result.scenario.latency:
        text = f"{format_rate(result.us_p50 or 0)} µs"
    elif result.page_bytes < 8192:
        text = f"{format_rate(result.mops or 0)} M/s"
    else:
        text = f"{format_rate(result.gbytes_per_s)} GB/s"
    if result.verified is False:
        text += " (wrong data)"
    return text if ratio is None else f"{text} ({ratio:.2f} x)"


def notes(results: Sequence[Result]) -> list[str]:
    """Why some figures are missing, and what was measured: one line each."""
    lines = []
    for result in results:
        if result.gbytes_per_s is None:
            line = f"{result.contender}, {result.nic}: {result.note}"
            if line not in lines:
                lines.append(line)
    for result in results:
        if result.version and result.version not in lines:
            lines.append(result.version)
    return lines


def _figures(result: Result) -> list[str | Text]:
    latency = result.scenario.latency
    verified = Text("yes", style="green") if result.verified else Text("NO", style="bold red")
    if result.verified is None:
        verified = Text("not checked", style="dim")
    return [
        "" if latency else format_rate(result.gbytes_per_s or 0),
        "" if latency else format_rate(result.mops or 0),
        format_rate(result.us_p50 or 0),
        format_rate(result.us_p99 or 0),
        verified,
    ]


def _ratio(ratio: float | None) -> str | Text:
    if ratio is None:
        return ""
    return Text(f"{ratio:.2f} x", style="green" if ratio >= 0.95 else "yellow")
