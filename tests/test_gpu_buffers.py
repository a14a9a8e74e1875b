"""What GPU memory register() understands, and memory that engine.allocate() makes: on the fake driver."""

from __future__ import annotations

import subprocess
import sys

import pytest
from beds import fake_cuda_environment

SCRIPT = """
import gc
import numpy as np
from railwire import ConfigurationError, _native, cuda
from railwire.buffers import Buffer

memory = cuda.GpuMemory(1000, 1)
address = memory._native.address
array = memory.__cuda_array_interface__
assert (Buffer(memory).device, Buffer(memory).nbytes, Buffer(memory).address) == (1, 1000, address)
assert Buffer((address + 10, 100)).device == 1  # a bare address is asked about, not believed
assert Buffer((np.zeros(10).ctypes.data, 80)).device == -1
assert _native.gpu_of(0) == -1 and _native.gpu_of(address + (64 << 20)) == -1

class Cupy:
    def __init__(self, **changes):
        self.__cuda_array_interface__ = {**array, **changes}

assert Buffer(Cupy(shape=(10, 25), typestr="<f4", strides=(100, 4))).nbytes == 1000
assert Buffer(Cupy(shape=(0, 4))).nbytes == 0
for wrong in (
    Cupy(shape=(10, 25), typestr="<f4", strides=(200, 4)),
    Cupy(data=(address, True)),
    Cupy(data=(np.zeros(10).ctypes.data, False)),
):
    try:
        Buffer(wrong)
    except ValueError:
        pass
    else:
        raise AssertionError(wrong.__cuda_array_interface__)
assert Buffer(Cupy(data=(address, True)), readable_only=True).device == 1
for nbytes, ordinal, error in ((0, 0, ValueError), (10, 7, ConfigurationError), (1 << 50, 0, ConfigurationError)):
    try:
        cuda.GpuMemory(nbytes, ordinal)
    except error as problem:
        assert error is ValueError or "cuda:" in str(problem), problem
    else:
        raise AssertionError((nbytes, ordinal))
del memory
gc.collect()
assert _native.gpu_of(address) == -1
print("ok")
"""


@pytest.mark.parametrize("no_vmm", [0, 1])
def test_gpu_memory_is_known_however_it_is_given(no_vmm: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=fake_cuda_environment(NO_VMM=no_vmm),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
