"""fp8 where FSDP2's shards cut blocks: two real ranks gather, and each quantises whole blocks, bit by bit right."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from processes import Child, State
from test_weights_update import reference_fp8
from torch import nn

from railwire import TransferEngine
from railwire.weights import Receiver, Rendezvous, Trainer, record, tcp_store

NIC = ["tcp://127.0.0.1"]
SECRET = "between us"


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(300, 500, bias=False).bfloat16()


def start(state: State, rank: int, port: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    state.store = dist.PrefixStore("gloo", tcp_store("127.0.0.1", port))
    dist.init_process_group("gloo", store=state.store, rank=rank, world_size=2)
    state.model = model()
    fully_shard(state.model, mesh=init_device_mesh("cpu", (2,)))
    state.engine = TransferEngine(nics=NIC, secret=SECRET)
    rendezvous = Rendezvous(tcp_store("127.0.0.1", port), secret=SECRET)
    state.trainer = Trainer(
        state.engine, rendezvous, state.model.named_parameters(), timeout=20, staging_bytes=400_000, checksum=True
    )
    state.trainer.await_receivers(1, 20)


def update(state: State, version: int) -> tuple[int, int, list[str]]:
    report = state.trainer.update(version)
    return sum(report.nbytes.values()), state.trainer.staging_high_water, [span.stage for span in report.spans]


def stop(state: State) -> None:
    state.trainer.close()
    state.engine.close()


def test_fp8_over_a_gather() -> None:
    store = tcp_store("127.0.0.1", 0, server=True)
    live = {"w": torch.zeros(500, 300).to(torch.float8_e4m3fn), "s": torch.zeros(4, 3)}

    def load(weights) -> None:  # type: ignore[no-untyped-def]
        for name, weight in weights:
            live["s" if name.endswith("_scale_inv") else "w"].copy_(weight)

    def describe(checkpoint):  # type: ignore[no-untyped-def]
        return record("r", load, {**checkpoint, "weight_scale_inv": ((4, 3), torch.float32)}, live)

    children = [Child(f"trainer {rank}") for rank in range(2)]
    engine = TransferEngine(nics=NIC, secret=SECRET)
    receiver = Receiver(engine, Rendezvous(tcp_store("127.0.0.1", store.port), secret=SECRET), "r", describe)
    try:
        for rank, child in enumerate(children):
            child.begin(start, rank, store.port)
        for child in children:
            child.answer(60)
        for version in (1, 2):
            for child in children:
                child.begin(update, version)
            answers = [child.answer(60) for child in children]
        assert sum(nbytes for nbytes, _, _ in answers) == 500 * 300 + 4 * 3 * 4
        assert all(0 < high <= 400_000 for _, high, _ in answers)
        assert receiver.wait(2, 5) == 2
        out, scales = torch.empty(500, 300).to(torch.float8_e4m3fn), torch.empty(4, 3)
        reference_fp8(model().weight.detach(), out, scales)
        assert torch.equal(scales, live["s"])
        assert torch.equal(out.view(torch.uint8), live["w"].view(torch.uint8))
        for child in children:
            child.call(stop)
    finally:
        receiver.close()
        engine.close()
        for child in children:
            child.kill()
