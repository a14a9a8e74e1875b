"""CUDA streams that wait for expectations. On the fake driver, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from beds import fake_cuda_environment

SCRIPT = """
import ctypes, os, sys, time
import numpy as np
from railwire import RailwireError, TransferCancelled, TransferEngine, WriterFailed
from railwire.testing import SimulatedFabric

driver = ctypes.CDLL(os.environ["RAILWIRE_LIBCUDA"])
driver.cuCtxPushCurrent_v2(ctypes.c_void_p(1))

def stream():
    handle = ctypes.c_void_p()
    assert driver.cuStreamCreateWithPriority(ctypes.byref(handle), 1, 0) == 0
    return handle.value

def idle(handle):
    return driver.cuStreamQuery(ctypes.c_void_p(handle)) == 0

def settle(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()

never = np.zeros(1, np.uint64)

def stuck():
    handle = stream()
    driver.cuStreamWaitValue64_v2(ctypes.c_void_p(handle), ctypes.c_uint64(never.ctypes.data), ctypes.c_uint64(1), 0)
    return handle

class TorchStream:
    def __init__(self):
        self.cuda_stream = stream()
        self.device = type("device", (), {"index": 1})()

with SimulatedFabric() as fabric:
    a = TransferEngine(nics=[fabric.nic("a")])
    b = TransferEngine("cuda:0", nics=[fabric.nic("b")])
    region = b.register(np.zeros(4096, np.uint8))
    source = a.register(np.ones(4096, np.uint8))
    a.connect(b.address)
    handle, other = stream(), TorchStream()
    reached = b.counter(5).expect(1).on(handle).on(other)
    time.sleep(0.05)
    assert not idle(handle) and not idle(other.cuda_stream)
    a.write(source, region.descriptor, imm=5).wait(10)
    assert settle(lambda: idle(handle) and idle(other.cuda_stream)), "reached"
    assert region.array.all()

    failing = stream()
    expectation = b.counter(6).expect(1, timeout=0.1).on(failing)
    assert settle(lambda: idle(failing)), "failed"
    assert expectation.exception() is not None

    # after=: nothing is read before the stream has come so far.
    gate, before = stream(), b.counter(8)
    word = np.zeros(64, np.uint64)  # what a kernel in front of it would wait for
    driver.cuStreamWaitValue64_v2(ctypes.c_void_p(gate), ctypes.c_uint64(word.ctypes.data), ctypes.c_uint64(1), 0)
    a.device = "cuda:0"
    held = a.write(source, region.descriptor, imm=8, after=gate)
    arrived = before.expect(1)
    cancelled = a.write(source, region.descriptor, imm=9, after=gate)
    told = b.counter(9).expect(1)
    time.sleep(0.05)
    assert not held.done() and not arrived.done()
    cancelled.cancel()
    try:
        cancelled.wait(10)
    except TransferCancelled:
        pass
    assert cancelled.state == "cancelled"
    try:
        told.wait(10)
    except WriterFailed:
        pass
    assert told.state == "failed"
    source.array[:] = 7  # the stream's own kernels may still write it
    word[0] = 1
    held.wait(10), arrived.wait(10)
    assert (region.array == 7).all()
    assert a.stats()["transfers"]["active"] == 0, a.stats()["transfers"]

    lost = a.write(source, region.descriptor, imm=10, after=stuck())
    closing = stream()
    expectation = b.counter(7).expect(1).on(closing)
    b.close()
    assert settle(lambda: idle(closing)), "closed"
    try:
        lost.wait(10)  # its peer has gone: it does not wait for the stream
    except RailwireError:
        pass
    assert lost.state == "failed"
    a.close()
    for wrong, error in ((object(), TypeError), (True, TypeError)):
        try:
            expectation.on(wrong)
        except error:
            pass
        else:
            raise AssertionError(wrong)
print("ok", flush=True)
os._exit(0)  # two of the driver's streams stand for good
"""


@pytest.mark.parametrize("delay", [0, 300])
def test_streams_go_on_when_an_expectation_ends_however_it_does(delay: int) -> None:
    environment = fake_cuda_environment(DELAY_US=delay)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr
