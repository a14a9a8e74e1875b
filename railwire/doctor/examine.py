"""Gathers the report: reads, asks libfabric, tries what can be tried."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from railwire import __version__, _native, handshake, topology, wire
from railwire.doctor import gpu_paths, libraries, limits, pitfalls, verbs
from railwire.doctor.report import GpuFacts, Pairing, Plan, Report
from railwire.errors import ConfigurationError
from railwire.topology import gpus as gpu_lists
from railwire.topology import select, sysfs
from railwire.topology.gpus import Gpu

_SMI_QUERY = ("nvidia-smi", "--query-gpu=pci.bus_id,name,uuid", "--format=csv,noheader")


def examine(
    root: Path = sysfs.ROOT,
    probe: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    tcp_host: str | None = None,
) -> Report:
    """Examines this machine, or the one whose file system is at ``root``.

    Args:
        root: of the file system.
        probe: what libfabric and libibverbs offer, as from ``topology.ask_libraries()``; None: they are asked.
        environ: environment variables; None: this process's.
        tcp_host: where a tcp NIC would listen; None: it is looked up.
    """
    here = root == sysfs.ROOT
    allowed = limits.examine(root)  # forks, so it comes before libraries that may start threads
    environ = dict(os.environ if environ is None else environ)
    probe = topology.ask_libraries() if probe is None else probe
    tcp_host = topology.default_address() if tcp_host is None else tcp_host
    order = gpu_lists.driver_order if here else None
    found = gpu_lists.gpus(root) or (_from_nvidia_smi() if here else [])
    visible = gpu_lists.cuda_order(found, environ, order)
    interfaces = sysfs.net_interfaces(root, sysfs.first_ipv4 if here else lambda _: None)
    rdma = sysfs.rdma_devices(root)
    pci = sysfs.pci_devices(root)
    libfabric = libraries.libfabric(probe, root, rdma, pci, environ)
    direct = verbs.verbs(probe.get("verbs", {}), root, rdma, pci)
    gpus = tuple(_gpu_facts(gpu, visible) for gpu in found)
    pairings = tuple(
        Pairing(gpu.address, device.name, select.distance(gpu.pci, device.pci)[0].name.lower())
        for gpu in found
        for device in rdma
    )
    paths = gpu_paths.try_all(range(len(visible))) if here and visible and not _native.gpu_driver() else ()
    plans = tuple(
        _plan(device, lambda name: topology.plan(name, probe, root, tcp_host, environ=environ, driver_order=order))
        for device in ("cpu", *(f"cuda:{number}" for number in range(len(visible))))
    )
    return Report(
        version=__version__,
        host=platform.node(),
        kernel=platform.release(),
        cores=len(os.sched_getaffinity(0)),
        interfaces=tuple(interfaces),
        rdma_devices=tuple(rdma),
        libfabric=libfabric,
        verbs=direct,
        gpus=gpus,
        gpu_driver=sysfs.read_text(root / "proc/driver/nvidia/version").partition("\n")[0],
        gpu_paths=paths,
        pairings=pairings,
        limits=allowed,
        plans=plans,
        pitfalls=(
            *pitfalls.library(libfabric),
            *pitfalls.rdma(rdma, allowed),
            *verbs.pitfalls(direct),
            *pitfalls.gpus(gpus, paths, rdma, pairings, root),
            *pitfalls.machine(allowed, root, environ),
            *pitfalls.network(interfaces, tcp_host),
        ),
        usable=any(plan.nics for plan in plans),
    )


def _gpu_facts(gpu: Gpu, visible: Sequence[Gpu]) -> GpuFacts:
    numbers = [number for number, other in enumerate(visible) if other.address == gpu.address]
    return GpuFacts(
        device=f"cuda:{numbers[0]}" if numbers else "",
        address=gpu.address,
        name=gpu.name,
        uuid=gpu.uuid,
        numa=gpu.pci.numa if gpu.pci else sysfs.UNKNOWN_NUMA,
    )


def _from_nvidia_smi() -> list[Gpu]:
    """For machines whose driver shows itself nowhere else (WSL)."""
    try:
        answer = subprocess.run(_SMI_QUERY, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    addresses = [(gpu_lists.normal_address(row[0]), row) for row in rows if len(row) == 3]
    return [Gpu(address, row[1], row[2], sysfs.pci_device(address)) for address, row in addresses]


def _plan(device: str, choose: Callable[[str], list[str]]) -> Plan:
    try:
        nics = choose(device)
    except ConfigurationError as error:
        return Plan(device, (), (), (), (), str(error))
    return Plan(
        device=device,
        nics=tuple(nics),
        same_process=_used(nics, "here", 1),
        same_host=_used(nics, "here", 2),
        other_host=_used(nics, "elsewhere", 2),
        error="",
    )


def _used(nics: Sequence[str], host: str, pid: int) -> tuple[str, ...]:
    """Which of its NICs an engine uses towards an engine with the same ones: the handshake decides."""
    ours, theirs = _address(nics, "here", 1), _address(nics, host, pid)
    try:
        return tuple(nics[own] for own, _ in handshake.plan_pairs(ours, theirs))
    except ConfigurationError:
        return ()


def _address(nics: Sequence[str], host: str, pid: int) -> wire.Address:
    ends = tuple(wire.NicAddress(kind_of(name), name, b"") for name in nics)
    return wire.Address(wire.VERSION, bytes(16), "", host, pid, 0, ends)


def kind_of(nic: str) -> str:
    """The kind (``NicInfo.kind``) of a NIC with this name: ``libfabric:verbs;ofi_rxm:mlx5_0`` is ``verbs-ofi``."""
    first, _, rest = nic.partition(":")
    if rest.startswith("verbs;"):
        return "verbs-ofi"  # does not understand the verbs NIC
    kind = rest.partition(":")[0].partition(";")[0] if first == "libfabric" else first
    return f"libfabric-{kind}" if first == "libfabric" and kind in ("shm", "tcp") else kind
