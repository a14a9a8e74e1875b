"""Requests that stand in a scheduler's queue for longer than anything is waited for that nobody has announced: both
engines know, wait, and keep nothing when the request ends in the queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from contract import Engine
from test_contract import OK, decode_leg, prefill_leg, prompt, quiet, run
from vllm.v1.request import RequestStatus

from railwire import Peer
from railwire.errors import ConnectTimeout, RailwireError
from railwire.integrations.vllm.steps import Step
from railwire.testing import SimulatedFabric

PATIENCE = 0.6  # a handshake takes a part of it, on a machine that has other things to do
QUEUED = 4 * PATIENCE
Make = Callable[..., Engine]


@pytest.fixture
def make(make: Make) -> Make:
    """Of little patience, where a test does not say otherwise."""
    return lambda role, **options: make(role, **{"patience": PATIENCE, **options})


class Full:
    """All blocks of an engine are taken: what comes stands in its queue until they are given back."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.blocks, engine.free = engine.free, []

    def over(self) -> None:
        self.engine.free += self.blocks


def steps(engines: list[Engine], seconds: float) -> None:
    end = time.monotonic() + seconds
    run(engines, lambda: time.monotonic() > end, seconds + 30.0)


def announced(prefiller: Engine) -> int:
    assert prefiller.sending is not None
    return prefiller.sending.sender.announced


@pytest.mark.parametrize("where", ["prefill", "decode", "both"])
def test_a_queue_longer_than_the_time_out(make: Make, where: str) -> None:
    engines = [make("prefill"), make("decode")]
    prefiller, decoder = engines
    full = [Full(engine) for engine in engines if where in ("both", engine.engine.name)]
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    steps(engines, QUEUED)
    assert "d0" not in decoder.done
    assert announced(prefiller) == len(full)
    for each in full:
        each.over()
        steps(engines, QUEUED if len(full) == 2 else 0.0)  # first the one queue ends, later the other
    run(engines, lambda: decoder.done.get("d0") == OK and prefiller.done.get("p0") == OK)
    quiet(engines)


def test_a_ticket_that_comes_before_its_request(make: Make) -> None:
    """The legs meet: the ticket has waited for a while when the request comes into the queue, and waits on there."""
    prefiller, decoder = make("prefill"), make("decode")
    full = Full(prefiller)
    decoder.add(decode_leg(0, prompt(19), prefiller))
    steps([prefiller, decoder], PATIENCE / 3)
    prefiller.add(prefill_leg(0, prompt(19)))
    steps([prefiller, decoder], QUEUED)
    full.over()
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK)
    quiet([prefiller, decoder])


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("stepped", [True, False], ids=["told", "not-told"])
def test_an_abort_in_the_queue(make: Make, side: str, stepped: bool) -> None:
    """Before or after the other side was told; nothing is left, and the other side ends without a time-out."""
    engines = [make("prefill", patience=60.0), make("decode", patience=60.0)]
    prefiller, decoder = engines
    full = Full(prefiller if side == "prefill" else decoder)
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    if stepped:
        steps(engines, 0.2)
        assert announced(prefiller) == 1
    full.engine.abort("p0" if side == "prefill" else "d0")
    full.over()
    began = time.monotonic()
    quiet(engines)
    assert time.monotonic() - began < 5.0
    if side == "prefill":
        assert decoder.done["d0"] == RequestStatus.FINISHED_ERROR


def test_what_is_said_to_an_engine_that_has_nothing_else_to_do(make: Make) -> None:
    """A refusal goes out although no request is left; so does an announcement of a request that cannot run."""
    prefiller = make("prefill")
    full = Full(prefiller)
    prefiller.add(prefill_leg(0, prompt(9)))
    assert prefiller.half.pending
    prefiller.step()
    assert not prefiller.half.pending and announced(prefiller) == 1
    prefiller.abort("p0")
    assert not prefiller.requests and prefiller.half.pending
    full.over()
    quiet([prefiller])


