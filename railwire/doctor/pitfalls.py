"""What is known to hurt, looked for on this machine, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from railwire.doctor.libraries import AMAZON
from railwire.doctor.limits import Limits
from railwire.doctor.report import GpuFacts, GpuPath, Libfabric, Pairing, Pitfall
from railwire.host import SPARE_FILES
from railwire.topology.sysfs import NetInterface, RdmaDevice, read_text

FEW_FILES = 4096


def machine(limits: Limits, root: Path, environ: Mapping[str, str]) -> Iterator[Pitfall]:
    """Those of memory and permissions."""
    cma = limits.cross_memory
    if not cma.works or (cma.ptrace_scope or 0) > 0:
        scope = f"kernel.yama.ptrace_scope is {cma.ptrace_scope}" if cma.ptrace_scope else f"it fails: {cma.error}"
        yield Pitfall(
            "warning" if not cma.works else "note",
            f"processes may not copy from each other's memory ({scope})"
            if not cma.works
            else f"{scope}: processes of other users or with fewer privileges may not copy from each other's memory",
            "sysctl kernel.yama.ptrace_scope=0, or docker run --cap-add=SYS_PTRACE; until then tcp carries what "
            "shm would",
        )
    if limits.huge_pages.transparent in ("", "never"):
        yield Pitfall(
            "warning",
            "transparent huge pages are off: engine.allocate gives ordinary pages, which halves large writes over shm",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if limits.open_files is not None and limits.open_files < FEW_FILES:
        yield Pitfall(
            "note",
            f"a process may have {limits.open_files} open files; each peer takes some, and an engine refuses "
            f"connections when only {SPARE_FILES} are left",
            "ulimit -n 65536 (limits.conf: nofile); docker run --ulimit nofile=65536; systemd LimitNOFILE=65536",
        )
    for name in ("FI_PROVIDER", "FI_PROVIDER_PATH"):
        if value := environ.get(name):
            yield Pitfall("note", f"{name}={value} in the environment narrows what libfabric offers", f"unset {name}")


def library(libfabric: Libfabric) -> Iterator[Pitfall]:
    """Those of libfabric itself."""
    if not libfabric.path:
        yield Pitfall(
            "note",
            "no libfabric could be opened: efa and libfabric NICs need one; tcp, shm and verbs NICs do not",
            libfabric.error,
        )
    elif libfabric.error:
        yield Pitfall("warning", libfabric.error, "pip install 'railwire[libfabric]'")
    elif libfabric.version.startswith("1."):
        yield Pitfall(
            "warning",
            f"libfabric {libfabric.version} is old: libfabric:tcp has twice the latency of 2.x, and idle workers poll",
            "pip install 'railwire[libfabric]' (2.x), or name a newer one in RAILWIRE_LIBFABRIC",
        )


def network(interfaces: Sequence[NetInterface], tcp_host: str) -> Iterator[Pitfall]:
    """Those of the interface that a tcp NIC would use."""
    used = next((one for one in interfaces if tcp_host in one.addresses), None)
    if used is None or used.loopback:
        yield Pitfall(
            "note",
            f"there is no default route: a tcp NIC chosen by itself listens on {tcp_host} and reaches this host alone",
            "name the interface's address: nics=['tcp://ADDRESS']",
        )
    elif 0 < used.mtu <= 1500:
        yield Pitfall(
            "note",
            f"MTU {used.mtu} on {used.name}: tcp spends more of the processor per byte than with jumbo frames",
            f"where switches and peers allow it: ip link set {used.name} mtu 9000",
        )


def rdma(devices: Sequence[RdmaDevice], limits: Limits) -> Iterator[Pitfall]:
    """Those of RDMA NICs."""
    for device in devices:
        if not device.active:
            yield Pitfall(
                "note", f"{device.name} has no active port and is not used", "check its cable and `rdma link`"
            )
    if not any(device.active for device in devices):
        return
    if limits.memlock_bytes is not None:
        yield Pitfall(
            "warning",
            f"only {limits.memlock_bytes // 1024} KiB may be locked, and RDMA NICs lock all that is registered",
            "ulimit -l unlimited (limits.conf: memlock); docker run --ulimit memlock=-1; systemd LimitMEMLOCK=infinity",
        )
    if any(device.pci is not None and device.pci.vendor == AMAZON for device in devices):
        yield Pitfall(
            "note",
            "Railwire's EFA path has not been run on EFA hardware yet",
            "run `railwire bench p2p` between two hosts first, and tell us",
        )


def gpus(
    found: Sequence[GpuFacts],
    paths: Sequence[GpuPath],
    devices: Sequence[RdmaDevice],
    pairings: Sequence[Pairing],
    root: Path,
) -> Iterator[Pitfall]:
    """Those of GPU memory and its way to another GPU, or to a NIC."""
    if not found:
        return
    for path in paths:
        if not path.works:
            yield Pitfall(
                "warning",
                f"a process on {path.source} cannot write into a process's memory on {path.target}: {path.why}",
                "one PID and IPC namespace for both, GPUs with peer access, no MIG (docs/gpu.md)",
            )
    usable = [device for device in devices if device.active]
    if not usable:
        yield Pitfall(
            "note",
            "GPUs but no RDMA NIC: between hosts GPU memory goes through pinned memory and tcp",
            "railwire bench p2p --nic tcp --device cuda:0 measures it; an RDMA NIC with dma-buf needs no copy",
        )
        return
    for module in sorted({peer_module(device) for device in usable}):
        if not can_reach_gpu_memory(root, module):
            yield Pitfall(
                "warning",
                f"neither dma-buf (open NVIDIA kernel modules) nor {module}: NICs cannot reach GPU memory",
                f"install NVIDIA's open kernel modules (driver 515, Linux 5.12 or newer), or modprobe {module}",
            )
    for gpu in found:
        mine = [pair.distance for pair in pairings if pair.gpu == gpu.address]
        if gpu.numa >= 0 and mine and all(distance == "far" for distance in mine):
            yield Pitfall(
                "warning",
                f"GPU {gpu.address} has no RDMA NIC on its NUMA node ({gpu.numa}): all its traffic crosses sockets",
                "use a GPU nearer to a NIC, or check in which slots the NICs are",
            )


def peer_module(device: RdmaDevice) -> str:
    """The kernel module through which this NIC reaches GPU memory where there is no dma-buf. EFA's is its own."""
    return "efa_nv_peermem" if device.pci is not None and device.pci.vendor == AMAZON else "nvidia_peermem"


def can_reach_gpu_memory(root: Path, module: str) -> bool:
    """The NVIDIA driver exports dma-bufs (its open kernel modules do), or the peer-memory module is loaded."""
    driver = read_text(root / "proc/driver/nvidia/version")
    return "Open Kernel Module" in driver or (root / "sys/module" / module).exists()
