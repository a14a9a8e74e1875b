"""The connector's half in vLLM's scheduler: which requests are pushed or fetched, and what each step tells the workers.

Nothing here may raise for what a request says: an exception would end the engine. A request whose parameters cannot be
is computed here like any other (decode leg), or not pushed (prefill leg).

A request of the prefill leg: new -> opened (a step with it went to the workers) -> finished; its blocks are held from
there until the workers report it sent, which they do exactly once. A request of the decode leg: new -> receiving
(blocks allocated, WAITING_FOR_REMOTE_KVS) -> reported by the workers, exactly once, also after an abort.

A request that stays new beyond the step it came in stands in a queue, and the other side is told: nobody has to guess
how long the queue is. Each of these words is followed by another, whatever becomes of the request: a prefill that was
expected is opened or refused, a decode leg that was announced receives or declines.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from railwire.integrations.vllm.layout import only_group
from railwire.integrations.vllm.options import DecodeParams, Options, PrefillParams, decode_params, prefill_params
from railwire.integrations.vllm.steps import Announce, Decline, Handshake, Receive, SendStep, Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = init_logger("vllm.railwire")


@dataclass
class _Prefill:
    request: Request
    params: PrefillParams
    num_tokens: int
    opened: bool = False
    named_blocks: int = 0
    end_token: int = 0


class ConnectorScheduler:
    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options) -> None:
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        self.vllm_config = vllm_config
        self.options = options
        self.sends = bool(transfer.is_kv_producer)
        self.receives = bool(transfer.is_kv_consumer)
        self.group = only_group(kv_cache_config)
        self.handshakes: list[Handshake] = []
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[str, DecodeParams] = {}  # whose blocks are not allocated yet
        self._receiving: set[str] = set()
        self._step = Step()

    # ---- as requests come --------------------------------------------------------------------------------------------
    def on_new_request(self, request: Request) -> None:
        count = len(request.prompt_token_ids or ()) - 1
        try:
            prefill = prefill_params(request.kv_transfer_params, request.request_id) if self.sends else None
            decode = decode_params(request.kv_transfer_params) if self.receives else None
        except ValueError as error:
            log.error("railwire: request %s: kv_transfer_params: %s", request.request_id, error)
            return
        if prefill is not None and count > 0:
            self._prefills[request.request_id] = _Prefill(request, prefill, count)
            self._step.expects[request.request_id] = prefill.transfer_id
        # A prompt of one token has nothing to fetch, and a prefiller nothing to push.
        if decode is not None and count > 0:
            self._decodes[request.request_id] = decode
            self._step.announces[request.request_id] = Announce(decode.transfer_id, decode.prefiller)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of prefill legs that are still to be computed."""
        return sum(prefill.num_tokens - prefill.end_token for prefill in list(self._prefills.values()))

    def num_new_matched_tokens(self, request: Request, num_computed: int) -> tuple[int, bool]:
        if request.request_id not in self._decodes:
            return 0, False
        # All but the last token: that one is computed here, and the first answer sampled from it.
        count = len(request.prompt_token_ids or ()) - 1 - num_computed
        return (count, True) if count > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        decode = self._not_new(request.request_id)
        if decode is None:
            return
        if num_external <= 0:
            self._decline(request.request_id, decode, "the decoder has all of it")
            return
        count = len(request.prompt_token_ids or ()) - 1
        self._receiving.add(request.request_id)
        self._step.receives.append(
            Receive(
                request.request_id,
                decode.transfer_id,
                decode.prefiller,
                list(blocks.get_block_ids()[self.group]),
                count - num_external,
                count,
            )
        )

    def _not_new(self, request_id: str) -> DecodeParams | None:
        """Takes a decode leg out of those that wait for blocks; None: it is none, or waits no more."""
        self._step.announces.pop(request_id, None)  # what follows in the same step says more
        return self._decodes.pop(request_id, None)

    def _decline(self, request_id: str, decode: DecodeParams, reason: str) -> None:
        self._step.declines.append(Decline(request_id, decode.transfer_id, decode.prefiller, reason))

    # ---- each step ---------------------------------------------------------------------------------------------------
    def build_step(self, output: SchedulerOutput) -> Step:
        step, self._step = self._step, Step()
        for request_id in output.preempted_req_ids or ():
            prefill = self._prefills.get(request_id)
            if prefill is not None and prefill.opened:
                prefill.named_blocks = prefill.end_token = 0
                step.preempted.append(request_id)
            elif request_id in step.aborts:
                # Preempted and aborted since the last step. An abort does not wait, so the workers must hear of both.
                step.preempted.append(request_id)
        state = output.kv_connector_block_state
        for request_id, count in output.num_scheduled_tokens.items():
            prefill = self._prefills.get(request_id)
            if prefill is None or (prefill.opened and prefill.end_token == prefill.num_tokens):
                continue
            all_blocks = state.get_block_ids(request_id) if state is not None else None
            if all_blocks is None:
                continue
            blocks = list(all_blocks[self.group])
            end = min(prefill.request.num_computed_tokens + count, prefill.num_tokens)
            step.sends.append(
                SendStep(
                    request_id, prefill.params.transfer_id, prefill.num_tokens, blocks[prefill.named_blocks :], end
                )
            )
            step.expects.pop(request_id, None)  # it never stood in a queue
            prefill.opened, prefill.named_blocks, prefill.end_token = True, len(blocks), end
        return step

    @property
    def pending(self) -> bool:
        """Whether the workers must be told something although no request is left."""
        return self._step.busy

    def update_output(self, output: KVConnectorOutput) -> None:
        self._receiving.difference_update(output.finished_recving or ())

    # ---- as requests end ---------------------------------------------------------------------------------------------
    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        decode = self._not_new(request_id)
        if decode is not None:
            self._decline(request_id, decode, "the request ended before it was scheduled")
        if request_id in self._receiving:
            self._step.cancels[request_id] = f"the request has ended ({request.status.name})"
        prefill = self._prefills.pop(request_id, None)
        if prefill is None:
            return False, None
        whole = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if not prefill.opened:
            reason = f"the prefiller did not compute it ({request.status.name})"
            self._step.expects.pop(request_id, None)
            self._step.refusals[prefill.params.transfer_id] = reason
            return False, None
        if not whole or prefill.end_token < prefill.num_tokens:
            self._step.aborts[request_id] = f"the prefill ended early ({request.status.name})"
            return True, None
        return True, self._decode_leg(prefill)

    def _decode_leg(self, prefill: _Prefill) -> dict[str, Any] | None:
        """For routers that send the legs one after the other: what the decode leg's kv_transfer_params must be."""
        if not self.handshakes:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": prefill.params.transfer_id,
            "prefiller": {
                "instance": self.handshakes[0].instance,
                "ranks": [base64.b64encode(handshake.descriptor).decode() for handshake in self.handshakes],
            },
        }

    def set_handshakes(self, by_place: dict[tuple[int, int], Handshake]) -> None:
        """Of all workers, by (pipeline stage, tensor rank)."""
        self.handshakes = [by_place[place] for place in sorted(by_place)]
