"""libfabric as it was found: what was tried, which providers it has, and why an expected one is missing."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from railwire.doctor.report import Attempt, Libfabric, MissingProvider, Provider
from railwire.topology.sysfs import PciDevice, RdmaDevice, entries

AMAZON = 0x1D0F
_EFA_DEVICES = range(0xEFA0, 0xEFB0)
_IRRELEVANT = ("net", "sockets", "udp")  # offered wherever tcp is, and worse


def libfabric(
    probe: Mapping[str, Any],
    root: Path,
    rdma: Sequence[RdmaDevice],
    pci: Sequence[PciDevice],
    environ: Mapping[str, str],
) -> Libfabric:
    """Puts the answer of ``_native.libfabric_probe()`` in order and explains what is not in it."""
    domains: dict[tuple[str, str, str], list[str]] = {}
    for one in probe["providers"]:
        if one["kind"] not in _IRRELEVANT:
            place = domains.setdefault((one["name"], one["kind"], one["version"]), [])
            if one["domain"] not in place:
                place.append(one["domain"])
    return Libfabric(
        path=probe["library"],
        version=probe["version"],
        error=probe["error"],
        attempts=tuple(Attempt(one["path"], one["found"], one["version"], one["error"]) for one in probe["attempts"]),
        providers=tuple(Provider(*key, tuple(names)) for key, names in domains.items()),
        missing=tuple(_missing(probe, root, rdma, pci, environ)),
    )


def _missing(
    probe: Mapping[str, Any],
    root: Path,
    rdma: Sequence[RdmaDevice],
    pci: Sequence[PciDevice],
    environ: Mapping[str, str],
) -> list[MissingProvider]:
    kinds = {one["kind"] for one in probe["providers"]}
    found = []
    for name in ("tcp", "efa"):
        if name in kinds:
            continue
        if not probe["library"]:
            why, remedy = (
                "no libfabric could be opened",
                "pip install 'railwire[libfabric]', or name one in RAILWIRE_LIBFABRIC",
            )
        elif name == "efa":
            why, remedy = _why_no_efa(root, rdma, pci)
        else:
            why, remedy = "this libfabric was built without it", "pip install 'railwire[libfabric]'"
        if probe["library"] and (chosen := environ.get("FI_PROVIDER")):
            why, remedy = f"FI_PROVIDER={chosen} may hide it; otherwise: {why}", remedy or "unset FI_PROVIDER to see"
        found.append(MissingProvider(name, why, remedy))
    return found


def _why_no_efa(root: Path, rdma: Sequence[RdmaDevice], pci: Sequence[PciDevice]) -> tuple[str, str]:
    installer = "run the EFA installer (aws-efa-installer), which brings driver, rdma-core and libfabric"
    if any(one.pci is not None and one.pci.vendor == AMAZON for one in rdma):
        return _why_no_access(root, "libefa.so.1") or ("this libfabric was built without it", installer)
    if any(one.vendor == AMAZON and one.device in _EFA_DEVICES for one in pci):
        return "there is an EFA device on the PCI bus, but the kernel module efa does not drive it", installer
    return "this machine has no EFA device", ""


def _why_no_access(root: Path, library: str) -> tuple[str, str] | None:
    """What commonly keeps a process from a device that is there; None: none of that."""
    if not any(entry.name.startswith("uverbs") for entry in entries(root / "dev/infiniband")):
        return "/dev/infiniband has no uverbs devices", "modprobe ib_uverbs; in a container: --device=/dev/infiniband"
    for name in ("libibverbs.so.1", library):
        try:
            ctypes.CDLL(name)
        except OSError:
            return f"{name} cannot be opened", "install rdma-core (Debian, Ubuntu: ibverbs-providers)"
    return None
