"""Machines that are not there: trees that look like their /sys and /proc, for the tests of topology and doctor."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

NVIDIA, MELLANOX, AMAZON = 0x10DE, 0x15B3, 0x1D0F
GPU_CLASS, NET_CLASS = 0x030200, 0x020000


class Machine:
    """A root directory to which devices are added."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("sys/bus/pci/devices", "sys/class/net", "sys/class/infiniband", "proc", "dev/shm"):
            (root / folder).mkdir(parents=True)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def pci(self, *path: str, numa: int, vendor: int, device: int, pci_class: int) -> Path:
        """A PCI function: ``pci("pci0000:16", "0000:16:01.0", "0000:17:00.0", ...)``, root complex first."""
        folder = self.root.joinpath("sys/devices", *path)
        folder.mkdir(parents=True)
        facts = {"numa_node": numa, "vendor": hex(vendor), "device": hex(device), "class": f"{pci_class:#08x}"}
        for name, value in facts.items():
            (folder / name).write_text(f"{value}\n")
        (self.root / "sys/bus/pci/devices" / path[-1]).symlink_to(folder)
        return folder

    def gpu(self, *path: str, numa: int) -> None:
        self.pci(*path, numa=numa, vendor=NVIDIA, device=0x2330, pci_class=GPU_CLASS)
        uuid = f"GPU-{path[-1].replace(':', '').replace('.', '')}"
        self.write(
            f"proc/driver/nvidia/gpus/{path[-1]}/information",
            f"Model: \t\t NVIDIA H100 80GB HBM3\nGPU UUID: \t {uuid}\nBus Location: \t {path[-1]}",
        )
        self.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.0")

    def rdma(
        self,
        name: str,
        *path: str,
        numa: int,
        vendor: int = MELLANOX,
        device: int = 0x1021,
        gbps: int = 400,
        active: bool = True,
    ) -> None:
        """An RDMA NIC with one port."""
        folder = self.pci(*path, numa=numa, vendor=vendor, device=device, pci_class=NET_CLASS)
        entry = folder / "infiniband" / name
        (entry / "ports/1").mkdir(parents=True)
        (entry / "ports/1/state").write_text("4: ACTIVE\n" if active else "1: DOWN\n")
        (entry / "ports/1/rate").write_text(f"{gbps} Gb/sec (4X NDR)\n")
        (entry / "ports/1/link_layer").write_text("Ethernet\n" if vendor == MELLANOX else "Unspecified\n")
        (entry / "device").symlink_to(folder)
        (self.root / "sys/class/infiniband" / name).symlink_to(entry)

    def soft_roce(self, name: str) -> None:
        folder = self.root / "sys/devices/virtual/infiniband" / name
        (folder / "ports/1").mkdir(parents=True)
        (folder / "ports/1/state").write_text("4: ACTIVE\n")
        (folder / "ports/1/rate").write_text("2.5 Gb/sec (1X SDR)\n")
        (self.root / "sys/class/infiniband" / name).symlink_to(folder)

    def numa(self, *cpulists: str) -> None:
        for number, cores in enumerate(cpulists):
            self.write(f"sys/devices/system/node/node{number}/cpulist", cores)


def probe(*providers: tuple[str, str], version: str = "2.5") -> dict[str, Any]:
    """What the native core would say of its libraries: ``probe(("tcp", "eth0"), ("verbs", "mlx5_0"))``; ``verbs`` is of
    libibverbs."""
    return {
        "attempts": [{"path": "libfabric.so.1", "found": True, "error": "", "version": version}],
        "library": "/usr/lib/libfabric.so.1",
        "version": version,
        "error": "",
        "providers": [
            {"name": name, "domain": domain, "fabric": name, "version": "1.0", "kind": name.partition(";")[0]}
            for name, domain in providers
            if name != "verbs"
        ],
        "shm": "",
        "verbs": {
            "library": "/usr/lib/libibverbs.so.1",
            "error": "",
            "devices": [verbs_device(device) for name, device in providers if name == "verbs"],
        },
    }


def verbs_device(name: str, error: str = "") -> dict[str, Any]:
    gid = {"index": 3, "gid": "::ffff:10.0.0.1", "type": "RoCE v2", "netdev": "eth0"}
    port = {
        "number": 1,
        "state": "ACTIVE",
        "link_layer": "Ethernet",
        "mtu": 4096,
        "link_gbps": 400.0,
        "lid": 0,
        "chosen_gid": 3,
        "gids": [gid],
    }
    return {"name": name, "hardware": True, "dmabuf": True, "error": error, "ports": [port]}


LOCAL = (("tcp", "eth0"),)


def eight_by_eight(root: Path) -> tuple[Machine, dict[str, Any]]:
    """Eight GPUs, each behind a switch with its own 400G NIC, on two sockets; two slower NICs for storage."""
    machine = Machine(root)
    machine.numa("0-3", "4-7")
    for number in range(8):
        bus = 0x10 + 0x10 * number
        complex_, port, switch = f"pci0000:{bus:02x}", f"0000:{bus:02x}:01.0", f"0000:{bus + 1:02x}:00.0"
        down = [f"0000:{bus + 2:02x}:{slot:02x}.0" for slot in range(2)]
        machine.gpu(complex_, port, switch, down[0], f"0000:{bus + 3:02x}:00.0", numa=number // 4)
        machine.rdma(f"mlx5_{number}", complex_, port, switch, down[1], f"0000:{bus + 4:02x}:00.0", numa=number // 4)
    for number, bus in ((8, 0x08), (9, 0x98)):
        machine.rdma(f"mlx5_{number}", f"pci0000:{bus:02x}", f"0000:{bus:02x}:00.0", numa=number - 8, gbps=200)
    return machine, probe(*LOCAL, *(("verbs", f"mlx5_{number}") for number in range(10)))


def four_efas_per_gpu(root: Path) -> tuple[Machine, dict[str, Any]]:
    """As on EC2's p5: eight GPUs, each with four EFA devices on its root complex."""
    machine = Machine(root)
    machine.numa("0-3", "4-7")
    bus = itertools.count(0x4F)
    domains = []
    for number in range(8):
        complex_ = f"pci0000:{0x44 + 0x11 * number - 0x40:02x}"
        bridge = complex_.replace("pci", "") + ":00.0"
        for _ in range(4):
            at = next(bus)
            machine.rdma(
                f"rdmap{at}s0",
                complex_,
                bridge,
                f"0000:{at:02x}:00.0",
                numa=number // 4,
                vendor=AMAZON,
                device=0xEFA2,
                gbps=100,
            )
            domains.append(f"rdmap{at}s0-rdm")
        machine.gpu(complex_, bridge, f"0000:{next(bus):02x}:00.0", numa=number // 4)
    providers = [("efa", domain) for domain in domains]
    return machine, probe(*LOCAL, *providers, *(("efa-direct", domain) for domain in domains))
