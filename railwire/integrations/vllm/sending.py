"""The prefill side in a worker: the pushes of the requests that it computes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from vllm.logger import init_logger

from railwire.errors import RailwireError
from railwire.integrations.vllm.layers import LayerClock
from railwire.integrations.vllm.stats import RailwireStats
from railwire.kvcache import Push, PushCancelled, Sender

if TYPE_CHECKING:
    import numpy.typing as npt

    from railwire.integrations.vllm.steps import SendStep, Step

log = init_logger("vllm.railwire")


@dataclass
class _Sending:
    """``push`` is None if it could not be opened: the request is then reported as soon as it ends."""

    push: Push | None
    transfer_id: str
    num_tokens: int
    end_token: int = 0
    computed: float = 0.0
    """When the step that computed the last of it had ended; monotonic seconds."""


class Sending:
    """Driven by vLLM's worker thread alone.

    Args:
        clock: says when a layer of this step is in memory.
        kernel_blocks: blocks of the tensors per block of the scheduler.
        withdraw_timeout: seconds that a preempted request's writes may take before its push is given up.
    """

    def __init__(
        self,
        sender: Sender,
        clock: LayerClock,
        kernel_blocks: int,
        stats: RailwireStats,
        withdraw_timeout: float,
        trace: str,
    ) -> None:
        self.sender = sender
        self.clock = clock
        self.kernel_blocks = kernel_blocks
        self.stats = stats
        self.withdraw_timeout = withdraw_timeout
        self.trace = trace
        self._layers = [storage.layer for storage in sender.layout.layers]
        self._open: dict[str, _Sending] = {}
        self._ending: set[str] = set()

    # ---- a step ------------------------------------------------------------------------------------------------------
    def preempt(self, request_ids: list[str]) -> None:
        """Their blocks will be overwritten in this step: returns when no NIC reads them."""
        for request_id in request_ids:
            sending = self._open.get(request_id)
            if sending is None or sending.push is None:
                continue
            self.stats.count("preempted_pushes")
            self.clock.withdraw(sending.push)
            if not sending.push.withdraw_blocks(self.withdraw_timeout):
                log.warning("railwire: the push of preempted request %s is given up", request_id)
            sending.end_token = 0

    def begin(self, step: Step) -> None:
        """Before the forward pass."""
        for transfer_id, reason in step.refusals.items():
            self.sender.refuse(transfer_id, reason)
        for transfer_id in step.expects.values():  # after the refusals, which are of earlier requests
            self.sender.expect(transfer_id)
        for request_id, reason in step.aborts.items():
            sending = self._open.get(request_id)
            if sending is not None and sending.push is not None:
                sending.push.abort(reason)
        items = []
        for send in step.sends:
            push = self._advance(send)
            if push is not None:
                items.append((push, send.end_token))
        self.clock.begin(items, self._layers)

    def _advance(self, send: SendStep) -> Push | None:
        sending = self._open.get(send.request_id)
        if sending is None:
            push: Push | None = None
            try:
                push = self.sender.open(send.transfer_id, send.num_tokens)
            except (ValueError, RailwireError) as error:
                log.error("railwire: request %s cannot be pushed: %s", send.request_id, error)
                self.stats.count("failed_pushes")
            sending = self._open[send.request_id] = _Sending(push, send.transfer_id, send.num_tokens)
        sending.end_token = send.end_token
        if sending.push is None or sending.push.done.done():
            return None
        sending.push.append_blocks(expand(send.new_blocks, self.kernel_blocks))
        return sending.push

    def layer_saved(self, layer: int) -> None:
        """The layer's KV of this step is written, or will be when the device's stream gets there."""
        self.clock.layer(layer)

    def end(self) -> None:
        """After the forward pass."""
        now = self.clock.end()
        for sending in self._open.values():
            if sending.computed == 0 and sending.end_token == sending.num_tokens:
                sending.computed = now

    # ---- reports -----------------------------------------------------------------------------------------------------
    def finished(self, ended_requests: set[str]) -> set[str]:
        """Requests whose blocks may be freed: they have ended, and no NIC reads from them. Each once."""
        self._ending |= ended_requests & self._open.keys()
        reported = set()
        for request_id in list(self._ending):
            sending = self._open[request_id]
            if sending.push is not None and not sending.push.done.done():
                continue
            self._ending.discard(request_id)
            del self._open[request_id]
            reported.add(request_id)
            if sending.push is not None:
                self._account(sending, sending.push)
        return reported

    def _account(self, sending: _Sending, push: Push) -> None:
        error = push.done.exception()
        if error is not None:
            self.stats.count("cancelled_pushes" if isinstance(error, PushCancelled) else "failed_pushes")
            log.info("railwire: push %s: %s", sending.transfer_id, error)
        else:
            hidden = push.timeline.hidden(sending.computed)
            self.stats.pushed(push.nbytes, hidden)
        if self.trace:
            self._trace(sending, push, error)

    def _trace(self, sending: _Sending, push: Push, error: BaseException | None) -> None:
        layers = push.timeline.layers
        record = {
            "transfer_id": sending.transfer_id,
            "tokens": sending.num_tokens,
            "bytes": push.nbytes,
            "opened": push.timeline.opened,
            "computed": sending.computed,
            "ended": time.monotonic(),
            "error": str(error or ""),
            "hidden": push.timeline.hidden(sending.computed),
            "layers": [
                {"layer": index, "ready": t.ready, "posted": t.posted, "landed": t.landed, "bytes": t.nbytes}
                for index, t in sorted(layers.items())
            ],
        }
        try:
            with open(self.trace, "ab") as file:
                file.write(msgspec.json.encode(record) + b"\n")
        except OSError as failure:
            log.warning("railwire: cannot write the trace %s: %s", self.trace, failure)

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self.clock.close()
        self.sender.close(self.withdraw_timeout)


def expand(blocks: list[int], kernel_blocks: int) -> npt.NDArray[np.int64]:
    """Blocks of the scheduler as blocks of the tensors."""
    table = np.asarray(blocks, dtype=np.int64)
    if kernel_blocks == 1:
        return table
    return (table[:, None] * kernel_blocks + np.arange(kernel_blocks)).reshape(-1)
