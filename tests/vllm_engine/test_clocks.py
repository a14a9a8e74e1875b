"""When a layer counts as written: steps that leave one out, save one twice, or in another order, on both clocks."""

from __future__ import annotations

import base64
import ctypes
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import Engine, Req
from vllm.v1.request import RequestStatus

from railwire.integrations.vllm import layers
from railwire.integrations.vllm.layers import CpuClock, CudaClock

Make = Callable[..., Engine]


class Word:
    """A StreamWord of a stream that has nothing else to do: the write is there at once."""

    def __init__(self, address: int) -> None:
        self.word = ctypes.c_uint64.from_address(address)

    def write(self, value: int, stream: int) -> None:
        self.word.value = value

    def close(self) -> None: ...


@pytest.fixture(params=["cpu", "cuda"])
def pair(request: pytest.FixtureRequest, make: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Engine]:
    """A prefiller with this clock, and a decoder."""
    prefill = make("prefill", patience=20.0, chunk=64, num_blocks=24)
    decode = make("decode", patience=20.0, transfer_timeout=3600.0, num_blocks=24)
    if request.param == "cuda":
        monkeypatch.setattr(layers, "StreamWord", Word)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        assert prefill.sending is not None
        prefill.sending.clock.close()
        prefill.sending.clock = CudaClock(prefill.sending.sender, [0, 1, 2], prefill.stats)
    return prefill, decode


def ask(prefill: Engine, decode: Engine, name: str) -> Any:
    """How the decode leg of one more request ends."""
    tokens = [(len(name) * 31 + i) % 97 for i in range(13)]
    prefiller = {"instance": "i", "ranks": [base64.b64encode(prefill.descriptor).decode()]}
    decode.add(Req(name, tokens, {"do_remote_prefill": True, "transfer_id": name, "prefiller": prefiller}))
    prefill.add(Req(f"p{name}", tokens, {"do_remote_decode": True, "transfer_id": name}))
    end = time.monotonic() + 15.0
    while (prefill.requests or decode.requests) and time.monotonic() < end:
        prefill.step()
        decode.step()
        time.sleep(0.001)
    return decode.done.get(name)


def saving(engine: Engine, order: list[int]) -> None:
    """From now on a step saves these layers, once all have been written."""
    sending = engine.sending
    assert sending is not None
    clock = sending.clock

    def saved(layer: int) -> None:
        if layer == 2:
            for one in order:
                clock.layer(one)

    sending.layer_saved = saved  # type: ignore[method-assign]


@pytest.mark.parametrize("order", [[0, 1], [1, 2], [], [0, 2, 2]], ids=str)
def test_a_layer_that_a_step_does_not_save_fails_its_requests_and_no_others(
    pair: tuple[Engine, Engine], order: list[int]
) -> None:
    prefill, decode = pair
    assert ask(prefill, decode, "a") == RequestStatus.FINISHED_LENGTH_CAPPED
    saving(prefill, order)
    began = time.monotonic()
    assert ask(prefill, decode, "bb") == RequestStatus.FINISHED_ERROR
    assert time.monotonic() - began < 15.0  # told, not timed out
    saving(prefill, [0, 1, 2])
    for name in ("ccc", "dddd"):  # no count is taken for another layer's
        assert ask(prefill, decode, name) == RequestStatus.FINISHED_LENGTH_CAPPED
    assert prefill.idle() and decode.idle()


@pytest.mark.parametrize("order", [[0, 1, 2, 2], [0, 1, 2, 2, 2, 2], [2, 0, 1], [7, 1, 0, 2, 0, 1]], ids=str)
def test_layers_saved_again_or_in_another_order_are_pushed_once(pair: tuple[Engine, Engine], order: list[int]) -> None:
    prefill, decode = pair
    saving(prefill, order)
    for name in ("a", "bb", "ccc"):
        assert ask(prefill, decode, name) == RequestStatus.FINISHED_LENGTH_CAPPED
    assert prefill.idle() and decode.idle()


def test_taking_blocks_away_does_not_wait_for_layers_that_are_not_pushed_yet(make: Make) -> None:
    """It used to raise into vLLM after 30 s of a thread that did not get on."""
    prefill = make("prefill")
    assert prefill.sending is not None
    clock = prefill.sending.clock
    assert isinstance(clock, CpuClock)
    push = prefill.sending.sender.open("r", 4)
    push.append_blocks([0])
    queue, clock._saved = clock._saved, SimpleNamespace(put=lambda _: None)  # type: ignore[assignment]
    clock.begin([(push, 4)], [0, 1, 2])  # of which the thread never hears
    for layer in range(3):
        clock.layer(layer)
    clock.withdraw(push)
    clock.end()
    assert clock._steps.advance() and push.nbytes == 0 and not push.status.ready
    clock._saved = queue
    push.abort("the test ends")
