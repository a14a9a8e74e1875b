"""What the kernel says about devices: PCI functions, RDMA devices and network interfaces, read from /sys and /proc.

Every function takes the root of the file system, so that tests can show it another machine. Nothing here raises for
what a machine or a container lacks: it is left out, or unknown.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
UNKNOWN_NUMA = -1

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class PciDevice:
    """One PCI function."""

    address: str
    """``0000:17:00.0``."""
    path: tuple[str, ...]
    """From the root complex down to it: ``("pci0000:16", "0000:16:01.0", ..., "0000:17:00.0")``."""
    numa: int
    """NUMA node; -1 if the kernel does not know, as in many virtual machines."""
    vendor: int
    device: int
    pci_class: int
    """24 bits: class, subclass, interface."""
    driver: str
    """The kernel module that drives it; empty if none does."""


@dataclass(frozen=True)
class RdmaDevice:
    """One device of /sys/class/infiniband: InfiniBand, RoCE, EFA, Soft-RoCE, ..."""

    name: str
    """``mlx5_0``, ``rdmap79s0``."""
    active: bool
    """One of its ports is."""
    link_gbps: float
    """Of its fastest active port, in Gbit/s; 0 if unknown."""
    link_layer: str
    """``InfiniBand``, ``Ethernet`` or ``Unspecified`` (EFA); empty if unknown."""
    interfaces: tuple[str, ...]
    """Network interfaces on the same device."""
    pci: PciDevice | None
    """None for software devices such as Soft-RoCE."""


@dataclass(frozen=True)
class NetInterface:
    """One network interface."""

    name: str
    state: str
    """``up``, ``down``, ``unknown`` (loopback), ..."""
    mtu: int
    """Bytes; 0 if unknown."""
    link_gbps: float
    """Gbit/s; 0 if unknown, as for virtual devices."""
    addresses: tuple[str, ...]
    """The first IPv4 address and all IPv6 addresses."""
    loopback: bool
    pci: PciDevice | None
    """None for virtual interfaces."""


def read_text(path: Path) -> str:
    """The file without white space around it; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path, default: int) -> int:
    """A number, decimal or 0x hexadecimal; ``default`` if there is none."""
    try:
        return int(read_text(path), 0)
    except ValueError:
        return default


def entries(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


# ---- PCI -------------------------------------------------------------------------------------------------------------
def pci_devices(root: Path = ROOT) -> list[PciDevice]:
    """All PCI functions that can be seen."""
    return [_pci_device(entry.resolve()) for entry in entries(root / "sys/bus/pci/devices")]


def pci_device(address: str, root: Path = ROOT) -> PciDevice | None:
    """The PCI function at an address such as ``0000:17:00.0``; None if it cannot be seen."""
    folder = root / "sys/bus/pci/devices" / address
    return _pci_device(folder.resolve()) if folder.exists() else None


def _pci_device(folder: Path) -> PciDevice:
    parts = folder.parts
    start = next((i for i, part in enumerate(parts) if part.startswith("pci") and ":" in part), len(parts) - 1)
    driver = folder / "driver"
    return PciDevice(
        address=folder.name,
        path=parts[start:],
        numa=read_number(folder / "numa_node", UNKNOWN_NUMA),
        vendor=read_number(folder / "vendor", 0),
        device=read_number(folder / "device", 0),
        pci_class=read_number(folder / "class", 0),
        driver=driver.resolve().name if driver.exists() else "",
    )


def _pci_of(device: Path) -> PciDevice | None:
    """The PCI function that a class device hangs on, directly or (virtio) through a bus of its own."""
    if not device.exists():
        return None
    folder = device.resolve()
    for candidate in (folder, *folder.parents):
        name = candidate.name
        if name.count(":") == 2 and "." in name and (candidate / "vendor").exists():
            return _pci_device(candidate)
        if name.startswith("pci") or name in ("devices", "sys"):
            break
    return None


# ---- RDMA ------------------------------------------------------------------------------------------------------------
def rdma_devices(root: Path = ROOT) -> list[RdmaDevice]:
    """All devices of /sys/class/infiniband, by name."""
    return [_rdma_device(entry) for entry in entries(root / "sys/class/infiniband")]


def _rdma_device(folder: Path) -> RdmaDevice:
    ports = entries(folder / "ports")
    states = {port: read_text(port / "state") for port in ports}  # "4: ACTIVE"
    active = [port for port, state in states.items() if state.endswith("ACTIVE") or not state]
    rates = [_leading_number(read_text(port / "rate")) for port in active]  # "400 Gb/sec (4X NDR)"
    return RdmaDevice(
        name=folder.name,
        active=bool(active),
        link_gbps=max(rates, default=0.0),
        link_layer=read_text(ports[0] / "link_layer") if ports else "",
        interfaces=tuple(entry.name for entry in entries(folder / "device/net")),
        pci=_pci_of(folder / "device"),
    )


def _leading_number(text: str) -> float:
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return 0.0


# ---- network interfaces ----------------------------------------------------------------------------------------------
def first_ipv4(interface: str) -> str | None:
    """The first IPv4 address of an interface of this machine; None if it has none."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def net_interfaces(root: Path = ROOT, ipv4_of: Callable[[str], str | None] = first_ipv4) -> list[NetInterface]:
    """All network interfaces of this network namespace, by name."""
    ipv6: dict[str, list[str]] = {}
    for interface, address in _ipv6_addresses(root):
        ipv6.setdefault(interface, []).append(address)
    found = []
    for folder in entries(root / "sys/class/net"):
        if not folder.is_dir():
            continue  # bonding_masters is a file
        ipv4 = ipv4_of(folder.name)
        mbps = read_number(folder / "speed", 0)
        found.append(
            NetInterface(
                name=folder.name,
                state=read_text(folder / "operstate"),
                mtu=read_number(folder / "mtu", 0),
                link_gbps=mbps / 1000 if mbps > 0 else 0.0,
                addresses=(*([ipv4] if ipv4 else []), *ipv6.get(folder.name, [])),
                loopback=bool(read_number(folder / "flags", 0) & 0x8),  # IFF_LOOPBACK
                pci=_pci_of(folder / "device"),
            )
        )
    return found


def _ipv6_addresses(root: Path) -> Iterator[tuple[str, str]]:
    for line in read_text(root / "proc/net/if_inet6").splitlines():
        fields = line.split()  # address, interface number, prefix length, scope, flags, name
        if len(fields) == 6:
            yield fields[5], str(ipaddress.IPv6Address(bytes.fromhex(fields[0])))


# ---- processors ------------------------------------------------------------------------------------------------------
def numa_nodes(root: Path = ROOT) -> dict[int, frozenset[int]]:
    """The cores of every NUMA node; empty if the kernel does not say."""
    nodes = {}
    for folder in entries(root / "sys/devices/system/node"):
        number = folder.name.removeprefix("node")
        if folder.name.startswith("node") and number.isdigit():
            nodes[int(number)] = parse_cpu_list(read_text(folder / "cpulist"))
    return nodes


def parse_cpu_list(text: str) -> frozenset[int]:
    """``"0-3,8"`` as the kernel writes it: cores 0, 1, 2, 3 and 8."""
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        try:
            cores.update(range(int(first), int(last or first) + 1))
        except ValueError:
            continue
    return frozenset(cores)
