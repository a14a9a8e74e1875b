"""A small engine that keeps vLLM's side of the contract with a connector, and asserts the connector's.

It schedules, allocates, preempts and frees as vLLM 0.32's scheduler does (v1/core/sched/scheduler.py), and checks what
that asserts: a report for an unknown request, or a second one, is an error. Blocks that nobody holds are filled with a
canary. KV is a function of layer, position and token, so wrong bytes are seen wherever they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.v1.request import RequestStatus

from railwire import TransferEngine
from railwire.integrations.vllm.layers import CpuClock
from railwire.integrations.vllm.options import Options
from railwire.integrations.vllm.receiving import Receiving
from railwire.integrations.vllm.scheduler import ConnectorScheduler
from railwire.integrations.vllm.sending import Sending
from railwire.integrations.vllm.stats import RailwireStats
from railwire.integrations.vllm.steps import Handshake
from railwire.kvcache import InstanceLayout, Receiver, Sender, paged_instance

LAYERS = 3
BLOCK = 4  # of the scheduler; the tensors' blocks may be smaller
CANARY = 0xEE
HEADS, HEAD_BYTES = 2, 16


def layout(num_blocks: int, kernel_blocks: int) -> InstanceLayout:
    return paged_instance(
        stages=[range(LAYERS)],
        model="m",
        num_blocks=num_blocks * kernel_blocks,
        block_tokens=BLOCK // kernel_blocks,
        kv_heads=HEADS,
        head_bytes=HEAD_BYTES,
        kv="last",
        placement="one",
    )


@dataclass(eq=False)
class Req:
    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None
    status: Any = RequestStatus.WAITING
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    local_hit: int = 0  # tokens that this engine has, a multiple of BLOCK
    held_by_connector: bool = False


class Engine:
    """One instance: scheduler and worker in one thread, as fast as :meth:`step` is called."""

    def __init__(
        self,
        role: str,
        nics: list[str],
        *,
        num_blocks: int = 12,
        kernel_blocks: int = 1,
        chunk: int = 8,
        patience: float = 10.0,
        queue_timeout: float = 30.0,
        transfer_timeout: float = math.inf,
    ) -> None:
        """``patience``: for what nobody has announced, on either side."""
        self.chunk = chunk
        self.num_blocks = num_blocks
        self.engine = TransferEngine(nics=nics, liveness=0.5, name=role)
        self.instance = layout(num_blocks, kernel_blocks)
        self.memory = np.full(self.instance.ranks[0].region_bytes[0], CANARY, np.uint8)
        region = self.engine.register(self.memory)
        self.stats = RailwireStats()
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(is_kv_producer=role == "prefill", is_kv_consumer=role == "decode")
        )
        self.half = ConnectorScheduler(config, SimpleNamespace(transfer_group_ids=(0,)), Options())  # type: ignore[arg-type]
        self.sending: Sending | None = None
        self.receiving: Receiving | None = None
        descriptor = b""
        if role == "prefill":
            sender = Sender(
                self.engine, self.instance, 0, [region], ticket_timeout=patience, queue_timeout=queue_timeout
            )
            self.sending = Sending(sender, CpuClock(self.stats), kernel_blocks, self.stats, 0.5, "")
            descriptor = sender.descriptor
        else:
            receiver = Receiver(self.engine, self.instance, 0, [region], drain_timeout=0.5)
            self.receiving = Receiving(receiver, kernel_blocks, self.stats, False, patience, transfer_timeout)
        self.half.set_handshakes({(0, 0): Handshake(descriptor, "i", "m", "", BLOCK, num_blocks)})
        self.descriptor = descriptor
        self.requests: dict[str, Req] = {}
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.free = list(range(num_blocks))
        self.finished_ids: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.preempted: set[str] = set()
        self.taken_away: list[int] = []
        self.done: dict[str, Any] = {}
        self.handed_on: dict[str, dict[str, Any] | None] = {}

    # ---- memory ------------------------------------------------------------------------------------------------------
    def place(self, layer: int, block: int, offset: int, head: int) -> npt.NDArray[np.uint8]:
        """K and V of one token and head."""
        rank = self.instance.ranks[0]
        storage = rank.layers[layer].storages[0]
        per_block = BLOCK // rank.block_tokens
        kernel, inside = block * per_block + offset // rank.block_tokens, offset % rank.block_tokens
        begin = storage.offset + kernel * storage.page_stride + inside * storage.token_stride
        begin += head * storage.head_stride
        return self.memory[begin : begin + 2 * HEAD_BYTES]

    @staticmethod
    def value(layer: int, position: int, token: int, head: int) -> int:
        return (layer * 53 + position * 7 + token * 3 + head * 101) % 200

    def write(self, req: Req, begin: int, end: int, layer: int) -> None:
        for position in range(begin, end):
            for head in range(HEADS):
                self.place(layer, req.blocks[position // BLOCK], position % BLOCK, head)[:] = self.value(
                    layer, position, req.prompt_token_ids[position], head
                )

    def holds(self, req: Req, end: int) -> bool:
        return all(
            (
                self.place(layer, req.blocks[position // BLOCK], position % BLOCK, head)
                == self.value(layer, position, req.prompt_token_ids[position], head)
            ).all()
            for layer in range(LAYERS)
            for position in range(end)
            for head in range(HEADS)
        )

    def _fill(self, blocks: list[int]) -> None:
        for block in blocks:
            for layer in range(LAYERS):
                for offset in range(BLOCK):
                    for head in range(HEADS):
                        self.place(layer, block, offset, head)[:] = CANARY

    def canaries_live(self) -> bool:
        return all(
            (self.place(layer, block, offset, head) == CANARY).all()
            for block in self.free
            for layer in range(LAYERS)
            for offset in range(BLOCK)
            for head in range(HEADS)
        )

    def _allocate(self, req: Req, tokens: int) -> bool:
        needed = -(-tokens // BLOCK) - len(req.blocks)
        if needed > len(self.free):
            return False
        taken, self.free = self.free[: max(0, needed)], self.free[max(0, needed) :]
        req.blocks += taken
        return True

    def _release(self, req: Req) -> None:
        self._fill(req.blocks)
        self.free += req.blocks
        req.blocks = []

    # ---- requests ----------------------------------------------------------------------------------------------------
    def add(self, req: Req) -> None:
        self.requests[req.request_id] = req
        self.waiting.append(req)
        self.half.on_new_request(req)  # type: ignore[arg-type]

    def finish(self, req: Req, status: Any) -> None:
        """As Scheduler.finish_requests and _free_request."""
        held = False
        if req.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            held = req.request_id not in self.received
            self.received.discard(req.request_id)
            self.failed.discard(req.request_id)
        for queue in (self.waiting, self.running):
            if req in queue:
                queue.remove(req)
        req.status = status
        delayed, self.handed_on[req.request_id] = self.half.request_finished(req)  # type: ignore[arg-type]
        self.finished_ids.add(req.request_id)
        self.done[req.request_id] = status
        if held or delayed:
            req.held_by_connector = True
        else:
            self._free_request(req)

    def _free_request(self, req: Req) -> None:
        self._release(req)
        del self.requests[req.request_id]

    def abort(self, request_id: str) -> None:
        req = self.requests.get(request_id)
        if req is not None and not RequestStatus.is_finished(req.status):
            self.finish(req, RequestStatus.FINISHED_ABORTED)

    def preempt(self, req: Req) -> None:
        """The blocks are free at once; what was in them is gone when the next step runs, after handle_preemptions()."""
        self.running.remove(req)
        self.free += req.blocks
        self.taken_away += req.blocks
        req.blocks = []
        req.status, req.num_computed_tokens = RequestStatus.PREEMPTED, 0
        self.waiting.insert(0, req)
        self.preempted.add(req.request_id)

    # ---- a step ------------------------------------------------------------------------------------------------------
    def step(self) -> None:
        scheduled: dict[str, int] = {}
        for req in list(self.running):
            count = min(self.chunk, len(req.prompt_token_ids) - req.num_computed_tokens)
            if count <= 0 or req not in self.running:
                continue
            while req in self.running and not self._allocate(req, req.num_computed_tokens + count):
                victim = self.running[-1]  # so that the first always gets on
                scheduled.pop(victim.request_id, None)
                self.preempt(victim)
            if req in self.running:
                scheduled[req.request_id] = count
        if not self.preempted:
            for req in list(self.waiting):
                self._admit(req, scheduled)
        output = SimpleNamespace(
            preempted_req_ids=self.preempted,
            num_scheduled_tokens=scheduled,
            kv_connector_block_state=SimpleNamespace(
                get_block_ids=lambda request_id: (list(self.requests[request_id].blocks),)
            ),
        )
        step = self.half.build_step(output)  # type: ignore[arg-type]
        self.preempted = set()
        spans = {}
        for request_id, count in scheduled.items():
            req = self.requests[request_id]
            spans[request_id] = (req.num_computed_tokens, req.num_computed_tokens + count)
            req.num_computed_tokens += count
        ended, self.finished_ids = self.finished_ids, set()
        # The worker.
        if self.sending is not None:
            self.sending.preempt(step.preempted)
        self._fill(self.taken_away)
        self.taken_away = []
        if self.sending is not None:
            self.sending.begin(step)
        if self.receiving is not None:
            self.receiving.begin(step)
        for layer in range(LAYERS):
            for request_id, (begin, end) in spans.items():
                self.write(self.requests[request_id], begin, end, layer)
            if spans and self.sending is not None:
                self.sending.layer_saved(layer)
        sent: set[str] = set()
        received: set[str] = set()
        failed: set[str] = set()
        if self.sending is not None:
            self.sending.end()
            sent = self.sending.finished(ended)
        if self.receiving is not None:
            received, failed = self.receiving.finished()
        # Scheduler.update_from_output
        for request_id in failed:
            req = self.requests[request_id]
            if req.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.finish(req, RequestStatus.FINISHED_ERROR)
        for request_id in scheduled:
            req = self.requests[request_id]
            if not RequestStatus.is_finished(req.status) and req.num_computed_tokens == len(req.prompt_token_ids):
                assert self.holds(req, len(req.prompt_token_ids)), f"{request_id} would give a wrong token"
                self.finish(req, RequestStatus.FINISHED_LENGTH_CAPPED)
        self.half.update_output(SimpleNamespace(finished_recving=received))  # type: ignore[arg-type]
        for request_id in received:
            req = self.requests[request_id]
            if req.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.received.add(request_id)
            else:
                assert RequestStatus.is_finished(req.status)
                self._free_request(req)
        for request_id in sent:
            assert self.requests[request_id].held_by_connector
            self._free_request(self.requests[request_id])

    def _admit(self, req: Req, scheduled: dict[str, int]) -> None:
        if req.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            if req.request_id not in self.received:
                return
            self.received.remove(req.request_id)
            req.status = RequestStatus.WAITING
            assert self.holds(req, req.num_computed_tokens), f"{req.request_id} was said to have arrived"
        elif req.num_computed_tokens == 0:
            external, wait = self.half.num_new_matched_tokens(req, req.local_hit)  # type: ignore[arg-type]
            total = req.local_hit + external
            # What waits for its KV must be sure of the blocks that it needs afterwards, as in vLLM.
            if not self._allocate(req, len(req.prompt_token_ids) if wait else max(1, total)):
                return
            if self.receiving is not None:  # a decoder's are read by no NIC, and it writes its hits here
                self._fill(self.taken_away)
                self.taken_away = []
            for layer in range(LAYERS):
                self.write(req, 0, req.local_hit, layer)
            blocks = SimpleNamespace(get_block_ids=lambda: (list(req.blocks),))
            self.half.update_state_after_alloc(req, blocks, external)  # type: ignore[arg-type]
            req.num_computed_tokens = total
            if wait:
                req.status = RequestStatus.WAITING_FOR_REMOTE_KVS
                return
        count = min(self.chunk, len(req.prompt_token_ids) - req.num_computed_tokens)
        if not self._allocate(req, req.num_computed_tokens + count):
            return
        self.waiting.remove(req)
        self.running.append(req)
        req.status = RequestStatus.RUNNING
        scheduled[req.request_id] = count

    @property
    def busy(self) -> bool:
        """Scheduler.has_requests: what keeps vLLM's loop going."""
        return bool(self.requests or self.finished_ids or self.half.pending)

    def idle(self) -> bool:
        """Nothing is held by anyone."""
        if self.requests or sorted(self.free) != list(range(self.num_blocks)):
            return False
        if self.sending is not None:
            sender = self.sending.sender
            return self.sending.open_requests == sender.open_pushes == sender.open_tickets == sender.announced == 0
        assert self.receiving is not None
        receiver = self.receiving.receiver
        return (
            self.receiving.open_requests == 0
            and not self.receiving._jobs
            and receiver.open_tickets == 0
            and receiver.slots.free == receiver.slots.count
        )

    def __str__(self) -> str:
        held = [
            f"{r.request_id} {r.status.name} {r.num_computed_tokens}/{len(r.prompt_token_ids)} blocks {r.blocks}"
            for r in self.requests.values()
        ]
        waiting, running = ([r.request_id for r in queue] for queue in (self.waiting, self.running))
        return f"{self.engine.name}: free {self.free} waiting {waiting} running {running}; " + "; ".join(held)

    def close(self) -> None:
        for part in (self.receiving, self.sending, self.engine):
            if part is not None:
                part.close()
