"""vLLM's weight-transfer interface over railwire.weights: backend ``railwire``, for vLLM 0.32.

Worker side: ``WeightTransferConfig(backend="railwire")``, which the entry point ``vllm.general_plugins`` registers.
Trainer side: :class:`RailwireTrainerEngine`, with any of vLLM's clients (HTTP, Ray) or one of your own.

vLLM goes on serving while an update lands in a copy (``mode="staged"``). The copy is taken over inside
``update_weights``, between two steps of the model. With ``mode="in_place"`` pause generation around the update.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from railwire.engine import TransferEngine
from railwire.weights import Destination, Receiver, Rendezvous, Trainer, UpdateError, record, tcp_store
from railwire.weights.errors import RecordingError

BACKEND = "railwire"


@dataclass
class RailwireInitInfo(WeightTransferInitInfo):
    """Where the trainers' TCPStore is, and how to take part."""

    host: str
    port: int
    secret: str = ""
    prefix: str = "railwire/weights"
    name: str = ""
    mode: str = "staged"
    nics: list[str] = field(default_factory=lambda: ["auto"])
    timeout: float = 300.0


@dataclass
class RailwireUpdateInfo(WeightTransferUpdateInfo):
    """Which version to wait for; ``failed``: the key that appears in the store if it will not come."""

    version: int
    failed: str


class RailwireWeightTransferEngine(WeightTransferEngine[RailwireInitInfo, RailwireUpdateInfo]):
    """The worker's side. All calls come on the worker's own thread, on which the model runs."""

    init_info_cls = RailwireInitInfo
    update_info_cls = RailwireUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: RailwireInitInfo) -> None:
        rank = self.parallel_config.rank + self.parallel_config.data_parallel_index * self.parallel_config.world_size
        name = f"{init_info.name or 'vllm'}/{rank}"
        nics: Any = "auto" if init_info.nics == ["auto"] else init_info.nics
        device = "cpu" if self.device.type == "cpu" else str(self.device)
        self._engine = TransferEngine(device, nics, secret=init_info.secret, name=name)
        self._rendezvous = rendezvous = Rendezvous(
            tcp_store(init_info.host, init_info.port), secret=init_info.secret, prefix=init_info.prefix
        )
        self._timeout = init_info.timeout
        self._receiver = Receiver(
            self._engine, rendezvous, name, self._describe,
            mode=init_info.mode, timeout=init_info.timeout,  # type: ignore[arg-type]
        )  # fmt: skip
        # The model runs on this thread: a version is published only where update_weights() lets go.
        self._serving = self._receiver.serving()
        self._serving.__enter__()

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: RailwireUpdateInfo) -> None:
        """Raises TimeoutError if the version is not published; the old one goes on being served."""
        self._serving.__exit__(None, None, None)
        deadline = time.monotonic() + self._timeout
        try:
            while True:
                try:
                    self._receiver.wait(update_info.version, 0.5)
                    return
                except TimeoutError:
                    if self._rendezvous.has(f"failed/{update_info.failed}") or time.monotonic() > deadline:
                        raise
        finally:
            self._serving = self._receiver.serving()
            self._serving.__enter__()

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        if hasattr(self, "_receiver"):
            self._serving.__exit__(None, None, None)
            self._receiver.close()
            self._engine.close()

    def _describe(self, checkpoint: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Destination:
        from vllm.config import set_current_vllm_config

        live = dict(self.model.named_parameters(remove_duplicate=False))
        packed = [name for name, tensor in live.items() if tensor.numel() == 0]
        if packed:
            raise RecordingError(
                f"{packed[0]} and {len(packed) - 1} others have been packed after loading, so nothing can be written "
                "into them: on a CPU, set RAILWIRE_VLLM_WEIGHTS=1 before the model is loaded"
            )
        with set_current_vllm_config(self.vllm_config):
            return record("vllm", self.model.load_weights, checkpoint, live)


@dataclass
class RailwireTrainerInitInfo(TrainerInitInfo):
    """The trainer's side of :class:`RailwireInitInfo`; ``receivers``: how many workers there are in all."""

    backend: ClassVar[str] = BACKEND
    host: str
    port: int
    receivers: int
    world_size: int = 1
    epoch: int | None = None
    secret: str = ""
    prefix: str = "railwire/weights"
    nics: list[str] = field(default_factory=lambda: ["auto"])
    mode: str = "staged"
    staging_bytes: int = 1 << 30
    timeout: float = 300.0


class RailwireTrainerEngine(TrainerWeightTransferEngine[RailwireTrainerInitInfo]):
    """The trainer's side. Parameters come from ``source._module`` (vLLM's ModuleSource), sharded as they are."""

    init_info_cls = RailwireTrainerInitInfo

    @classmethod
    def trainer_init(
        cls, init_info: RailwireTrainerInitInfo, *, client: Any, source: Any = None
    ) -> RailwireTrainerEngine:
        module = getattr(source, "_module", None)
        if module is None:
            raise ValueError("the railwire backend takes vLLM's ModuleSource: it sends shards as they lie")
        self = cls(client=client, source=source, is_sender=init_info.is_sender)
        nics: Any = "auto" if init_info.nics == ["auto"] else init_info.nics
        device = next(module.parameters()).device
        self._engine = TransferEngine(
            "cpu" if device.type == "cpu" else str(device), nics, secret=init_info.secret,
            name=f"trainer {init_info.rank}",
        )  # fmt: skip
        self._rendezvous = rendezvous = Rendezvous(
            tcp_store(init_info.host, init_info.port), secret=init_info.secret, prefix=init_info.prefix
        )
        self._trainer = Trainer(
            self._engine, rendezvous, module.named_parameters(remove_duplicate=False), rank=init_info.rank,
            world_size=init_info.world_size, epoch=init_info.epoch, staging_bytes=init_info.staging_bytes,
            timeout=init_info.timeout,
        )  # fmt: skip
        self._version = 0
        if self.is_sender:
            client.init_weight_transfer_engine(
                {
                    "host": init_info.host, "port": init_info.port, "secret": init_info.secret,
                    "prefix": init_info.prefix, "nics": init_info.nics, "mode": init_info.mode,
                    "timeout": init_info.timeout,
                }
            )  # fmt: skip
            self._trainer.await_receivers(init_info.receivers, init_info.timeout)
        return self

    def send_weights(self) -> None:
        """Publishes the module's parameters as the next version. Raises UpdateError; vLLM then serves the old one."""
        self._version += 1
        if not self.is_sender:
            self._trainer.update(self._version)
            return
        self.client.start_weight_update()
        failed: list[Exception] = []
        key = secrets.token_hex(8)

        def write() -> None:
            try:
                self._trainer.update(self._version)
            except UpdateError as error:
                failed.append(error)
                self._rendezvous.put(f"failed/{key}", b"")

        # Written while vLLM serves; the workers are asked to take over only what has been published or is about to be.
        thread = threading.Thread(target=write, name="railwire-send-weights")
        thread.start()
        try:
            self.client.update_weights({"version": self._version, "failed": key})
        finally:
            thread.join()
            if failed:
                raise failed[0]
        self.client.finish_weight_update(str(self._version))

    def shutdown(self) -> None:
        self._trainer.close()
        self._engine.close()
