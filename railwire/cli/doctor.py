"""`railwire doctor`: what this machine offers, what an engine would use, and what stands in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.table import Table

    from railwire.doctor import Report

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the tables.")] = False,
) -> None:
    """Says what this machine offers, what an engine would use, and what stands in the way.

    Ends with status 1 if there is no NIC that an engine can use. The terms are explained in docs/nics.md.
    """
    import msgspec

    from railwire.doctor import examine

    report = examine()
    if json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        from rich.console import Console

        show(report, Console(highlight=False))
    if not report.usable:
        raise typer.Exit(1)


def show(report: Report, console: Console) -> None:
    """Prints the report for people."""
    console.print(
        f"[bold]Railwire {report.version}[/] on {report.host}, Linux {report.kernel}, {report.cores} cores"
        + (", in a container" if report.limits.container else "")
    )
    console.print(_interfaces(report))
    console.print(_rdma(report) if report.rdma_devices else "RDMA devices: none in /sys/class/infiniband.")
    if report.verbs.devices:
        console.print(_verbs(report))
    console.print(
        f"libibverbs: {report.verbs.path or 'none'}" + (f" ({report.verbs.error})" if report.verbs.error else ""),
        markup=False,
    )
    console.print(_attempts(report))
    console.print(_providers(report))
    _show_gpus(report, console)
    console.print(_limits(report))
    console.print(_plans(report))
    if not report.pitfalls:
        console.print("[green]No known pitfalls found.[/]")
        return
    console.print("\n[bold]Pitfalls found[/]")
    for pitfall in report.pitfalls:
        console.print(f"{pitfall.severity}: ", style=_COLOURS[pitfall.severity], end="")
        console.print(pitfall.what, markup=False)
        console.print(f"  -> {pitfall.remedy}", style="dim", markup=False)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # texts of other libraries: no markup in them
    return table


def _interfaces(report: Report) -> Table:
    return _table(
        "Network interfaces",
        ("name", "state", "addresses", "MTU", "Gbit/s", "NUMA", "PCI"),
        (
            (
                one.name,
                one.state,
                "\n".join(one.addresses),
                str(one.mtu or "?"),
                _speed(one.link_gbps),
                _numa(one.pci.numa if one.pci else -1),
                one.pci.address if one.pci else "virtual",
            )
            for one in report.interfaces
        ),
    )


def _rdma(report: Report) -> Table:
    return _table(
        "RDMA devices",
        ("name", "port", "link", "Gbit/s", "interfaces", "NUMA", "PCI", "driver"),
        (
            (
                one.name,
                "active" if one.active else "not active",
                one.link_layer,
                _speed(one.link_gbps),
                " ".join(one.interfaces),
                _numa(one.pci.numa if one.pci else -1),
                one.pci.address if one.pci else "software",
                one.pci.driver if one.pci else "",
            )
            for one in report.rdma_devices
        ),
    )


def _verbs(report: Report) -> Table:
    return _table(
        'Verbs devices, as nics=["verbs:DEVICE"] opens them',
        ("device", "port", "state", "link", "Gbit/s", "MTU", "GIDs (* is taken)", "dma-buf"),
        (
            (
                device.name,
                str(port.number),
                port.state,
                port.link_layer + (f", LID {port.lid}" if port.link_layer == "InfiniBand" else ""),
                _speed(port.link_gbps),
                str(port.mtu),
                "\n".join(
                    f"{'*' if gid.index == port.chosen_gid else ' '}{gid.index}: {gid.gid} {gid.type}".rstrip()
                    for gid in port.gids
                ),
                "yes" if device.dmabuf else "no",
            )
            for device in report.verbs.devices
            for port in device.ports
        ),
    )


def _attempts(report: Report) -> Table:
    return _table(
        "libfabric, in the order tried",
        ("file", "result"),
        (
            (one.path, f"in use: version {one.version}" if one.found else one.error.removeprefix(f"{one.path}: "))
            for one in report.libfabric.attempts
        ),
    )


def _providers(report: Report) -> Table:
    found = (
        (one.name, one.version, " ".join(one.domains[:8]) + (" ..." if len(one.domains) > 8 else ""))
        for one in report.libfabric.providers
    )
    missing = (
        (one.name, "not found", one.why + (f"\n-> {one.remedy}" if one.remedy else ""))
        for one in (*report.libfabric.missing, *([report.verbs.missing] if report.verbs.missing else []))
    )
    return _table("Providers", ("provider", "version", "devices, or why there are none"), (*found, *missing))


def _show_gpus(report: Report, console: Console) -> None:
    if not report.gpus:
        console.print("GPUs: none found, neither in /proc/driver/nvidia nor on the PCI bus.")
        return
    console.print(
        _table(
            "GPUs",
            ("device", "model", "NUMA", "PCI", "RDMA NICs by distance"),
            (
                (
                    one.device or "hidden",
                    one.name or "?",
                    _numa(one.numa),
                    one.address,
                    _by_distance(report, one.address),
                )
                for one in report.gpus
            ),
        )
    )
    console.print(report.gpu_driver or "No NVIDIA driver is loaded.", style="dim", markup=False)
    if report.gpu_paths:
        console.print(_gpu_paths(report))


def _gpu_paths(report: Report) -> Table:
    targets = sorted({path.target for path in report.gpu_paths}, key=lambda name: int(name[5:]))
    works = {(path.source, path.target): path.works for path in report.gpu_paths}
    rows = [(source, *("yes" if works[source, target] else "no" for target in targets)) for source in targets]
    return _table("GPU to GPU over shm, as tried by two processes", ("from", *targets), rows)


def _by_distance(report: Report, gpu: str) -> str:
    places: dict[str, list[str]] = {"switch": [], "host_bridge": [], "numa": [], "far": []}
    for pair in report.pairings:
        if pair.gpu == gpu:
            places[pair.distance].append(pair.nic)
    return "\n".join(f"{distance}: {' '.join(nics)}" for distance, nics in places.items() if nics) or "none"


def _limits(report: Report) -> Table:
    limits = report.limits
    cma, shared, huge = limits.cross_memory, limits.shared_memory, limits.huge_pages
    memlock = "unlimited" if limits.memlock_bytes is None else f"{limits.memlock_bytes >> 10} KiB"
    scope = "no Yama" if cma.ptrace_scope is None else f"ptrace_scope {cma.ptrace_scope}"
    return _table(
        "Limits",
        ("what", "value", "matters to"),
        (
            ("memlock", memlock, "RDMA NICs: they lock what is registered; not tcp and shm"),
            ("open files", str(limits.open_files or "unlimited"), "the number of peers: each takes some"),
            ("CMA (process_vm_readv)", f"{'works' if cma.works else cma.error} ({scope})", "shm: large writes"),
            ("/dev/shm", f"{shared.total_bytes >> 20} MiB, {shared.free_bytes >> 20} MiB free", "libfabric:shm alone"),
            (
                "huge pages",
                f"transparent: {huge.transparent or 'none'}, reserved: {huge.reserved}",
                "engine.allocate: large writes over shm",
            ),
        ),
    )


def _plans(report: Report) -> Table:
    return _table(
        'What TransferEngine(device, nics="auto") would use',
        ("device", "NICs", "peer in this process", "on this host", "on another host"),
        (
            (
                plan.device,
                "\n".join(plan.nics) or plan.error,
                "\n".join(plan.same_process) or "none",
                "\n".join(plan.same_host) or "none",
                "\n".join(plan.other_host) or "none",
            )
            for plan in report.plans
        ),
    )


def _speed(gbps: float) -> str:
    return f"{gbps:g}" if gbps else "?"


def _numa(node: int) -> str:
    return "?" if node < 0 else str(node)
