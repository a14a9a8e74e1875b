"""The command `railwire`. What a command needs beyond its options it imports when it runs."""

from __future__ import annotations

import typer

from railwire.cli import bench, moe, serve, weights
from railwire.cli.bench_moe import moe as bench_moe
from railwire.cli.demo import demo
from railwire.cli.demo_moe import moe as demo_moe
from railwire.cli.demo_weights import weights as demo_weights
from railwire.cli.doctor import doctor

app = typer.Typer(no_args_is_help=True, help="Point-to-point transfers for LLM systems, over whatever NIC there is.")
app.command()(doctor)
demos = typer.Typer(invoke_without_command=True, help="Runs a real model, and kills one of its processes.")
demos.callback()(demo)
demos.command("moe")(demo_moe)
demos.command("weights")(demo_weights)
app.add_typer(demos, name="demo")
bench.app.command("moe")(bench_moe)
app.add_typer(bench.app, name="bench")
app.add_typer(moe.app, name="moe")
app.add_typer(serve.app, name="serve")
app.add_typer(weights.app, name="weights")


def _print_version(wanted: bool) -> None:
    if wanted:
        from railwire import __version__

        typer.echo(f"railwire {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Point-to-point transfers for LLM systems, over whatever NIC there is."""