def test_a_request_that_is_scheduled_at_once_is_not_announced(make: Make) -> None:
    """The ordinary case says no more than before."""
    prefiller, decoder = make("prefill"), make("decode")
    said: list[Step] = []
    for engine in (prefiller, decoder):
        build = engine.half.build_step

        def keep(output: Any, build: Callable[[Any], Step] = build) -> Step:
            said.append(build(output))
            return said[-1]

        engine.half.build_step = keep  # type: ignore[method-assign]
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK)
    assert said and not any(step.expects or step.announces for step in said)
    quiet([prefiller, decoder])


def test_a_prompt_of_one_token_is_announced_by_nobody(make: Make) -> None:
    prefiller, decoder = make("prefill"), make("decode")
    fulls = [Full(engine) for engine in (prefiller, decoder)]
    prefiller.add(prefill_leg(0, prompt(1)))
    decoder.add(decode_leg(0, prompt(1), prefiller))
    steps([prefiller, decoder], 0.1)
    assert announced(prefiller) == 0
    for full in fulls:
        full.over()
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK and prefiller.done.get("p0") == OK)
    quiet([prefiller, decoder])


def test_a_preempted_prefill_is_still_waited_for(make: Make) -> None:
    """It is back in the queue, with its push open."""
    prefiller, decoder = make("prefill", chunk=4), make("decode")
    prefiller.add(prefill_leg(0, prompt(22)))
    decoder.add(decode_leg(0, prompt(22), prefiller))
    for _ in range(3):
        decoder.step()
        prefiller.step()
        time.sleep(0.03)
    (req,) = prefiller.running
    prefiller.preempt(req)
    full = Full(prefiller)
    steps([prefiller, decoder], QUEUED)
    assert "d0" not in decoder.done and announced(prefiller) == 0
    full.over()
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK)
    quiet([prefiller, decoder])


def test_a_decoder_that_dies_in_its_queue(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make("prefill", patience=60.0), make("decode")
    Full(decoder)
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    run([prefiller, decoder], lambda: prefiller.done.get("p0") == OK and announced(prefiller) == 1)
    fabric.kill("decode1")
    quiet([prefiller])  # run() allows 30 s, a time-out would take 60


def test_engines_that_wait_for_each_others_blocks(make: Make) -> None:
    """What the prefiller has computed waits in the decoder's queue, for blocks of a request that waits in the
    prefiller's, for blocks of what it has computed. The first to have waited for ``queue_timeout`` gives way."""
    engines = [make("prefill", num_blocks=6, queue_timeout=1.0), make("decode", num_blocks=6)]
    prefiller, decoder = engines
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(1, prompt(19, 1), prefiller))
    steps(engines, 0.1)
    prefiller.add(prefill_leg(1, prompt(19, 1)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    steps(engines, 0.5)
    assert not decoder.done and announced(prefiller) == 2
    run(engines, lambda: len(decoder.done) == 2)
    assert decoder.done == {"d1": OK, "d0": RequestStatus.FINISHED_ERROR}
    quiet(engines)


def test_a_transfer_may_have_a_bound_of_its_own(make: Make) -> None:
    prefiller, decoder = make("prefill", patience=60.0), make("decode", patience=60.0, transfer_timeout=0.5)
    full = Full(prefiller)
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == RequestStatus.FINISHED_ERROR)
    prefiller.abort("p0")
    full.over()
    quiet([prefiller, decoder])


def test_many_requests_for_a_prefiller_that_is_dead_hold_up_no_others(make: Make, fabric: SimulatedFabric) -> None:
    """A handshake in vain lasts for twice the liveness time."""
    dead, alive, decoder = make("prefill"), make("prefill"), make("decode")
    fabric.freeze("prefill0")
    full = Full(decoder)
    for number in range(1, 21):
        decoder.add(decode_leg(number, prompt(9, number), dead))
        decoder.step()
    alive.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), alive))
    began = time.monotonic()
    run([alive, decoder], lambda: announced(alive) == 1)
    assert time.monotonic() - began < 0.95  # one in vain takes 1 s
    for number in range(1, 21):
        decoder.abort(f"d{number}")
    full.over()
    run([alive, decoder], lambda: decoder.done.get("d0") == OK)
    fabric.thaw("prefill0")
    quiet([alive, decoder])


