"""A trainer process of the demo: `python -m railwire.demo.weights.training`, one per rank, environment as torchrun's.

Takes its orders from stdin, a line each, and answers on stdout in JSON: ``train``, ``update VERSION``, ``save PATH``,
``quit``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from railwire.demo.weights.model import Trained, checkpoint
from railwire.engine import TransferEngine
from railwire.runner import weights
from railwire.weights import Rendezvous, Trainer, UpdateError, tcp_store

TOKENS = 48


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def build(model: str, saved: Path | None) -> tuple[Trained, object]:
    """The model on a mesh of 2 (FSDP2) x 2 (tensor parallelism of the MLPs; 9 heads cannot be halved)."""
    loaded = weights.load(model, torch.float32) if model != "tiny" else weights.tiny(torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    trained = Trained(loaded.config)
    state = checkpoint(loaded.config, loaded.tensors) if saved is None else torch.load(saved, weights_only=True)
    trained.load_state_dict(state)
    for layer in trained.layers:
        parallelize_module(
            layer,
            mesh["tp"],
            {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()},
        )
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(trained, mesh=mesh["dp"])
    return trained, loaded.tokenizer


def batch(tokenizer: object, text: str, rank: int, step: int) -> torch.Tensor:
    """Each data-parallel rank has its own piece of the text."""
    ids = tokenizer.encode(text) if tokenizer is not None else [ord(c) % 256 for c in text]  # type: ignore[attr-defined]
    begin = (step * 2 + rank) * TOKENS % max(1, len(ids) - TOKENS - 1)
    return torch.tensor([ids[begin : begin + TOKENS + 1]])


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    host, port, secret, model = (os.environ[f"RAILWIRE_DEMO_{name}"] for name in ("HOST", "PORT", "SECRET", "MODEL"))
    saved = os.environ.get("RAILWIRE_DEMO_SAVED")
    trained, tokenizer = build(model, Path(saved) if saved else None)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)
    text = Path(os.environ["RAILWIRE_DEMO_TEXT"]).read_text(encoding="utf-8")
    rendezvous = Rendezvous(tcp_store(host, int(port)), secret=secret)
    nics = os.environ["RAILWIRE_DEMO_NICS"].split(",")
    engine = TransferEngine(nics=nics, secret=secret, name=f"trainer {rank}", liveness=2.0)
    trainer = Trainer(engine, rendezvous, trained.named_parameters(), staging_bytes=256 << 20, timeout=60.0)
    say(event="ready", rank=rank)
    step = 0
    for line in sys.stdin:
        order, *arguments = line.split()
        if order == "train":
            optimizer.zero_grad()
            loss = trained(batch(tokenizer, text, rank // 2, step))
            loss.backward()
            optimizer.step()
            step += 1
            say(event="trained", rank=rank, loss=float(loss.detach()))
        elif order == "await":
            trainer.await_receivers(int(arguments[0]))
            say(event="joined", rank=rank)
        elif order == "update":
            update(trainer, rank, int(arguments[0]))
        elif order == "save":
            state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                torch.save(state, arguments[0])
            say(event="saved", rank=rank)
        else:
            break
    trainer.close()
    engine.close(1.0)
    os._exit(0)  # gloo's threads may wait for a rank that has been killed


def update(trainer: Trainer, rank: int, version: int) -> None:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.05 or done == total:
            last = time.monotonic()
            say(event="progress", rank=rank, done=done, total=total)

    try:
        report = trainer.update(version, progress=progress)
    except UpdateError as error:
        say(event="failed", rank=rank, version=version, problem="; ".join(error.problems))
        return
    say(
        event="updated", rank=rank, version=version, seconds=report.seconds, nbytes=dict(report.nbytes),
        spans=[list(span) for span in report.spans], high_water=trainer.staging_high_water,
    )  # fmt: skip


if __name__ == "__main__":
    main()
