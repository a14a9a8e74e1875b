"""The connector's two halves against vLLM's contract, with requests that are aborted, preempted and retried at every
point, over a NIC that reorders: no wrong byte, no report too many or too few, nothing held afterwards."""

from __future__ import annotations

import base64
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import Engine, Req
from vllm.v1.request import RequestStatus

from railwire.kvcache import Sender
from railwire.testing import SimulatedFabric

OK = RequestStatus.FINISHED_LENGTH_CAPPED
Make = Callable[..., Engine]


def prefill_leg(number: int, tokens: list[int]) -> Req:
    return Req(f"p{number}", tokens, {"do_remote_decode": True, "transfer_id": f"t{number}"})


def decode_leg(number: int, tokens: list[int], prefiller: Engine, hit: int = 0) -> Req:
    ranks = [base64.b64encode(prefiller.descriptor).decode()]
    params = {"do_remote_prefill": True, "transfer_id": f"t{number}", "prefiller": {"instance": "i", "ranks": ranks}}
    return Req(f"d{number}", tokens, params, local_hit=hit)


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 5 * i) % 97 for i in range(length)]


def run(engines: list[Engine], until: Callable[[], bool], seconds: float = 30.0) -> None:
    """Steps the engines as vLLM's loop does: those that have something to do."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "\n".join(str(engine) for engine in engines)
        worked = False
        for engine in engines:
            if engine.busy:
                engine.step()
                worked = worked or bool(engine.running)
        if not worked:
            time.sleep(0.001)


def quiet(engines: list[Engine]) -> None:
    run(engines, lambda: all(engine.idle() and not engine.busy for engine in engines))
    assert all(engine.canaries_live() for engine in engines)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_an_answer(make: Make, length: int, kernel_blocks: int) -> None:
    prefiller, decoder = make("prefill"), make("decode", kernel_blocks=kernel_blocks)
    prefiller.add(prefill_leg(0, prompt(length)))
    decoder.add(decode_leg(0, prompt(length), prefiller))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK and prefiller.done.get("p0") == OK)
    quiet([prefiller, decoder])


@pytest.mark.parametrize("hit", [4, 8, 12])
def test_a_prefix_on_the_decode_side(make: Make, hit: int) -> None:
    """12 is all of it: then the prefiller is told so, and lets go long before its ticket time-out."""
    prefiller, decoder = make("prefill", patience=60.0), make("decode")
    prefiller.add(prefill_leg(0, prompt(13)))
    decoder.add(decode_leg(0, prompt(13), prefiller, hit))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK)
    began = time.monotonic()
    quiet([prefiller, decoder])
    assert time.monotonic() - began < 5


def test_the_legs_one_after_the_other(make: Make) -> None:
    """As routers do that were made for connectors that pull."""
    prefiller, decoder = make("prefill"), make("decode")
    prefiller.add(Req("p0", prompt(11), {"do_remote_decode": True}))
    run([prefiller], lambda: prefiller.done.get("p0") == OK)
    decoder.add(Req("d0", prompt(11), prefiller.handed_on["p0"]))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK)
    quiet([prefiller, decoder])


@pytest.mark.parametrize("when", range(8))
@pytest.mark.parametrize("side", ["prefill", "decode", "both"])
def test_an_abort_at_every_state(make: Make, fabric: SimulatedFabric, when: int, side: str) -> None:
    prefiller, decoder = make("prefill", chunk=4), make("decode")
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    for count in range(when):
        if count == 2:
            fabric.hold()  # writes are under way when the abort comes
        for engine in (prefiller, decoder):
            engine.step()
        time.sleep(0.01)
    if side != "decode":
        prefiller.abort("p0")
    if side != "prefill":
        decoder.abort("d0")
    for engine in (prefiller, decoder):
        engine.step()
    fabric.release()
    began = time.monotonic()
    quiet([prefiller, decoder])
    assert time.monotonic() - began < 5.0  # the other side was told: no time-out was waited for
    assert {*prefiller.done, *decoder.done} == {"p0", "d0"}
    if side == "prefill" and decoder.done["d0"] != OK:
        assert decoder.done["d0"] == RequestStatus.FINISHED_ERROR
    # The pages serve the next.
    prefiller.add(prefill_leg(1, prompt(19, 3)))
    decoder.add(decode_leg(1, prompt(19, 3), prefiller))
    run([prefiller, decoder], lambda: decoder.done.get("d1") == OK)
    quiet([prefiller, decoder])


def test_a_preempted_prefill_goes_on_elsewhere(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make("prefill", chunk=4, num_blocks=9), make("decode")
    for number in (0, 1):
        prefiller.add(prefill_leg(number, prompt(22, number)))
        decoder.add(decode_leg(number, prompt(22, number), prefiller))
    preempted = 0

    def count_preemptions() -> bool:
        nonlocal preempted
        preempted += any(req.status == RequestStatus.PREEMPTED for req in prefiller.waiting)
        return decoder.done.get("d0") == OK and decoder.done.get("d1") == OK

    run([prefiller, decoder], count_preemptions)
    assert preempted
    quiet([prefiller, decoder])


def under_way(sender: Sender) -> int:
    """Writes of the sender's that have not ended."""
    with sender.lock:
        deliveries = list(sender._deliveries.values())
        return sum(not transfer.done() for delivery in deliveries for transfer in delivery.under_way)


