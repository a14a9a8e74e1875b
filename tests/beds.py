"""Where the tests run: on this machine, or in the emulated one of scripts/rxe-vm.sh, which names its devices in
``RXE_DEVICES`` and is some twenty times slower."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RXE_DEVICES = tuple(os.environ.get("RXE_DEVICES", "").split())
EMULATED = bool(RXE_DEVICES)


def patient(seconds: float) -> float:
    """A limit of time, stretched where everything is emulated."""
    return seconds * 4 if EMULATED else seconds


def verbs_nic(number: int) -> str:
    """Name of the NIC on the ``number``-th device; they repeat."""
    return f"verbs:{RXE_DEVICES[number % len(RXE_DEVICES)]}"


def far_nics(nics: list[str]) -> list[str]:
    """The NICs of the other process: on verbs, devices of its own, so that packets really travel."""
    devices = [f"verbs:{name}" for name in RXE_DEVICES]
    return [verbs_nic(devices.index(nic) + len(devices) // 2) if nic in devices else nic for nic in nics]


def fake_cuda_environment(**faults: object) -> dict[str, str]:
    """The environment of a process whose CUDA driver is the one in native/tests/fake_cuda, with the faults that it
    knows (``DELAY_US=200``, ``DEVICES=2``, ...)."""
    if os.environ.get("RAILWIRE_TEST_GPU"):  # the machine's own driver and GPUs
        if any(value for name, value in faults.items() if name != "DELAY_US"):
            pytest.skip("a real GPU has no such fault")
        return dict(os.environ)
    library = Path(__file__).parent.parent / "build/native/libfake_cuda.so"
    if not library.exists():
        pytest.skip("the fake CUDA driver is not built: make build-native")
    named = {f"RAILWIRE_FAKE_CUDA_{name}": str(value) for name, value in faults.items()}
    return {**os.environ, "RAILWIRE_LIBCUDA": str(library), **named}
