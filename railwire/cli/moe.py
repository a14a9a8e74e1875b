"""`railwire moe`: what an expert-parallel group needs and how long it would take."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Mixture-of-experts dispatch and combine: sizes and times by formula.")
_RANKS = (8, 16, 32, 64, 128)
_PLOT = typer.Option(None, "--plot", help="Write a picture there.")


@app.command()
def model(
    nic: str = typer.Option("cx7", "--nic", help="cx7 or efa."),
    tokens: int = typer.Option(128, "--tokens", min=1, help="Of each rank; published figures are of 128 and 4096."),
    proxy_us: float = typer.Option(..., "--proxy-us", min=0, help="Flag to last write posted, measured."),
    pack_us: float = typer.Option(..., "--pack-us", min=0, help="scripts/moe-gpu.py: pack fp8."),
    unpack_us: float = typer.Option(..., "--unpack-us", min=0, help="scripts/moe-gpu.py: unpack fp8."),
    gather_us: float = typer.Option(..., "--gather-us", min=0, help="scripts/moe-gpu.py: combine pack."),
    reduce_us: float = typer.Option(..., "--reduce-us", min=0, help="scripts/moe-gpu.py: combine reduce."),
    plot: Path | None = _PLOT,
) -> None:
    """Lower bound, ours predicted from measured pieces, and what pplx-garden and DeepEP publish, by number of ranks.
    Eight ranks a node, hidden 7168, top-8 of 256 experts, fp8 dispatch, bfloat16 combine."""
    from railwire.moe import model as formulas

    if nic not in ("cx7", "efa"):
        raise typer.BadParameter(f"{nic!r} is not cx7 or efa", param_hint="--nic")
    chosen = formulas.NICS[nic]
    parts = formulas.fixed(proxy_us, pack_us, unpack_us, gather_us, reduce_us)
    predictions = formulas.predict(tokens, _RANKS, chosen, parts)
    console = Console()
    table = Table(title=f"us, dispatch / combine; T = {tokens}, {chosen.name} ({chosen.gigabytes:g} GB/s a rank)")
    for column in ("ranks", "lower bound", "ours, flat", "ours, per node", *formulas.PUBLISHED):
        table.add_column(column, justify="right")
    for p in predictions:
        cells = [p.bound, p.flat, p.per_node, *(p.published.get(name) for name in formulas.PUBLISHED)]
        table.add_row(str(p.ranks), *("-" if cell is None else f"{cell[0]:.0f} / {cell[1]:.0f}" for cell in cells))
    console.print(table)
    for part in parts:
        console.print(f"{part.name}: {part.dispatch:g} / {part.combine:g} us ({part.source})", highlight=False)
    if plot is not None:
        formulas.plot(predictions, tokens, chosen, plot)
        console.print(f"Picture: {plot}", soft_wrap=True, markup=False)


@app.command()
def memory(
    ranks: int = typer.Option(64, "--ranks", min=1),
    experts: int = typer.Option(256, "--experts", min=1),
    hidden: int = typer.Option(7168, "--hidden", min=1),
    tokens: int = typer.Option(128, "--tokens", min=1),
    top_k: int = typer.Option(8, "--top-k", min=1),
    fp8: bool = typer.Option(True, help="Tokens travel as fp8."),
) -> None:
    """Registered memory of one rank."""
    import dataclasses

    from railwire.moe import Geometry, MoeConfig
    from railwire.moe.graph_sizes import GraphSizes

    config = MoeConfig(ranks=ranks, experts=experts, hidden=hidden, max_tokens=tokens, top_k=top_k, fp8=fp8)
    g = Geometry(config)
    most = GraphSizes.of(config)
    few = GraphSizes.of(dataclasses.replace(config, slot_rows=g.first_slot_rows))
    table = Table(title=f"EP{ranks}: registered memory of a rank")
    table.add_column("region")
    table.add_column("MB", justify="right")
    for name, size in (
        ("dispatch, receive", g.dispatch_region),
        ("dispatch, send", g.dispatch_send_region),
        ("combine, receive", g.combine_region),
        ("combine, send", g.combine_send_region),
        ("together", g.registered_bytes),
        (f"for CUDA graphs, slots of {most.slot_rows} rows (all that can come)", most.registered),
        (f"for CUDA graphs, slots of {few.slot_rows} rows", few.registered),
    ):
        table.add_row(name, f"{size / 1e6:.1f}")
    Console().print(table)
