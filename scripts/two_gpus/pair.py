"""The two processes of scripts/two-gpus.py: an engine here, one in a process that it starts, pages between them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from railwire import EngineAddress, Pages, RemoteRegion, TransferEngine

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SCRIPT = Path(__file__).resolve().parent.parent / "two-gpus.py"
ROWS: list[tuple[str, str]] = []


def row(name: str, value: str) -> None:
    ROWS.append((name, value))
    print(f"      {name}: {value}", flush=True)


class Far:
    """The other process: memory on its GPU, an engine, and what it is asked to do (see `serve`)."""

    def __init__(self, device: str, nic: str, nbytes: int, sms: int = 8) -> None:
        command = [sys.executable, str(SCRIPT), "--serve", device, "--nic", nic]
        command += ["--bytes", str(nbytes), "--sms", str(sms)]
        self.nbytes = nbytes
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        address, descriptor = self.answer()
        self.address = EngineAddress.from_bytes(bytes.fromhex(address))
        self.remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process has ended")
        return json.loads(line)

    def tell(self, *what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def ask(self, *what: object) -> Any:
        self.tell(*what)
        return self.answer()

    def close(self) -> None:
        self.tell("end")
        self._process.wait(30)


def serve(device: str, nic: str, nbytes: int, sms: int) -> None:
    engine = TransferEngine(device, nics=[nic], options={"copy_sms": str(sms)})
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    region = engine.register(memory)
    print(json.dumps([bytes(engine.address).hex(), bytes(region.descriptor).hex()]), flush=True)
    for line in sys.stdin:
        what, *args = json.loads(line)
        if what == "expect":
            engine.counter(args[0]).expect(args[1]).wait(60)
            print(json.dumps(time.monotonic_ns()), flush=True)
        elif what == "sum":  # of the bytes at random places, with their number as weight
            at = torch.arange(0, nbytes, 4099, device=device)
            print(json.dumps(int((memory[at].long() * (at % 8191)).sum())), flush=True)
        elif what == "zero":
            memory.zero_()
            torch.cuda.synchronize(device)
            print("0", flush=True)
        elif what == "echo":
            count, address, descriptor = args
            back = engine.connect(EngineAddress.from_bytes(bytes.fromhex(address)))
            remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))
            print("0", flush=True)
            for _ in range(count):
                engine.counter(3).expect(1).wait(20)
                engine.write(region[:64], remote[:64], imm=3)
            del back
        elif what == "push":  # pages back, for both directions at once
            address, descriptor, page, count, rounds = args
            engine.connect(EngineAddress.from_bytes(bytes.fromhex(address)))
            remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))
            print(json.dumps(push(engine, region, remote, page, count, rounds)), flush=True)
        else:
            break
    engine.close()


def push(engine: Any, region: Any, remote: Any, page: int, count: int, rounds: int) -> float:
    """GB/s of random pages: `rounds` lists of `count` within 1 GiB, two in flight."""
    slots = GIB // page
    rng = np.random.default_rng(1)
    count = min(count, slots)
    lists = [
        (Pages(rng.permutation(slots)[:count], page), Pages(rng.permutation(slots)[:count], page)) for _ in range(4)
    ]
    for a, b in lists:
        engine.write_pages(region, a, remote, b, page).wait(60)
    begin = time.monotonic()
    under_way: list[Any] = []
    for i in range(rounds):
        if len(under_way) == 2:
            under_way.pop(0).wait(60)
        a, b = lists[i % 4]
        under_way.append(engine.write_pages(region, a, remote, b, page))
    for one in under_way:
        one.wait(60)
    return rounds * count * page / (time.monotonic() - begin) / 1e9


class Near:
    """An engine of ours, with an engine of the other process."""

    memory: ClassVar[dict[int, torch.Tensor]] = {}  # made once for each size

    def __init__(self, device: str, far: Far, nic: str, sms: int = 8) -> None:
        self.far, self.device, self.nbytes = far, device, far.nbytes
        self.engine = TransferEngine(device, nics=[nic], options={"copy_sms": str(sms)})
        if self.nbytes not in self.memory:
            self.memory[self.nbytes] = torch.randint(0, 256, (self.nbytes,), dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
        self.mine = self.memory[self.nbytes]
        self.region = self.engine.register(self.mine)
        self.peer = self.engine.connect(far.address)

    def check(self) -> bool:
        """Writes all, and compares with what the other side has."""
        self.far.ask("zero")
        self.engine.write(self.region, self.far.remote).wait(60)
        at = torch.arange(0, self.nbytes, 4099, device=self.device)
        return int((self.mine[at].long() * (at % 8191)).sum()) == self.far.ask("sum")

    def offer(self) -> tuple[str, str]:
        return bytes(self.engine.address).hex(), bytes(self.region.descriptor).hex()

    def close(self) -> None:
        self.engine.close()
