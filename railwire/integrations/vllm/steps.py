"""What the scheduler's half tells the workers' half with each step, and the handshake data that goes the other way."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from railwire.integrations.vllm.options import Prefiller


@dataclass
class SendStep:
    """A request of which this step computes KV that a decoder wants. ``end_token``: after the step, the KV of tokens
    0..end_token is there. ``new_blocks`` follow those named before, from token 0 on after a preemption."""

    request_id: str
    transfer_id: str
    num_tokens: int
    new_blocks: list[int]
    end_token: int


@dataclass
class Receive:
    """Get the KV of tokens first_token..num_tokens into these blocks (from token 0 on)."""

    request_id: str
    transfer_id: str
    prefiller: Prefiller
    blocks: list[int]
    first_token: int
    num_tokens: int


@dataclass
class Announce:
    """Tell the prefiller that this request stands in our queue: a Receive or a Decline follows in a later step."""

    transfer_id: str
    prefiller: Prefiller


@dataclass
class Decline:
    """Tell the prefiller that nobody will come for it."""

    request_id: str
    transfer_id: str
    prefiller: Prefiller
    reason: str


@dataclass
class Step(KVConnectorMetadata):
    """Everything of one step. Keys are vLLM's request ids, but of ``refusals``, whose are transfer ids.

    ``preempted`` comes first: the blocks of these may be overwritten in this step. Some may be in ``aborts``, too.

    ``expects`` are transfer ids of prefills that have come into the queue and were not scheduled at once: a SendStep or
    a refusal follows in a later step. ``announces`` are the same on the decode side."""

    preempted: list[str] = field(default_factory=list)
    expects: dict[str, str] = field(default_factory=dict)
    sends: list[SendStep] = field(default_factory=list)
    aborts: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    announces: dict[str, Announce] = field(default_factory=dict)
    receives: list[Receive] = field(default_factory=list)
    cancels: dict[str, str] = field(default_factory=dict)
    declines: list[Decline] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether there is anything in it."""
        return bool(
            self.preempted
            or self.expects
            or self.sends
            or self.aborts
            or self.refusals
            or self.announces
            or self.receives
            or self.cancels
            or self.declines
        )


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Of a worker: the descriptor of its sender (empty if it has none), and what the instance is."""

    descriptor: bytes
    instance: str
    fingerprint: str
    incarnation: str
    block_tokens: int
    num_blocks: int