def test_writes_under_way_hold_a_preemption(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make("prefill", chunk=4), make("decode")
    prefiller.add(prefill_leg(0, prompt(22)))
    decoder.add(decode_leg(0, prompt(22), prefiller))
    for _ in range(3):
        decoder.step()
        time.sleep(0.05)
    fabric.hold()
    prefiller.step()
    prefiller.step()
    assert prefiller.sending is not None
    sender = prefiller.sending.sender
    run([], lambda: under_way(sender) > 0)
    (req,) = prefiller.running
    prefiller.preempt(req)
    time_out = time.monotonic() + 0.2
    releaser = threading.Timer(0.2, fabric.release)
    releaser.start()
    prefiller.step()
    assert time.monotonic() >= time_out
    releaser.join()
    run([prefiller, decoder], lambda: "d0" in decoder.done)
    quiet([prefiller, decoder])


def test_writes_under_way_hold_a_preemption_that_an_abort_has_followed(make: Make, fabric: SimulatedFabric) -> None:
    """As vLLM does that resets its prefix cache between two steps. The worker heard of the abort only, which waits for
    nothing: the blocks held something else while a NIC was still reading them."""
    prefiller, decoder = make("prefill", chunk=4), make("decode")
    assert prefiller.sending is not None
    sender = prefiller.sending.sender
    prefiller.add(prefill_leg(0, prompt(22)))
    decoder.add(decode_leg(0, prompt(22), prefiller))
    run([decoder], lambda: sender.open_tickets == 1)

    fabric.hold()
    prefiller.step()
    run([], lambda: under_way(sender) > 0)
    (req,) = prefiller.running
    prefiller.preempt(req)
    prefiller.abort("p0")
    fill, read_while_filled = prefiller._fill, []

    def checked(blocks: list[int]) -> None:
        if blocks:
            read_while_filled.append(under_way(sender))
        fill(blocks)

    prefiller._fill = checked  # type: ignore[method-assign]
    releaser = threading.Timer(0.2, fabric.release)
    releaser.start()
    prefiller.step()
    assert read_while_filled == [0]
    releaser.join()
    run([prefiller, decoder], lambda: decoder.done.get("d0") == RequestStatus.FINISHED_ERROR)
    quiet([prefiller, decoder])


def test_parameters_that_cannot_be(make: Make) -> None:
    """Nothing raises in the scheduler: the decoder computes by itself, the prefiller pushes nothing."""
    prefiller, decoder = make("prefill"), make("decode")
    bad: list[Any] = [
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "transfer_id": 7, "prefiller": {"instance": "i", "ranks": ["AA=="]}},
        {"do_remote_prefill": True, "transfer_id": "t", "prefiller": {"instance": "i", "ranks": []}},
        {"do_remote_prefill": True, "transfer_id": "t", "prefiller": {"instance": "i", "ranks": ["!"]}},
        {"do_remote_prefill": True, "transfer_id": "t" * 600, "prefiller": {"instance": "i", "ranks": ["AA=="]}},
    ]
    for number, params in enumerate(bad):
        decoder.add(Req(f"d{number}", prompt(9), params))
    prefiller.add(Req("p0", prompt(9), {"do_remote_decode": True, "transfer_id": 5}))
    run([prefiller, decoder], lambda: len(decoder.done) == len(bad) and "p0" in prefiller.done)
    assert set(decoder.done.values()) == {OK}
    quiet([prefiller, decoder])


