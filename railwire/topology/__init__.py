"""Where things are in this machine, and which NICs are near: what ``TransferEngine(nics="auto")`` asks."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from railwire import _native
from railwire.errors import ConfigurationError
from railwire.topology import gpus as _gpus
from railwire.topology import select, sysfs
from railwire.topology.gpus import parse_device

__all__ = ["ask_libraries", "default_address", "nics_for_device", "parse_device", "plan", "route_address"]

LOOPBACK = "127.0.0.1"


def nics_for_device(device: str) -> list[str]:
    """The NICs for an engine on this device, as ``nics=`` takes them (docs/nics.md says how they are chosen).

    Args:
        device: ``"cpu"`` or ``"cuda:N"``.

    Raises:
        ConfigurationError: another device, or there is no such GPU.
    """
    return plan(device, _probe(), sysfs.ROOT, default_address())


def plan(
    device: str,
    probe: Mapping[str, Any],
    root: Path,
    tcp_host: str,
    *,
    environ: Mapping[str, str] = os.environ,
    driver_order: Callable[[], list[str]] | None = _gpus.driver_order,
    cores: frozenset[int] | None = None,
) -> list[str]:
    """As :func:`nics_for_device`, for any machine.

    Args:
        device: ``"cpu"`` or ``"cuda:N"``.
        probe: what libfabric and libibverbs offer there, from :func:`ask_libraries`.
        root: of its file system.
        tcp_host: where its tcp NIC would listen.
        environ: CUDA_VISIBLE_DEVICES counts.
        driver_order: asks its CUDA driver; None if that cannot be.
        cores: which the process may use; None: this process's.

    Raises:
        ConfigurationError: another device, or there is no such GPU.
    """
    try:
        index = _gpus.parse_device(device)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    candidates = select.rdma_candidates(probe, sysfs.rdma_devices(root))
    if index is None:
        cores = frozenset(os.sched_getaffinity(0)) if cores is None else cores
        return select.choose(select.near_cores(candidates, sysfs.numa_nodes(root), cores), probe, tcp_host)
    visible = _gpus.cuda_order(_gpus.gpus(root), environ, driver_order)
    if index >= len(visible):
        there = f"{len(visible)} GPUs are visible" if visible else "no GPU is visible"
        raise ConfigurationError(
            f"there is no {device}: {there} to this process (CUDA_VISIBLE_DEVICES, `railwire doctor`)"
        )
    return select.choose(select.nearest(candidates, visible[index].pci), probe, tcp_host)


def default_address() -> str:
    """The address that this host uses towards the rest of the world: that of the default route's interface, IPv4 before
    IPv6; 127.0.0.1 if there is no route. Sends nothing."""
    return route_address(4) or route_address(6) or LOOPBACK


def route_address(version: int) -> str | None:
    """Our address towards the rest of the world in IP version 4 or 6; None if there is no such route."""
    # Addresses reserved for documentation; connecting a datagram socket only looks up the route.
    family, far = (socket.AF_INET, "192.0.2.1") if version == 4 else (socket.AF_INET6, "2001:db8::1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as any_socket:
            any_socket.connect((far, 9))
            return str(any_socket.getsockname()[0])
    except OSError:
        return None


def ask_libraries() -> dict[str, Any]:
    """What ``_native.libfabric_probe()`` says, under ``"verbs"`` what ``_native.verbs_probe()`` does, and under
    ``"shm"`` what ``_native.shm_probe()`` does."""
    return {**_native.libfabric_probe(), "verbs": _native.verbs_probe(), "shm": _native.shm_probe()}


@functools.cache
def _probe() -> dict[str, Any]:
    """Asked once per process: it takes a tenth of a second, and devices do not come and go."""
    return ask_libraries()
