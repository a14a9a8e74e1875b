"""Ray actors as trainers and receivers, which find each other through a store that is an actor. Runs where Ray is
installed: ``pip install ray``, then ``pytest -m slow tests/test_weights_ray.py``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray")

SHAPE = (64, 32)


def whole(version: int) -> torch.Tensor:
    return (torch.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) % 97 + version).float()


class TrainerActor:
    """Holds half of the rows."""

    def __init__(self, rank: int, store: Any) -> None:
        from railwire import TransferEngine
        from railwire.weights import Box, RayStore, Rendezvous, Trainer, describe_boxes

        self.rank, self.part = rank, torch.zeros(32, 32)
        self.engine = TransferEngine(nics=["tcp://127.0.0.1"], secret="s")
        source = describe_boxes(f"trainer {rank}", {"w": Box(self.part, SHAPE, (32 * rank, 0))})
        rendezvous = Rendezvous(RayStore(store), secret="s")
        self.trainer = Trainer(self.engine, rendezvous, source, rank=rank, world_size=2, epoch=1, timeout=150)

    def update(self, version: int) -> int:
        self.part.copy_(whole(version)[32 * self.rank :][:32])
        self.trainer.await_receivers(2)
        return sum(self.trainer.update(version).nbytes.values())

    def close(self) -> None:
        self.trainer.close()
        self.engine.close()


class ReceiverActor:
    """Holds half of the columns."""

    def __init__(self, rank: int, store: Any) -> None:
        from railwire import TransferEngine
        from railwire.weights import RayStore, Receiver, Rendezvous, record

        self.columns, self.live = slice(16 * rank, 16 * rank + 16), torch.zeros(64, 16)
        self.engine = TransferEngine(nics=["tcp://127.0.0.1"], secret="s")
        self.receiver = Receiver(
            self.engine,
            Rendezvous(RayStore(store), secret="s"),
            f"receiver {rank}",
            lambda checkpoint: record("r", self.load, checkpoint, {"w": self.live}),
        )

    def load(self, weights: Any) -> None:
        for _, weight in weights:
            self.live.copy_(weight[:, self.columns])

    def right(self, version: int) -> bool:
        self.receiver.wait(version)
        with self.receiver.serving():
            return torch.equal(self.live, whole(version)[:, self.columns])

    def close(self) -> None:
        self.receiver.close()
        self.engine.close()


@pytest.mark.slow
@pytest.mark.timeout(400)  # five processes import torch
def test_two_trainers_and_two_receivers_are_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    from railwire.weights import MemoryStore

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster of this machine, that leaves no token behind
    paths = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    ray.init(num_cpus=5, include_dashboard=False, object_store_memory=100 << 20, runtime_env={"env_vars": environment})
    try:
        store = ray.remote(MemoryStore).remote()
        receivers = [ray.remote(ReceiverActor).remote(rank, store) for rank in range(2)]
        trainers = [ray.remote(TrainerActor).remote(rank, store) for rank in range(2)]
        for version in (1, 2):
            sent = ray.get([one.update.remote(version) for one in trainers], timeout=200)
            assert sent == [32 * 32 * 4] * 2
            assert ray.get([one.right.remote(version) for one in receivers], timeout=60) == [True, True]
        ray.get([one.close.remote() for one in (*trainers, *receivers)], timeout=60)
    finally:
        ray.shutdown()