def test_descriptors_that_cannot_be_fail_the_request(make: Make) -> None:
    decoder = make("decode")
    for number, rank in enumerate(["AAAA", base64.b64encode(b"x" * 500).decode()]):
        prefiller = {"instance": "i", "ranks": [rank]}
        params = {"do_remote_prefill": True, "transfer_id": "t", "prefiller": prefiller}
        decoder.add(Req(f"d{number}", prompt(9), params))
    run([decoder], lambda: len(decoder.done) == 2)
    assert set(decoder.done.values()) == {RequestStatus.FINISHED_ERROR}
    quiet([decoder])


def test_a_prefiller_that_never_computes(make: Make) -> None:
    prefiller, decoder = make("prefill", patience=0.5), make("decode")
    decoder.add(decode_leg(0, prompt(9), prefiller))
    run([decoder], lambda: decoder.done.get("d0") == RequestStatus.FINISHED_ERROR)
    quiet([decoder])


def test_a_decoder_that_never_asks(make: Make) -> None:
    prefiller = make("prefill", patience=0.5)
    prefiller.add(prefill_leg(0, prompt(9)))
    run([prefiller], lambda: prefiller.done.get("p0") == OK)
    quiet([prefiller])


def test_two_requests_with_one_name(make: Make) -> None:
    """The second is not pushed, and harms neither the first nor the engine."""
    prefiller, decoder = make("prefill", chunk=4), make("decode")
    prefiller.add(prefill_leg(0, prompt(17)))
    other = prefill_leg(0, prompt(17, 9))
    other.request_id = "p1"
    prefiller.add(other)
    decoder.add(decode_leg(0, prompt(17), prefiller))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK and prefiller.done.get("p1") == OK)
    quiet([prefiller, decoder])


@pytest.mark.parametrize("schedule", range(40))
def test_random_schedules(make: Make, fabric: SimulatedFabric, seed: int, schedule: int) -> None:
    rng = random.Random(seed)
    prefillers = [
        make("prefill", chunk=rng.choice([3, 4, 8]), num_blocks=rng.choice([9, 16]), patience=1.0, queue_timeout=1.0)
        for _ in range(2)
    ]
    decoders = [
        make("decode", num_blocks=rng.choice([9, 20]), kernel_blocks=rng.choice([1, 2]), patience=1.0) for _ in range(2)
    ]
    engines = prefillers + decoders
    live: list[tuple[Engine, str]] = []
    for number in range(20):
        length = rng.randint(1, 30)
        tokens = prompt(length, number)
        prefiller, decoder = rng.choice(prefillers), rng.choice(decoders)
        hit = rng.choice([0, 0, 4, 8, 12])
        legs = [(prefiller, prefill_leg(number, tokens))]
        legs.append((decoder, decode_leg(number, tokens, prefiller, hit if hit < length else 0)))
        if rng.random() < 0.1:
            legs.pop(rng.randrange(2))
        rng.shuffle(legs)
        for engine, req in legs:
            engine.add(req)
            live.append((engine, req.request_id))
            for _ in range(rng.randint(0, 3)):
                rng.choice(engines).step()
        chance = rng.random()
        if chance < 0.35:
            engine, request_id = rng.choice(live)
            engine.abort(request_id)
        elif chance < 0.5 and any(engine.running for engine in engines):
            engine = rng.choice([engine for engine in engines if engine.running])
            engine.preempt(rng.choice(engine.running))
        elif chance < 0.6:
            fabric.hold()
        if rng.random() < 0.5:
            fabric.release()
        if rng.random() < 0.3:
            time.sleep(0.005)
    fabric.release()
    run(engines, lambda: all(not engine.requests for engine in engines), 60.0)
    quiet(engines)
    assert any(OK in engine.done.values() for engine in decoders)
    assert np.all([set(engine.done) == {name for owner, name in live if owner is engine} for engine in engines])
