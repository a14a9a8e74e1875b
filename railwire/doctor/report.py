"""What `railwire doctor` knows, as data: every field of its JSON document."""

from __future__ import annotations

from dataclasses import dataclass

from railwire.doctor.limits import Limits
from railwire.topology.sysfs import NetInterface, RdmaDevice


@dataclass(frozen=True)
class Attempt:
    """One place where libfabric was looked for."""

    path: str
    found: bool
    """This is the one in use."""
    version: str
    """Empty if it could not be asked."""
    error: str
    """Why it is not used; empty if it is."""


@dataclass(frozen=True)
class Provider:
    """One provider of libfabric that an engine can use or be told to use."""

    name: str
    """``tcp``, ``shm``, ``efa``, ..."""
    kind: str
    """NICs of one kind can talk to each other."""
    version: str
    domains: tuple[str, ...]
    """Its devices: network interfaces, RDMA devices."""


@dataclass(frozen=True)
class MissingProvider:
    """A provider that engines use where it exists, and that was not found here."""

    name: str
    why: str
    remedy: str
    """Empty if there is none: the hardware is not there."""


@dataclass(frozen=True)
class Libfabric:
    """The library behind the NICs."""

    path: str
    """Empty if none could be opened."""
    version: str
    error: str
    attempts: tuple[Attempt, ...]
    providers: tuple[Provider, ...]
    missing: tuple[MissingProvider, ...]


@dataclass(frozen=True)
class VerbsGid:
    """One address of a port."""

    index: int
    gid: str
    type: str
    """``RoCE v2``, ``IB/RoCE v1``; empty where the kernel does not say."""
    netdev: str


@dataclass(frozen=True)
class VerbsPort:
    """One port of a verbs device."""

    number: int
    state: str
    """``ACTIVE``, ``DOWN``, ..."""
    link_layer: str
    """``Ethernet`` or ``InfiniBand``."""
    mtu: int
    """Active, in bytes."""
    link_gbps: float
    lid: int
    """InfiniBand only."""
    chosen_gid: int
    """Index of the GID that a NIC takes unless told otherwise; -1: none will do."""
    gids: tuple[VerbsGid, ...]


@dataclass(frozen=True)
class VerbsDevice:
    """One device of libibverbs."""

    name: str
    hardware: bool
    """False: Soft-RoCE and the like."""
    dmabuf: bool
    """GPU memory can be registered by dma-buf as far as the library goes; the driver shows when it is tried."""
    error: str
    """Why no NIC can be opened on it, with the remedy; empty if one can."""
    ports: tuple[VerbsPort, ...]


@dataclass(frozen=True)
class Verbs:
    """libibverbs, which the ``verbs:DEVICE`` NICs use directly."""

    path: str
    """Empty if it could not be opened."""
    error: str
    devices: tuple[VerbsDevice, ...]
    missing: MissingProvider | None
    """Why no device can be used; None if one can."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU."""

    device: str
    """``cuda:N``; empty if CUDA_VISIBLE_DEVICES hides it."""
    address: str
    """On PCI."""
    name: str
    uuid: str
    numa: int
    """-1: unknown."""


@dataclass(frozen=True)
class GpuPath:
    """Whether a process with one GPU writes into the memory of another process's GPU, as was tried."""

    source: str
    """``cuda:N`` of the writer."""
    target: str
    """``cuda:N`` whose memory was written."""
    works: bool
    why: str
    """What keeps it from working; empty if it does."""


@dataclass(frozen=True)
class Pairing:
    """How far an RDMA device is from a GPU."""

    gpu: str
    """PCI address."""
    nic: str
    """Name of the RDMA device."""
    distance: str
    """``switch``, ``host_bridge``, ``numa`` or ``far`` (docs/nics.md)."""


@dataclass(frozen=True)
class Plan:
    """What an engine with ``nics="auto"`` would do."""

    device: str
    nics: tuple[str, ...]
    same_process: tuple[str, ...]
    """The NICs that would carry data to an engine like this one in the same process; empty: none can."""
    same_host: tuple[str, ...]
    other_host: tuple[str, ...]
    error: str
    """Why there is no plan; empty if there is one."""


@dataclass(frozen=True)
class Pitfall:
    """Something on this machine that is known to hurt."""

    severity: str
    """``error``: nothing works; ``warning``: slow, or will fail in use; ``note``: good to know."""
    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """All of it."""

    version: str
    """Of Railwire."""
    host: str
    kernel: str
    cores: int
    """That this process may use."""
    interfaces: tuple[NetInterface, ...]
    rdma_devices: tuple[RdmaDevice, ...]
    libfabric: Libfabric
    verbs: Verbs
    gpus: tuple[GpuFacts, ...]
    gpu_driver: str
    """The first line of /proc/driver/nvidia/version; empty without a driver."""
    gpu_paths: tuple[GpuPath, ...]
    """Empty where nothing was tried: there is no driver, or it is another machine's tree."""
    pairings: tuple[Pairing, ...]
    limits: Limits
    plans: tuple[Plan, ...]
    pitfalls: tuple[Pitfall, ...]
    usable: bool
    """There is a NIC that an engine can use."""
