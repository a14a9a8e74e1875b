"""Which GPUs there are, and which of them ``cuda:N`` is."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from railwire.topology import sysfs

_NVIDIA = 0x10DE
_DISPLAY = 0x03  # PCI class: VGA and 3D controllers; audio and bridges of a GPU are others


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU."""

    address: str
    """PCI address, ``0000:17:00.0``."""
    name: str
    """``NVIDIA H100 80GB HBM3``; empty if no driver says it."""
    uuid: str
    """``GPU-7ea8ef28-...``; empty if no driver says it."""
    pci: sysfs.PciDevice | None
    """None if /sys does not show it."""


def gpus(root: Path = sysfs.ROOT) -> list[Gpu]:
    """All NVIDIA GPUs by PCI address: those that the driver shows; without a driver, those on the PCI bus."""
    found = []
    for folder in sysfs.entries(root / "proc/driver/nvidia/gpus"):
        facts = {}
        for line in sysfs.read_text(folder / "information").splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
        address = normal_address(folder.name)
        found.append(Gpu(address, facts.get("Model", ""), facts.get("GPU UUID", ""), sysfs.pci_device(address, root)))
    if not found:
        found = [
            Gpu(device.address, "", "", device)
            for device in sysfs.pci_devices(root)
            if device.vendor == _NVIDIA and device.pci_class >> 16 == _DISPLAY
        ]
    return sorted(found, key=lambda gpu: gpu.address)


def normal_address(text: str) -> str:
    """A PCI address as /sys writes it: the NVIDIA driver's domains have 4 or 8 digits, in either case."""
    domain, _, rest = text.strip().lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}"


def cuda_order(
    known: Sequence[Gpu], environ: Mapping[str, str], driver_order: Callable[[], list[str]] | None = None
) -> list[Gpu]:
    """The GPUs as CUDA numbers them: element N is ``cuda:N``.

    Args:
        known: from :func:`gpus`.
        environ: CUDA_VISIBLE_DEVICES of it counts, with numbers or UUIDs (or their beginnings).
        driver_order: asks the CUDA driver, which alone knows the order of GPUs of different models; None, or an empty
            answer: the order of their PCI addresses.
    """
    asked = driver_order() if driver_order else []
    if asked:
        by_address = {gpu.address: gpu for gpu in known}
        return [by_address.get(address, Gpu(address, "", "", None)) for address in asked]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(known)
    chosen: list[Gpu] = []
    for item in (part.strip() for part in visible.split(",")):
        if item.isdigit():
            match = list(known[int(item) : int(item) + 1])
        else:
            match = [gpu for gpu in known if item and gpu.uuid.startswith(item)]
        if len(match) != 1 or match[0] in chosen:
            break  # as CUDA does: what follows a bad entry is not visible either
        chosen += match
    return chosen


def driver_order() -> list[str]:
    """PCI addresses of ``cuda:0``, ``cuda:1``, ... from the CUDA driver; empty if there is none or it fails."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    addresses = []
    for index in range(count.value):
        device = ctypes.c_int()
        text = ctypes.create_string_buffer(32)
        if driver.cuDeviceGet(ctypes.byref(device), index) != 0:
            return []
        if driver.cuDeviceGetPCIBusId(text, len(text), device) != 0:
            return []
        addresses.append(normal_address(text.value.decode()))
    return addresses


def parse_device(device: str) -> int | None:
    """The N of ``cuda:N``, None for ``cpu``. Raises ValueError for anything else."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda:(\d{1,4})", device, re.ASCII)
    if match is None:
        raise ValueError(f'device is "cpu" or "cuda:N", not {device!r}')
    return int(match[1])
