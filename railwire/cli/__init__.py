"""The command `railwire`. What a command needs beyond its options it imports when it runs."""

from __future__ import annotations

import typer

from railwire.cli import bench, serve
from railwire.cli.demo import demo
from railwire.cli.doctor import doctor

app = typer.Typer(no_args_is_help=True, help="Point-to-point transfers for LLM systems, over whatever NIC there is.")
app.command()(doctor)
app.command()(demo)
app.add_typer(bench.app, name="bench")
app.add_typer(serve.app, name="serve")


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