class Held:
    """Handshakes with a prefiller last until ``over`` is set, and then succeed, or fail with ``error``."""

    def __init__(self, prefiller: Engine, decoder: Engine, error: RailwireError | None = None) -> None:
        assert decoder.receiving is not None
        self.over = threading.Event()
        self.asked = 0
        self.told: list[tuple[str, str]] = []  # what was said to any prefiller, and the transfer's id
        receiver: Any = decoder.receiving.receiver
        connect = receiver.connect

        def held(ranks: Any) -> Any:
            if ranks == (prefiller.descriptor,):
                self.asked += 1
                self.over.wait(60.0)
                if error is not None:
                    raise error
            return connect(ranks)

        receiver.connect = held
        for word in ("announce", "prepare", "decline"):
            setattr(receiver, word, self._noted(word, getattr(receiver, word)))

    def _noted(self, word: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def note(link: Any, request_id: str, *args: Any, **options: Any) -> Any:
            self.told.append((word, request_id))
            return do(link, request_id, *args, **options)

        return note


def test_a_prefiller_that_does_not_answer_costs_one_thread(make: Make) -> None:
    """All that is to be said to it waits for one handshake, and shares its end. Tickets, declines and announcements
    took a thread of eight each, so that one silent prefiller kept requests waiting for all others."""
    dead, alive, decoder = make("prefill"), make("prefill"), make("decode", num_blocks=64)
    held = Held(dead, decoder, ConnectTimeout("it does not answer"))
    for number in range(1, 13):
        decoder.add(decode_leg(number, prompt(5, number), dead))
    decoder.step()  # tickets
    full = Full(decoder)
    for number in range(13, 25):
        decoder.add(decode_leg(number, prompt(5, number), dead))
    decoder.step()  # announcements
    for number in range(13, 19):
        decoder.abort(f"d{number}")
    decoder.step()  # declines
    full.over()
    decoder.step()  # tickets again
    alive.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), alive))
    run([alive, decoder], lambda: decoder.done.get("d0") == OK, 10.0)
    assert set(decoder.done) == {"d0", *(f"d{number}" for number in range(13, 19))}
    held.over.set()
    run([decoder], lambda: len(decoder.done) == 25, 10.0)
    assert held.asked == 1
    aborted = {f"d{number}" for number in range(13, 19)}
    assert {decoder.done[name] for name in decoder.done.keys() - aborted - {"d0"}} == {RequestStatus.FINISHED_ERROR}
    quiet([alive, decoder])


def test_what_fails_for_one_request_is_lost_for_no_other(make: Make) -> None:
    """Whatever is raised while one thing is said to a prefiller, what stands behind it is said all the same."""
    prefiller, decoder = make("prefill"), make("decode")
    assert decoder.receiving is not None
    receiver: Any = decoder.receiving.receiver

    def fail_one(do: Callable[..., Any], name: str) -> Callable[..., Any]:
        def maybe(link: Any, request_id: str, *args: Any, **options: Any) -> Any:
            if request_id == name:
                raise RuntimeError("unheard of")
            return do(link, request_id, *args, **options)

        return maybe

    receiver.announce, receiver.prepare = fail_one(receiver.announce, "t0"), fail_one(receiver.prepare, "t1")
    held = Held(prefiller, decoder)
    full = Full(decoder)
    for number in range(3):
        prefiller.add(prefill_leg(number, prompt(9, number)))
        decoder.add(decode_leg(number, prompt(9, number), prefiller))
    decoder.step()
    full.over()
    decoder.step()
    held.over.set()
    run([prefiller, decoder], lambda: len(decoder.done) == 3, 10.0)
    assert decoder.done == {"d0": OK, "d1": RequestStatus.FINISHED_ERROR, "d2": OK}
    quiet([prefiller, decoder])


