"""`railwire weights`: what an update would take on a cluster that is not here."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

_PLOT = typer.Option(None, "--plot", help="Write a picture to this PNG file.")

app = typer.Typer(no_args_is_help=True, help="RL weight updates: docs/weights.md.")


@app.callback()
def weights() -> None:
    """RL weight updates: docs/weights.md."""


@app.command()
def simulate(
    model: str = typer.Option("kimi-k2", "--model", help="kimi-k2, deepseek-v3 or qwen3-235b."),
    trainers: int = typer.Option(256, "--trainers", min=1, help="Trainer GPUs."),
    inference: int = typer.Option(128, "--inference", min=1, help="Inference GPUs."),
    nic_gbps: float = typer.Option(400.0, "--nic-gbps", min=0.1, help="Bandwidth of a NIC, each way."),
    nics_per_gpu: int = typer.Option(1, "--nics-per-gpu", min=1, max=16),
    fp8: bool = typer.Option(True, "--fp8/--bf16", help="What the receivers hold."),
    watermark_gb: float = typer.Option(4.0, "--watermark-gb", min=0.1, help="Made but not yet written, per trainer."),
    own_gather: bool = typer.Option(
        False, "--own-gather", help="Gather only where a shard cuts fp8 blocks; else every tensor, as the paper does."
    ),
    plot: Path | None = _PLOT,
    json: bool = typer.Option(False, "--json", help="One JSON object instead of the table."),
) -> None:
    """Plans an update of a published model for real, and plays it over a network model.

    The stages cost what the TransferEngine paper measured on H200; see railwire.weights.simulate."""
    import msgspec

    from railwire.weights import simulate as simulation
    from railwire.weights.errors import PlanError
    from railwire.weights.models import MODELS, default_layout, receiver_tables, trainer_tables
    from railwire.weights.plan import compute

    console = Console(stderr=json)
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}", param_hint="--model")
    shape = MODELS[model]
    layout = default_layout(shape, trainers, inference)
    try:
        sources, destinations = trainer_tables(shape, layout), receiver_tables(shape, layout, fp8=fp8)
        began = time.process_time()
        plan = compute(sources, destinations)
    except PlanError as error:
        console.print(f"railwire: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None
    planned = time.process_time() - began
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    descriptors = max(len(table.encode()) for table in (*sources, *destinations))
    costs = simulation.Costs(gather_always=not own_gather)
    found = simulation.simulate(
        plan, nic_gbps=nic_gbps, nics_per_gpu=nics_per_gpu, costs=costs, watermark=int(watermark_gb * 1e9)
    )
    if plot is not None:
        title = f"{model}: {found.nbytes / 1e12:.2f} TB from {trainers} to {inference} GPUs in {found.seconds:.2f} s"
        simulation.plot(found, title, plot)
    if json:
        figures = {
            "model": model, "trainers": trainers, "inference": inference, "nic_gbps": nic_gbps,
            "nics_per_gpu": nics_per_gpu, "seconds": found.seconds, "ideal_seconds": found.ideal,
            "stages": found.stages, "bytes": found.nbytes, "work_requests": found.work_requests,
            "sent_peak": found.sent_peak, "received_peak": found.received_peak, "plan_cpu_seconds": planned,
            "plan_gbytes": gigabytes, "largest_table_bytes": descriptors, "digest": plan.digest.hex(),
        }  # fmt: skip
        print(msgspec.json.encode(figures).decode())
        return
    table = Table(title=f"{model}: {trainers} trainers to {inference} inference GPUs", show_header=False)
    share = found.seconds / found.ideal - 1
    for name, value in (
        ("layout", ", ".join(f"{k} {v}" for k, v in layout._asdict().items() if k not in ("trainers", "receivers"))),
        ("until the version is visible", f"{found.seconds:.3f} s"),
        ("bytes over bandwidth", f"{found.ideal:.3f} s; {share:.0%} above it"),
        ("last unit made after", f"{found.made:.3f} s"),
        ("stages, busiest trainer", ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in found.stages.items())),
        ("bytes", f"{found.nbytes / 1e12:.3f} TB in {found.work_requests / 1e6:.1f} M work requests"),
        ("most loaded NIC over the mean", f"sending {found.sent_peak:.3f}, receiving {found.received_peak:.3f}"),
        ("planning", f"{planned:.1f} s of one core, {gigabytes:.1f} GB, {len(plan.batches)} batches"),
        ("largest table of a rank", f"{descriptors / 1e3:.0f} kB"),
        ("plan", plan.digest.hex()),
    ):
        table.add_row(name, value)
    console.print(table)
