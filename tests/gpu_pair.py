"""Two processes that move GPU memory, for test_gpu_shm.py and test_gpu_tcp.py: ``gpu_pair.py a|b DEVICE_A DEVICE_B WHAT
NIC``. Prints what it saw as JSON lines; side a starts side b."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from railwire import EngineAddress, Pages, RailwireError, RemoteRegion, TransferEngine
from railwire.cuda import GpuMemory

NBYTES, PAGE, COUNT = 8 << 20, 8192, 300
rng = np.random.default_rng(1)
DATA = rng.integers(0, 256, NBYTES, dtype=np.uint8)
PAGES = rng.permutation(NBYTES // PAGE)[:COUNT]


class Side:
    def __init__(self, device: str) -> None:
        self.engine = TransferEngine(device, nics=sys.argv[5].split("+"), liveness=2.0)
        self.memory: Any = np.zeros(NBYTES, np.uint8) if device == "cpu" else GpuMemory(NBYTES, int(device[5:]))
        self.region = self.engine.register(self.memory)
        self.fill(np.zeros(NBYTES, np.uint8))

    def fill(self, data: Any) -> None:
        if isinstance(self.memory, np.ndarray):
            self.memory[:] = data
        else:
            self.memory.fill(data)

    def read(self) -> Any:
        out = np.zeros(NBYTES, np.uint8)
        if isinstance(self.memory, np.ndarray):
            out[:] = self.memory
        else:
            self.memory.read_into(out)
        return out

    def offer(self) -> str:
        return json.dumps([bytes(self.engine.address).hex(), bytes(self.region.descriptor).hex()])


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def target(device: str) -> None:
    side = Side(device)
    print(side.offer(), flush=True)
    pages = side.engine.counter(1).expect(COUNT)
    whole = side.engine.counter(2).expect(1)
    for line in sys.stdin:
        if line == "pages\n":
            pages.wait(30)
            got = side.read().reshape(-1, PAGE)
            expected = np.zeros_like(got)
            expected[:COUNT] = DATA.reshape(-1, PAGE)[PAGES]
            tell(pages=bool((got == expected).all()))
        elif line == "whole\n":
            whole.wait(30)
            tell(whole=bool((side.read()[: 5 << 20] == DATA[3 : 3 + (5 << 20)]).all()))
        elif line == "free\n":
            began = time.monotonic()
            side.region.close()
            tell(closed=time.monotonic() - began < 10)
        elif line == "again\n":  # the same memory, another life
            side.fill(np.zeros(NBYTES, np.uint8))
            side.region = side.engine.register(side.memory)
            arrived = side.engine.counter(3).expect(1)
            tell(descriptor=bytes(side.region.descriptor).hex())
            arrived.wait(30)
            tell(anew=bool((side.read()[: 1 << 20] == 7).all()))
        else:
            break
    side.engine.close()


def initiator(device: str, other: str, what: str) -> None:
    child = subprocess.Popen(
        [sys.executable, __file__, "b", device, other, what, sys.argv[5]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None

    def ask(question: str) -> dict[str, object]:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(question + "\n")
        child.stdin.flush()
        answer: dict[str, object] = json.loads(child.stdout.readline())
        return answer

    side = Side(device)
    side.fill(DATA)
    address, descriptor = (bytes.fromhex(text) for text in json.loads(child.stdout.readline()))
    peer = side.engine.connect(EngineAddress.from_bytes(address))
    remote = RemoteRegion.from_bytes(descriptor)

    def write_pages() -> Any:
        source, destination = Pages(PAGES, PAGE), Pages(np.arange(COUNT), PAGE)
        return side.engine.write_pages(side.region, source, remote, destination, PAGE, imm=1)

    try:
        write_pages().wait(30)
    except (RailwireError, ValueError) as error:
        tell(error=f"{type(error).__name__}: {error}")
        child.kill()
        side.engine.close()
        return
    tell(**ask("pages"))
    side.engine.write(side.region[3 : 3 + (5 << 20)], remote[: 5 << 20], imm=2).wait(30)
    tell(**ask("whole"))
    if "+" in sys.argv[5]:
        tell(path=[[rails.kind, rails.carries, rails.why] for rails in peer.path])
    side.fill(np.zeros(NBYTES, np.uint8))
    side.engine.read(remote[: 4 << 20], side.region[1 << 20 : 5 << 20]).wait(30)
    got = side.read()
    tell(read=bool((got[1 << 20 : 5 << 20] == DATA[3 : 3 + (4 << 20)]).all() and not got[: 1 << 20].any()))
    if what == "free":
        busy = [write_pages() for _ in range(20)]
        tell(**ask("free"))
        for transfer in busy:
            try:
                transfer.wait(10)
            except RailwireError:
                pass
        try:
            write_pages().wait(10)
            tell(after="written")
        except RailwireError as error:
            tell(after=type(error).__name__)
        anew = RemoteRegion.from_bytes(bytes.fromhex(str(ask("again")["descriptor"])))
        side.fill(np.full(NBYTES, 7, np.uint8))
        side.engine.write(side.region[: 1 << 20], anew[: 1 << 20], imm=3).wait(30)
        tell(**json.loads(child.stdout.readline()))
    if what == "kill":
        busy = [write_pages() for _ in range(50)]
        child.send_signal(signal.SIGKILL)
        peer.lost.wait(10)
        ends = []
        for transfer in busy:
            try:
                transfer.wait(10)
                ends.append("done")
            except RailwireError:
                ends.append("failed")
        tell(ended=len(ends), again=bool((side.read()[1 << 20 : 5 << 20] == got[1 << 20 : 5 << 20]).all()))
    else:
        child.stdin.write("end\n")
        child.stdin.flush()
        tell(child=child.wait(20))
    side.engine.close()
    tell(end=True)


if __name__ == "__main__":
    if sys.argv[1] == "b":
        target(sys.argv[3])
    else:
        initiator(*sys.argv[2:5])