def test_a_handshake_never_holds_up_a_step_and_nothing_overtakes_an_announcement(make: Make) -> None:
    """While the handshake lasts the requests leave the queue: the prefiller hears of them what holds by then, once."""
    prefiller, decoder = make("prefill"), make("decode")
    held = Held(prefiller, decoder)
    full = Full(decoder)
    for number in range(2):
        decoder.add(decode_leg(number, prompt(9, number), prefiller))
    began = time.monotonic()
    decoder.step()
    decoder.abort("d1")
    full.over()
    decoder.step()
    assert time.monotonic() - began < 10.0 and not held.told
    held.over.set()
    run([decoder], lambda: len(held.told) == 2)
    assert held.told == [("prepare", "t0"), ("decline", "t1")]
    prefiller.add(prefill_leg(0, prompt(9)))
    run([prefiller, decoder], lambda: decoder.done.get("d0") == OK)
    quiet([prefiller, decoder])


def test_a_request_that_ends_during_the_handshake_is_declined(make: Make) -> None:
    """No ticket goes out for it, and its prefiller waits for none."""
    prefiller, decoder = make("prefill", patience=60.0), make("decode")
    held = Held(prefiller, decoder)
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    decoder.step()
    decoder.abort("d0")
    decoder.step()
    held.over.set()
    quiet([prefiller, decoder])  # run() allows 30 s, a time-out would take 60
    assert held.told == [("decline", "t0")]
    counted = decoder.stats.take()
    assert counted is not None
    assert counted.data["cancelled_receives"] == 1 and counted.data["failed_receives"] == 0


def test_a_ticket_that_cannot_be_lets_its_prefiller_go(make: Make) -> None:
    """Once announced, the prefill waits for a ticket or a decline. It got neither when all tickets were taken, and kept
    its blocks for all of the queue time-out."""
    prefiller, decoder = make("prefill", patience=60.0, queue_timeout=60.0), make("decode")
    assert decoder.receiving is not None
    slots = decoder.receiving.receiver.slots
    full = Full(decoder)
    prefiller.add(prefill_leg(0, prompt(19)))
    decoder.add(decode_leg(0, prompt(19), prefiller))
    run([prefiller, decoder], lambda: prefiller.done.get("p0") == OK and announced(prefiller) == 1)
    taken = [slots.take() for _ in range(slots.count)]
    full.over()
    run([prefiller, decoder], lambda: decoder.done.get("d0") == RequestStatus.FINISHED_ERROR)
    for imm in taken:
        slots.give_back(imm)
    quiet([prefiller, decoder])  # run() allows 30 s, a time-out would take 60


def test_two_queued_requests_with_one_name(make: Make) -> None:
    """One of them is taken back before anybody was told; the other's place in the queue stays known."""
    prefiller = make("prefill")
    full = Full(prefiller)
    first, second = prefill_leg(0, prompt(9)), prefill_leg(0, prompt(9))
    second.request_id = "p1"
    prefiller.add(first)
    prefiller.add(second)
    prefiller.abort("p1")
    step = prefiller.half.build_step(
        SimpleNamespace(preempted_req_ids=set(), num_scheduled_tokens={}, kv_connector_block_state=None)  # type: ignore[arg-type]
    )
    assert step.expects == {"p0": "t0"} and set(step.refusals) == {"t0"}
    prefiller.abort("p0")
    full.over()
    quiet([prefiller])


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_connection_that_ends_while_a_request_stands_in_the_queue(make: Make, who: str) -> None:
    """The decoder connects anew by itself, and says again that it is coming: it is waited for as before."""
    engines = [make("prefill"), make("decode")]
    prefiller, decoder = engines
    full = [Full(engine) for engine in engines]
    decoder.add(decode_leg(0, prompt(19), prefiller))
    run(engines, lambda: announced(prefiller) == 1)
    engine = (prefiller if who == "prefill" else decoder).engine
    known: list[Peer] = []
    for _ in range(2):
        run(engines, lambda: any(peer not in known for peer in engine.peers) and announced(prefiller) == 1)
        known.extend(engine.peers)
        known[-1].close_async()
    run(engines, lambda: any(peer not in known for peer in engine.peers) and announced(prefiller) == 1)
    prefiller.add(prefill_leg(0, prompt(19)))
    full[0].over()
    steps(engines, QUEUED)
    assert "d0" not in decoder.done
    full[1].over()
    run(engines, lambda: decoder.done.get("d0") == OK and prefiller.done.get("p0") == OK)
    assert decoder.receiving is not None and not decoder.receiving._coming
    quiet(engines)
