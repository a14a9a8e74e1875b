"""One process of `railwire bench weights`: a trainer or a receiver of one contender. Started by weights_bench.

All contenders move the same model: trainers hold the rows of every tensor in equal parts, receivers a tensor-parallel
half of fused tensors. An update is measured from a common start to when every receiver holds the version.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from railwire.engine import TransferEngine
from railwire.weights import Box, Destination, Receiver, Rendezvous, Trainer, describe_boxes, record, tcp_store

Shapes = dict[str, tuple[int, int]]


def shapes(megabytes: int) -> Shapes:
    """A Llama of so many MB in bf16: layers of width 1024."""
    layer = {
        "q": (1024, 1024), "k": (256, 1024), "v": (256, 1024), "o": (1024, 1024),
        "gate": (2816, 1024), "up": (2816, 1024), "down": (1024, 2816),
    }  # fmt: skip
    each = 2 * sum(a * b for a, b in layer.values())
    return {f"{i}.{name}": s for i in range(max(1, megabytes * 1_000_000 // each)) for name, s in layer.items()}


class Live:
    """A receiver's tensors: qkv and gate_up fused, cut over ``size`` ranks."""

    _FUSED: ClassVar = {
        "q": ("qkv", 0, 1024),
        "k": ("qkv", 1024, 256),
        "v": ("qkv", 1280, 256),
        "gate": ("gate_up", 0, 2816),
        "up": ("gate_up", 2816, 2816),
    }

    def __init__(self, model: Shapes, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.tensors: dict[str, torch.Tensor] = {}
        for layer in sorted({name.split(".")[0] for name in model}, key=int):
            for name, (rows, columns) in (("qkv", (1536, 1024)), ("gate_up", (5632, 1024))):
                self.tensors[f"{layer}.{name}"] = torch.zeros(rows // size, columns, dtype=torch.bfloat16)
            for name, (rows, columns) in (("o", (1024, 1024)), ("down", (1024, 2816))):
                self.tensors[f"{layer}.{name}"] = torch.zeros(rows, columns // size, dtype=torch.bfloat16)

    def load(self, weights: Any) -> None:
        for name, weight in weights:
            layer, which = name.split(".")
            if which in self._FUSED:
                fused, begin, rows = self._FUSED[which]
                part = rows // self.size
                into = self.tensors[f"{layer}.{fused}"].narrow(0, begin // self.size, part)
                into.copy_(weight[self.rank * part : (self.rank + 1) * part])
            else:
                part = weight.shape[1] // self.size
                self.tensors[name].copy_(weight[:, self.rank * part : (self.rank + 1) * part])


def right(live: Live, model: Shapes, version: int) -> bool:
    """Whether every element of a receiver is what it should be."""
    wanted = Live(model, live.rank, live.size)
    wanted.load((name, value(shape, version, index)) for index, (name, shape) in enumerate(model.items()))
    return all(torch.equal(wanted.tensors[name], tensor) for name, tensor in live.tensors.items())


def value(shape: tuple[int, int], version: int, index: int) -> torch.Tensor:
    """Small whole numbers, which bf16 holds exactly: every element depends on its place, tensor and version."""
    rows = ((torch.arange(shape[0]) * 5 + version * 3 + index) % 61).to(torch.bfloat16)
    return rows[:, None] + (torch.arange(shape[1]) % 67).to(torch.bfloat16)


class Contender:
    """Base: ``setup`` once, ``send`` on trainers, ``receive`` on receivers."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.role, self.rank = arguments["role"], int(arguments["rank"])
        self.trainers, self.receivers = int(arguments["trainers"]), int(arguments["receivers"])
        self.nic, self.model = arguments["nic"], shapes(int(arguments["megabytes"]))
        self.port = int(arguments["port"])
        self.store = tcp_store("127.0.0.1", self.port)
        self.key = f"{arguments['contender']}"
        self.live = Live(self.model, self.rank, self.receivers) if self.role == "receiver" else None
        self.parts: dict[str, torch.Tensor] = {}
        if self.role == "trainer":
            for name, (rows, columns) in self.model.items():
                self.parts[name] = torch.zeros(rows // self.trainers, columns, dtype=torch.bfloat16)

    def step(self, version: int) -> None:
        for index, (name, shape) in enumerate(self.model.items()):
            rows = shape[0] // self.trainers
            self.parts[name].copy_(value(shape, version, index)[self.rank * rows : (self.rank + 1) * rows])

    def meet(self, where: str, count: int) -> None:
        """Everybody waits for everybody."""
        key = f"{self.key}/{where}"
        if int(self.store.add(key, 1)) == count:
            self.store.set(f"{key}/all", b"1")
        self.store.wait([f"{key}/all"], timedelta(seconds=120))

    def setup(self) -> None: ...
    def send(self, version: int) -> None: ...
    def receive(self, version: int) -> None: ...
    def close(self) -> None: ...


class Railwire(Contender):
    def setup(self) -> None:
        self.engine = TransferEngine(nics=[self.nic], name=f"{self.role} {self.rank}")
        # A client of its own: one that waits serves nobody else.
        rendezvous = Rendezvous(tcp_store("127.0.0.1", self.port), prefix=self.key)
        if self.role == "trainer":
            boxes = {
                name: Box(part, self.model[name], (self.rank * part.shape[0], 0)) for name, part in self.parts.items()
            }
            source = describe_boxes(f"trainer {self.rank}", boxes)
            self.trainer = Trainer(
                self.engine, rendezvous, source, rank=self.rank, world_size=self.trainers, epoch=1, timeout=60
            )
            self.trainer.await_receivers(self.receivers)
        else:
            live = self.live
            assert live is not None

            def describe(checkpoint: Any) -> Destination:
                return record(f"{self.rank}", live.load, checkpoint, live.tensors)

            self.receiver = Receiver(self.engine, rendezvous, f"r{self.rank}", describe, mode="in_place")

    def send(self, version: int) -> None:
        self.trainer.update(version)

    def receive(self, version: int) -> None:
        self.receiver.wait(version, 60)

    def close(self) -> None:
        (self.trainer if self.role == "trainer" else self.receiver).close()
        self.engine.close()


class EngineWrites(Contender):
    """The bare engine: the same bytes, one write a pair, a counter at the receiver. No model arrives: the ceiling."""

    def setup(self) -> None:
        self.engine = TransferEngine(nics=[self.nic])
        total = 2 * sum(a * b for a, b in self.model.values())
        share = total // self.trainers // self.receivers
        if self.role == "receiver":
            self.memory = torch.zeros(share * self.trainers, dtype=torch.uint8)
            region = self.engine.register(self.memory)
            self.store.set(f"{self.key}/r{self.rank}", bytes(self.engine.address))
            self.store.set(f"{self.key}/d{self.rank}", bytes(region.descriptor))
            self.region = region
            return
        from railwire.memory import RemoteRegion

        self.targets = []
        for receiver in range(self.receivers):
            self.engine.connect(bytes(self.store.get(f"{self.key}/r{receiver}")))
            remote = RemoteRegion.from_bytes(bytes(self.store.get(f"{self.key}/d{receiver}")))
            self.targets.append(remote[share * self.rank : share * (self.rank + 1)])
        self.memory = torch.ones(share * self.receivers, dtype=torch.uint8)
        self.region, self.share = self.engine.register(self.memory), share

    def send(self, version: int) -> None:
        transfers = [
            self.engine.write(self.region[i * self.share : (i + 1) * self.share], target, imm=7)
            for i, target in enumerate(self.targets)
        ]
        for transfer in transfers:
            transfer.wait(60)

    def receive(self, version: int) -> None:
        self.engine.counter(7).expect(self.trainers, timeout=60).wait()

    def close(self) -> None:
        self.engine.close()


class Gloo(Contender):
    """torch.distributed: the trainers gather each tensor, trainer 0 broadcasts it, receivers load it."""

    def setup(self) -> None:
        rank = self.rank if self.role == "trainer" else self.trainers + self.rank
        world = self.trainers + self.receivers
        store = dist.PrefixStore("gloo", self.store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        self.inner = dist.new_group(list(range(self.trainers)))
        self.outer = dist.new_group([0, *range(self.trainers, world)])

    def send(self, version: int) -> None:
        for part in self.parts.values():
            pieces = [torch.empty_like(part) for _ in range(self.trainers)]
            dist.all_gather(pieces, part, group=self.inner)
            if self.rank == 0:
                dist.broadcast(torch.cat(pieces), 0, group=self.outer)

    def receive(self, version: int) -> None:
        assert self.live is not None
        for name, shape in self.model.items():
            whole = torch.empty(shape, dtype=torch.bfloat16)
            dist.broadcast(whole, 0, group=self.outer)
            self.live.load([(name, whole)])

    def close(self) -> None:
        dist.destroy_process_group()


class Nixl(Contender):
    """NIXL: each trainer writes what each receiver gets of it as one flat list of 1 MiB blocks (UCX's choice of
    transport). No resharding: the bytes alone, as if every shard were contiguous at both ends."""

    BLOCK = 1 << 20

    def setup(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        total = 2 * sum(a * b for a, b in self.model.values())
        share = total // self.trainers // self.receivers
        self.agent = nixl_agent(f"{self.role}{self.rank}", nixl_agent_config(backends=["UCX"]))
        if self.role == "receiver":
            self.memory = torch.zeros(share * self.trainers, dtype=torch.uint8)
            self.agent.register_memory([(self.memory.data_ptr(), self.memory.numel(), 0, "")], "DRAM")
            self.store.set(f"{self.key}/m{self.rank}", self.agent.get_agent_metadata())
            self.store.set(f"{self.key}/a{self.rank}", str(self.memory.data_ptr()).encode())
            return
        self.memory = torch.ones(share * self.receivers, dtype=torch.uint8)
        self.agent.register_memory([(self.memory.data_ptr(), self.memory.numel(), 0, "")], "DRAM")
        self.handles = []
        for receiver in range(self.receivers):
            name = self.agent.add_remote_agent(bytes(self.store.get(f"{self.key}/m{receiver}")))
            theirs = int(self.store.get(f"{self.key}/a{receiver}")) + share * self.rank
            ours = self.memory.data_ptr() + share * receiver
            blocks = [(at, min(self.BLOCK, share - at)) for at in range(0, share, self.BLOCK)]
            local = self.agent.get_xfer_descs([(ours + at, n, 0) for at, n in blocks], "DRAM")
            remote = self.agent.get_xfer_descs([(theirs + at, n, 0) for at, n in blocks], "DRAM")
            self.handles.append(self.agent.initialize_xfer("WRITE", local, remote, name, b"done"))

    def send(self, version: int) -> None:
        for handle in self.handles:
            self.agent.transfer(handle)
        for handle in self.handles:
            while (state := self.agent.check_xfer_state(handle)) == "PROC":
                time.sleep(0)
            if state != "DONE":
                raise RuntimeError(f"NIXL: {state}")

    def receive(self, version: int) -> None:
        seen = 0
        while seen < self.trainers:
            seen += sum(len(found) for found in self.agent.get_new_notifs().values())
            time.sleep(0)


CONTENDERS: dict[str, type[Contender]] = {"railwire": Railwire, "engine": EngineWrites, "gloo": Gloo, "nixl": Nixl}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    contender = CONTENDERS[arguments["contender"]](arguments)
    everybody = contender.trainers + contender.receivers
    contender.setup()
    seconds: list[float] = []
    for version in range(1, int(arguments["rounds"]) + 2):  # the first one is not counted
        if contender.role == "trainer":
            contender.step(version)
        contender.meet(f"start{version}", everybody)
        began = time.monotonic()
        if contender.role == "trainer":
            contender.send(version)
        else:
            contender.receive(version)
        contender.meet(f"end{version}", everybody)
        seconds.append(time.monotonic() - began)
    correct: bool | None = None
    if contender.live is not None and arguments["contender"] in ("railwire", "gloo"):
        correct = right(contender.live, contender.model, version)
    nbytes = 2 * sum(a * b for a, b in contender.model.values())
    print(json.dumps({"seconds": seconds[1:], "right": correct, "bytes": nbytes}), flush=True)
    contender.meet("bye", everybody)
    contender.close()
    sys.stdout.flush()
    os._exit(0)  # NIXL's wheel crashes at the interpreter's exit


if __name__ == "__main__":
    main()
