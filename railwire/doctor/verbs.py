"""libibverbs and its devices as they were found, and why a verbs NIC is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from railwire.doctor.report import MissingProvider, Pitfall, Verbs, VerbsDevice, VerbsGid, VerbsPort
from railwire.topology.sysfs import PciDevice, RdmaDevice, entries

AMAZON = 0x1D0F
_MELLANOX = 0x15B3
_NETWORK = 0x02  # PCI class


def verbs(probe: Mapping[str, Any], root: Path, rdma: Sequence[RdmaDevice], pci: Sequence[PciDevice]) -> Verbs:
    """Puts the answer of ``_native.verbs_probe()`` in order and explains what is not in it."""
    devices = tuple(
        VerbsDevice(
            name=one["name"],
            hardware=one["hardware"],
            dmabuf=one["dmabuf"],
            error=one["error"],
            ports=tuple(
                VerbsPort(
                    number=port["number"],
                    state=port["state"],
                    link_layer=port["link_layer"],
                    mtu=port["mtu"],
                    link_gbps=port["link_gbps"],
                    lid=port["lid"],
                    chosen_gid=port["chosen_gid"],
                    gids=tuple(VerbsGid(gid["index"], gid["gid"], gid["type"], gid["netdev"]) for gid in port["gids"]),
                )
                for port in one["ports"]
            ),
        )
        for one in probe.get("devices", ())
    )
    found = Verbs(probe.get("library", ""), probe.get("error", ""), devices, None)
    if any(not device.error for device in devices):
        return found
    why, remedy = _why_none(found, root, rdma, pci)
    return Verbs(found.path, found.error, devices, MissingProvider("verbs", why, remedy))


def pitfalls(found: Verbs) -> list[Pitfall]:
    """Devices that an engine could not open, with the remedy that opening them would name."""
    return [
        Pitfall("warning", device.error.partition(";")[0], device.error.partition(";")[2].strip() or "see docs/nics.md")
        for device in found.devices
        if device.error
    ]


def _why_none(found: Verbs, root: Path, rdma: Sequence[RdmaDevice], pci: Sequence[PciDevice]) -> tuple[str, str]:
    devices = [one for one in rdma if one.pci is None or one.pci.vendor != AMAZON]
    if devices:
        if not any(one.active for one in devices):
            return "no RDMA device has an active port", "check cables and `rdma link`"
        if not any(entry.name.startswith("uverbs") for entry in entries(root / "dev/infiniband")):
            return (
                "/dev/infiniband has no uverbs devices",
                "modprobe ib_uverbs; in a container: --device=/dev/infiniband",
            )
        if not found.path:
            return found.error or "libibverbs cannot be opened", "install rdma-core (ibverbs-providers)"
        return "libibverbs shows none that can be used", "install the provider of the device (ibverbs-providers)"
    if any(one.vendor == _MELLANOX and one.pci_class >> 16 == _NETWORK for one in pci):
        return (
            "there is a Mellanox NIC, but /sys/class/infiniband does not show it",
            "modprobe mlx5_ib ib_uverbs",
        )
    return "this machine has no RDMA device", ""
