"""Which NICs an engine with ``nics="auto"`` uses: the RDMA NICs nearest to its GPU, otherwise tcp; and shm."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from railwire.topology.sysfs import UNKNOWN_NUMA, PciDevice, RdmaDevice

_AMAZON = 0x1D0F

MAX_RDMA_NICS = 16
"""A write is striped over at most 16 NICs (docs/guarantees.md)."""


class Distance(enum.IntEnum):
    """How far two PCI devices are from each other, nearest first."""

    SWITCH = 0
    """Behind a common PCIe bridge or switch: traffic between them does not pass the processor."""
    HOST_BRIDGE = 1
    """On one root complex of the processor."""
    NUMA = 2
    """On one NUMA node."""
    FAR = 3
    """On different NUMA nodes, or unknown."""


@dataclass(frozen=True)
class Candidate:
    """An RDMA NIC that a library offers and the kernel shows."""

    spec: str
    """As ``nics=`` takes it."""
    device: RdmaDevice


def distance(one: PciDevice | None, other: PciDevice | None) -> tuple[Distance, int]:
    """How far two devices are apart; compares as nearer < farther.

    The second element tells places behind one switch apart: minus the number of bridges that both have in common. What
    counts is where the paths part, not how many bridges follow: a NIC with a bridge of its own (BlueField) is no
    farther away for it.
    """
    if one is None or other is None:
        return Distance.FAR, 0
    common = 0
    for ours, theirs in zip(one.path[:-1], other.path[:-1], strict=False):
        if ours != theirs:
            break
        common += 1
    if common >= 2:
        return Distance.SWITCH, -common
    known = one.numa != UNKNOWN_NUMA and other.numa != UNKNOWN_NUMA
    if common == 1 and (not known or one.numa == other.numa):
        return Distance.HOST_BRIDGE, 0
    if known and one.numa == other.numa:
        return Distance.NUMA, 0
    return Distance.FAR, 0


def rdma_candidates(probe: Mapping[str, Any], devices: Sequence[RdmaDevice]) -> list[Candidate]:
    """The RDMA NICs that can be used: all EFA devices (through libfabric), or where there is none all verbs NICs.

    Left out are devices without an active port and those without hardware (Soft-RoCE, which is slower than tcp): they
    can still be asked for by name.

    Args:
        probe: from :func:`railwire.topology.ask_libraries`.
        devices: from :func:`railwire.topology.sysfs.rdma_devices`.
    """
    by_name = {device.name: device for device in devices if device.active and device.pci is not None}
    efa: dict[str, Candidate] = {}
    verbs: dict[str, Candidate] = {}
    for provider in probe["providers"]:
        domain = provider["domain"]
        if provider["kind"] == "efa" and (device := by_name.get(domain.removesuffix("-rdm"))):
            efa.setdefault(device.name, Candidate(f"efa:{domain}", device))
    for offered in probe.get("verbs", {}).get("devices", ()):
        device = by_name.get(offered["name"])
        # EFA's devices are in libibverbs, too, but have no RC queue pairs.
        if device is not None and device.pci is not None and device.pci.vendor != _AMAZON and not offered["error"]:
            verbs[device.name] = Candidate(f"verbs:{device.name}", device)
    return sorted((efa or verbs).values(), key=_pci_order)


def _pci_order(candidate: Candidate) -> tuple[str, str]:
    pci = candidate.device.pci
    return (pci.address if pci else "", candidate.device.name)


def nearest(candidates: Sequence[Candidate], gpu: PciDevice | None) -> list[Candidate]:
    """All NICs that are equally near to the GPU, nearer than all others; of these the fastest."""
    if not candidates:
        return []
    distances = [distance(gpu, candidate.device.pci) for candidate in candidates]
    best = min(distances)
    return fastest([candidate for candidate, far in zip(candidates, distances, strict=True) if far == best])


def near_cores(
    candidates: Sequence[Candidate], nodes: Mapping[int, frozenset[int]], cores: frozenset[int]
) -> list[Candidate]:
    """For a process without a GPU: the NICs of the NUMA nodes it may run on; all if there are none or nobody knows."""
    own = {node for node, theirs in nodes.items() if theirs & cores}
    near = [one for one in candidates if one.device.pci is not None and one.device.pci.numa in own]
    return fastest(near or candidates)


def fastest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those of the highest link speed: a slower one (often for management or storage) would hold back every stripe."""
    top = max((candidate.device.link_gbps for candidate in candidates), default=0.0)
    return spread([candidate for candidate in candidates if candidate.device.link_gbps == top])


def spread(candidates: Sequence[Candidate], most: int = MAX_RDMA_NICS) -> list[Candidate]:
    """At most ``most`` of them, evenly over all."""
    if len(candidates) <= most:
        return list(candidates)
    return [candidates[i * len(candidates) // most] for i in range(most)]


def offers_shm(probe: Mapping[str, Any]) -> bool:
    """Whether shm works on this machine."""
    return not probe["shm"]


def choose(rdma: Sequence[Candidate], probe: Mapping[str, Any], tcp_host: str) -> list[str]:
    """Names for ``nics=``: the RDMA NICs, or else one tcp NIC on ``tcp_host``; and shm where it is offered."""
    host = f"[{tcp_host}]" if ":" in tcp_host else tcp_host
    names = [candidate.spec for candidate in rdma] or [f"tcp://{host}"]
    return names + (["shm"] if offers_shm(probe) else [])
