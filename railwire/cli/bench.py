"""`railwire bench`: how fast, here, next to whom."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from railwire.bench import scenarios
from railwire.bench.work import OPS, PATTERNS

if TYPE_CHECKING:
    from railwire.bench.measure import Result

app = typer.Typer(no_args_is_help=True, help="Measure transfers on this machine.")


def _names(text: str, allowed: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in allowed:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(allowed)}", param_hint=option)
    return names


def _device(text: str, option: str) -> str:
    from railwire.topology import parse_device

    try:
        parse_device(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    return text


def _cpus(text: str) -> tuple[int, ...]:
    if text in ("", "none"):
        return ()
    try:
        cpus = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter("two core numbers such as 0,1, or none", param_hint="--cpus") from None
    if len(cpus) != 2:
        raise typer.BadParameter("one core for each of the two processes, such as 0,1", param_hint="--cpus")
    missing = [cpu for cpu in cpus if cpu not in os.sched_getaffinity(0)]
    if missing:
        raise typer.BadParameter(f"this process may not use core {missing[0]}", param_hint="--cpus")
    return cpus


def _default_cpus() -> str:
    usable = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, usable[:2])) if len(usable) >= 2 else "none"


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no width; the default would squeeze the table
    return console


@app.command()
def p2p(
    nic: Annotated[
        list[str] | None, typer.Option(help="tcp, shm, or any NIC that railwire doctor lists; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the sender's memory lies: cpu or cuda:N.")] = "cpu",
    peer_device: Annotated[str | None, typer.Option(help="Where the receiver's lies; without it as --device.")] = None,
    op: Annotated[str | None, typer.Option(help=f"One of {', '.join(OPS)}. Without it: a sweep.")] = None,
    page_bytes: Annotated[int | None, typer.Option(help="Bytes of a page, a write or a message.")] = None,
    pages: Annotated[int | None, typer.Option(help="Pages of one submission.")] = None,
    rounds: Annotated[int, typer.Option(help="Submissions per measured run; 0: as many as fill --seconds.")] = 0,
    pattern: Annotated[str, typer.Option(help=f"Order of the pages: {' or '.join(PATTERNS)}.")] = "random",
    window: Annotated[int | None, typer.Option(help="Submissions in flight at most.")] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Also measure plain; from a checkout also raw, raw-landed, perftest, fi_rma_bw, nixl, mooncake."
        ),
    ] = "",
    listen: Annotated[
        str | None,
        typer.Option(help="HOST[:PORT] to wait at for --connect from another host, until it is interrupted."),
    ] = None,
    connect: Annotated[str | None, typer.Option(help="HOST[:PORT] of `--listen`: the receiver is there.")] = None,
    secret: Annotated[str, typer.Option(help="A word that both sides of --listen and --connect give.")] = "",
    peer_python: Annotated[
        Path | None, typer.Option(help="Python interpreter that has nixl and mooncake, if it is another one.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs per figure; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of one measured run.")] = 0.4,
    cpus: Annotated[
        str | None, typer.Option(help="Cores of receiver and sender, or none to leave that to the kernel.")
    ] = None,
    progress: Annotated[str, typer.Option(help="The engines' progress mode: adaptive or spin.")] = "adaptive",
    receivers: Annotated[int, typer.Option(min=1, help="Engines that a scatter writes to.")] = 4,
    copy_sms: Annotated[
        int | None, typer.Option(min=1, help="Multiprocessors of a GPU that the copy kernel may use; default 8.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Railwire's own: registered (any), or allocated (engine.allocate, which peers map).")
    ] = "registered",
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of the table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the figures to this PNG file.")] = None,
) -> None:
    """Moves data between two processes that it starts itself, checks every byte, and says how fast it was.

    --against plain,raw,nixl,mooncake measures the same work by a loop of sockets (or of memcpy), by a bare libfabric
    loop and by other engines, taking turns, in processes of their own. What is measured, and how fairly:
    docs/benchmarks.md.

    Between two hosts: `--listen 0.0.0.0` on one, with its --nic and --device if they are not the same, then
    `--connect HOST` on the other.
    """
    if listen is not None:
        _listen(listen, secret, nic or [], device, cpus)
        return
    from railwire.bench import report
    from railwire.bench.contender import Setting
    from railwire.bench.contenders import CONTENDERS, RIVALS, WHERE_RIVALS_ARE
    from railwire.bench.measure import Plan, run_plan
    from railwire.bench.quiet import busy_share
    from railwire.bench.remote import Host, check_reaches

    for rival in RIVALS:
        if rival not in CONTENDERS and rival in against.split(","):
            raise typer.BadParameter(f"{rival} {WHERE_RIVALS_ARE}", param_hint="--against")
    others = _names(against, tuple(name for name in CONTENDERS if name != "railwire"), "--against")
    devices = (_device(device, "--device"), _device(peer_device or device, "--peer-device"))
    if memory not in ("registered", "allocated"):
        raise typer.BadParameter(f"{memory!r} is not registered or allocated", param_hint="--memory")
    cores = _cpus(_default_cpus() if cpus is None else cpus)
    if op is None:
        if page_bytes or pages or window:
            raise typer.BadParameter(
                "name an --op to choose sizes; without one the sweep is measured", param_hint="--op"
            )
        chosen = scenarios.SWEEP if devices == ("cpu", "cpu") else scenarios.GPU_SWEEP
    else:
        try:
            chosen = (scenarios.single(op, page_bytes, pages, rounds, pattern, window),)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--op") from None
    setting = Setting(
        peer_python=str(peer_python or sys.executable),
        progress=progress,
        receivers=receivers if op == "scatter" else 1,
        devices=devices,
        copy_sms=copy_sms,
        memory=memory,
        two_hosts=connect is not None,
    )
    nics = nic or (["shm", "tcp"] if connect is None else ["auto"])
    peer: Host | None = None
    if connect is not None:
        try:
            peer = Host.parse(connect, secret)
            for one in nics:
                check_reaches(one)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--connect") from None
        setting = replace(setting, peer=peer.host)
    plans = [Plan(one, chosen, ("railwire", *others), repeats, seconds, cores, peer=peer) for one in nics]
    results: list[Result] = []
    console = _console(stderr=json)
    if (busy := busy_share()) > 0.1:
        console.print(f"This machine is busy ({busy:.0%} of its cores): figures will scatter.", style="yellow")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,  # no thread that wakes up on the measured cores
    ) as bar:
        task = bar.add_task("starting", total=sum(plan.steps for plan in plans))

        def step(what: str) -> None:
            bar.update(task, description=what, advance=1, refresh=True)

        def found(result: Result) -> None:
            if json:
                print(report.json_line(result), flush=True)

        for plan in plans:
            results += run_plan(plan, setting, step, found)
    if not json:
        console.print(report.table(results))
        for line in report.notes(results):
            console.print(line, style="dim", highlight=False)
    if plot is not None:
        _plot(results, plot, console)
    if any(result.verified is False for result in results if result.contender == "railwire"):
        console.print("[bold red]Data was not what it should be.[/]")
        raise typer.Exit(1)
    if all(result.gbytes_per_s is None for result in results if result.contender == "railwire"):
        raise typer.Exit(1)


def _listen(where: str, secret: str, nics: list[str], device: str, cpus: str | None) -> None:
    from railwire.bench.remote import Host, Listener

    try:
        address = Host.parse(where)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--listen") from None
    console = _console(stderr=True)
    try:
        listener = Listener(
            address.host, address.port, secret=secret, nics=nics, device="" if device == "cpu" else device,
            cpus=_cpus(cpus or "none")[:1], say=lambda text: console.print(text, style="dim", highlight=False),
        )  # fmt: skip
    except OSError as error:
        raise typer.BadParameter(f"cannot listen at {where}: {error}", param_hint="--listen") from None
    console.print(
        f"listening at {address.host} port {listener.port}; on the other host: railwire bench p2p --connect ..."
    )
    try:
        listener.serve()
    except KeyboardInterrupt:
        listener.close()


def _plot(results: list[Result], path: Path, console: Console) -> None:
    from railwire.bench.plot import plot

    try:
        plot(results, path)
    except ImportError:
        console.print("--plot needs matplotlib: pip install 'railwire\\[bench]'", style="yellow")
    except ValueError as error:
        console.print(f"no picture: {error}", style="yellow")


@app.command()
def show(
    files: Annotated[
        list[Path], typer.Argument(help="What `bench p2p --json` has printed.", exists=True, dir_okay=False)
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="A table for a README.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the figures to this PNG file.")] = None,
) -> None:
    """Shows results that were kept."""
    from railwire.bench import report

    results = [row for file in files for row in report.read_json_lines(file.read_text(encoding="utf-8").splitlines())]
    console = _console()
    if markdown:
        print(report.markdown(results))
    else:
        console.print(report.table(results))
        for line in report.notes(results):
            console.print(line, style="dim", highlight=False)
    if plot is not None:
        _plot(results, plot, console)


@app.command()
def engine(
    seconds: Annotated[float, typer.Option(min=0.05, help="Length of each measurement.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """The engine without a transport: on a simulated NIC that completes at once.

    Page work requests a second on one core, what one call of 100,000 pages costs, the time from a submission to its
    first post, and what an idle engine costs.
    """
    from railwire.bench import engine_bench

    figures = engine_bench.measure(seconds)
    if json:
        print(engine_bench.json_line(figures))
    else:
        Console().print(engine_bench.table(figures))


@app.command()
def weights(
    against: Annotated[
        str, typer.Option(help="Also measure these: engine, gloo, nixl; checkpoint-engine and vllm need a GPU.")
    ] = "engine,gloo",
    nic: Annotated[str, typer.Option(help="NIC of Railwire's engines.")] = "tcp://127.0.0.1",
    trainers: Annotated[int, typer.Option(min=1, max=8)] = 2,
    receivers: Annotated[int, typer.Option(min=1, max=2)] = 2,
    megabytes: Annotated[int, typer.Option(min=25, help="Size of the model in bf16.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Updates that are measured in each turn.")] = 5,
    turns: Annotated[int, typer.Option(min=1, help="How often the contenders take turns.")] = 2,
    peer_python: Annotated[Path | None, typer.Option(help="Python interpreter that has nixl, and railwire.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of the table.")] = False,
) -> None:
    """Weight updates from sharded trainers to tensor-parallel receivers: seconds until the version is visible at every
    receiver. `engine` is the bare engine writing as many bytes in one write a pair: the ceiling."""
    import msgspec
    from rich.table import Table

    from railwire.bench.weights_bench import NEEDS_GPU, RUN_HERE, measure, predict

    others = _names(against, (*RUN_HERE[1:], *NEEDS_GPU), "--against")
    console = _console(stderr=json)
    found = measure(
        ("railwire", *others), nic=nic, trainers=trainers, receivers=receivers, megabytes=megabytes, rounds=rounds,
        turns=turns, peer_python=str(peer_python or sys.executable),
        step=lambda name: console.print(f"measuring {name}", style="dim"),
    )  # fmt: skip
    if json:
        for one in found:
            print(msgspec.json.encode(one).decode())
    else:
        table = Table(title=f"{trainers} trainers to {receivers} receivers over {nic}")
        for column in ("contender", "model", "visible after", "GB/s", "times railwire's"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        base = found[0]
        for one in found:
            if one.problem:
                table.add_row(one.contender, "", one.problem, "", "")
                continue
            ratio = f"{one.median / base.median:.2f} x" if base.seconds else ""
            size = f"{one.nbytes / 1e6:.0f} MB"
            table.add_row(one.contender, size, f"{one.median * 1e3:.0f} ms", f"{one.gbytes_per_s:.2f}", ratio)
        console.print(table)
        engine = next((one for one in found if one.contender == "engine" and not one.problem), None)
        if engine is not None and base.seconds:
            seconds = predict(engine, trainers=trainers, receivers=receivers, megabytes=megabytes)
            console.print(
                f"The simulator gives railwire {seconds * 1e3:.0f} ms with the engine's bandwidth: measured is "
                f"{base.median / seconds:.2f} times as much."
            )
    if found[0].problem or found[0].right is False:
        console.print("[bold red]Railwire's update failed, or the weights were not what they should be.[/]")
        raise typer.Exit(1)
