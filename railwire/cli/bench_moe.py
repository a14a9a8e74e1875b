"""`railwire bench moe`: dispatch and combine on this machine, next to torch's all-to-all."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

_NICS = typer.Option([], "--nic", help="NIC of the engines, tcp://127.0.0.1 or shm; repeatable; default: automatic.")


def moe(
    against: str = typer.Option("", "--against", help="all_to_all: torch.distributed.all_to_all_single over gloo."),
    ranks: int = typer.Option(4, "--ranks", min=1, max=64, help="Processes."),
    tokens: int = typer.Option(128, "--tokens", min=1, help="Of each rank."),
    hidden: int = typer.Option(2048, "--hidden", min=1, help="Channels, bfloat16."),
    experts: int = typer.Option(32, "--experts", min=1, help="Of all ranks together."),
    top_k: int = typer.Option(8, "--top-k", min=1, help="Experts of a token."),
    rounds: int = typer.Option(30, "--rounds", min=3, help="Measured rounds, the contenders in turns."),
    seed: int = typer.Option(1, "--seed", help="Of tokens and routes."),
    nic: list[str] = _NICS,
    proxy: bool = typer.Option(False, "--proxy", help="Instead: from a word to the last posted write, on a null NIC."),
) -> None:
    """Times dispatch and combine between processes of this host: of each round the slowest rank, of all rounds the
    median. Both contenders move the same rows; what they deliver is compared."""
    if proxy:
        _proxy(Console())
        return
    from railwire.bench.moe_bench import BenchFailed, run

    if against not in ("", "all_to_all"):
        raise typer.BadParameter(f"{against!r} is not all_to_all", param_hint="--against")
    if top_k > experts:
        raise typer.BadParameter("more experts per token than there are", param_hint="--top-k")
    console = Console()
    try:
        measured = run(
            ranks=ranks, rounds=rounds, tokens=tokens, hidden=hidden, experts=experts, top_k=top_k, seed=seed, nics=nic,
            against=bool(against),
        )  # fmt: skip
    except BenchFailed as error:
        console.print(f"The benchmark failed: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    table = Table(title=f"{ranks} ranks, {tokens} tokens each, top-{top_k} of {experts}, {hidden} channels, bfloat16")
    for column in ("contender", "dispatch, ms", "combine, ms", "together, ms"):
        table.add_column(column, justify="right")
    for name, (dispatch, combine) in measured.seconds.items():
        together = f"{(dispatch + combine) * 1e3:.2f}"
        table.add_row(name, f"{dispatch * 1e3:.2f}", f"{combine * 1e3:.2f}", together)
    console.print(table)
    if against:
        ours, theirs = (sum(measured.seconds[name]) for name in ("railwire", "all_to_all"))
        console.print(f"railwire is {theirs / ours:.2f} x as fast; rows equal: {measured.equal}", highlight=False)
        if not measured.equal:
            raise typer.Exit(1)


def _proxy(console: Console) -> None:
    from railwire.bench.moe_proxy import measure

    table = Table(title="Host proxy of a dispatch: T = 128, H = 7168, top-8, fp8; simulated NIC that completes at once")
    for column in ("ranks", "least, us", "p50, us", "p99, us", "completed, p50, us"):
        table.add_column(column, justify="right")
    for ranks in (8, 16, 32, 64):
        times = measure(ranks)
        row = (times.least, times.p50, times.p99, times.ended)
        table.add_row(str(ranks), *(f"{value:.2f}" for value in row))
    console.print(table)
