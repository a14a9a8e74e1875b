"""The router's logic, with workers that are only pretended: who is chosen, and what happens when one fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from railwire.kvcache.router import (
    DecodeEvent,
    DecodeLeg,
    InMemoryMembership,
    LegFailed,
    LoadAndPrefix,
    Member,
    NoMembers,
    PrefillLeg,
    RequestRefused,
    RouteEvent,
    RouteFailed,
    Router,
    RouteRequest,
)


def member(name: str, role: str, **more: Any) -> Member:
    settings: dict[str, Any] = {
        "url": f"http://{name}",
        "model": "m",
        "fingerprint": "f",
        "block_tokens": 4,
        "num_blocks": 64,
        "context": 1000,
        "vocab": 100,
        **more,
    }
    return Member(id=name, role=role, **settings)  # type: ignore[arg-type]


class FakeWorkers:
    """A transport. The KV of an attempt "arrives" when its prefiller has ended; a token is 1 + the sum of what is
    before it, modulo 97, so a wrong continuation shows."""

    def __init__(self) -> None:
        self.prefills: list[tuple[str, str]] = []
        self.decodes: list[tuple[str, str]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.ended: list[tuple[str, str]] = []
        self.arrived: dict[str, asyncio.Event] = {}
        self.on_prefill: Callable[[Member, PrefillLeg], Awaitable[None]] | None = None
        self.on_token: Callable[[Member, DecodeLeg, int], Awaitable[None]] | None = None
        self.on_decode: Callable[[Member, DecodeLeg], Awaitable[None]] | None = None
        self.has_prefix = False

    def kv(self, request_id: str) -> asyncio.Event:
        return self.arrived.setdefault(request_id, asyncio.Event())

    async def prefill(self, where: Member, leg: PrefillLeg) -> dict[str, Any]:
        self.prefills.append((where.id, leg.request_id))
        try:
            if self.on_prefill is not None:
                await self.on_prefill(where, leg)
            self.kv(leg.request_id).set()
            self.ended.append((where.id, leg.request_id))
            return {"cached_tokens": 0}
        except asyncio.CancelledError:
            self.cancelled.append((where.id, leg.request_id))
            raise

    async def decode(self, where: Member, leg: DecodeLeg) -> AsyncGenerator[DecodeEvent, None]:
        self.decodes.append((where.id, leg.request_id))
        try:
            if self.on_decode is not None:
                await self.on_decode(where, leg)
            need = len(leg.tokens) > 1 and not self.has_prefix
            yield DecodeEvent("accepted", info={"need_prefill": need})
            if need:
                await self.kv(leg.request_id).wait()
                yield DecodeEvent("arrived")
            sequence = list(leg.tokens)
            for index in range(leg.max_tokens):
                if self.on_token is not None:
                    await self.on_token(where, leg, index)
                sequence.append((1 + sum(sequence)) % 97)
                yield DecodeEvent("token", sequence[-1])
            yield DecodeEvent("end", info={"reason": "length"})
            self.ended.append((where.id, leg.request_id))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append((where.id, leg.request_id))
            raise


def expected(tokens: tuple[int, ...], count: int) -> list[int]:
    sequence = list(tokens)
    for _ in range(count):
        sequence.append((1 + sum(sequence)) % 97)
    return sequence[len(tokens) :]


PROMPT = tuple(range(1, 11))


def request(name: str = "r", tokens: tuple[int, ...] = PROMPT, **more: Any) -> RouteRequest:
    return RouteRequest(**{"id": name, "model": "m", "tokens": tokens, "max_tokens": 5, "timeout": 10.0, **more})


class Setup:
    def __init__(self, workers: FakeWorkers, membership: InMemoryMembership, router: Router) -> None:
        self.workers, self.membership, self.router = workers, membership, router

    async def run(self, wanted: RouteRequest) -> tuple[list[int], list[RouteEvent]]:
        events = [event async for event in self.router.route(wanted)]
        return [event.token for event in events if event.kind == "token"], events


@contextlib.asynccontextmanager
async def setup(*members: Member, **settings: Any) -> AsyncGenerator[Setup, None]:
    membership = InMemoryMembership()
    before = asyncio.all_tasks()
    for one in members:
        await membership.join(one, 60.0)
    workers = FakeWorkers()
    router = Router(membership, workers, **{"member_timeout": 0.5, **settings})
    await router.start()
    for _ in range(3):
        await asyncio.sleep(0)
    try:
        yield Setup(workers, membership, router)
    finally:
        await router.close()
        assert router.active == 0
        left = asyncio.all_tasks() - before
        assert not left, left


TWO_AND_ONE = (member("p1", "prefill"), member("p2", "prefill"), member("d1", "decode"))


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30.0))  # type: ignore[arg-type]


def test_both_legs_are_sent_at_once() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def both(where: Member, leg: PrefillLeg) -> None:
                while not s.workers.decodes:  # if the router waited for the prefill first, this would never end
                    await asyncio.sleep(0.001)

            s.workers.on_prefill = both
            tokens, events = await s.run(request())
            assert tokens == expected(PROMPT, 5)
            assert [event.kind for event in events] == ["started", "arrived", *["token"] * 5, "end"]
            assert s.workers.prefills[0][1] == s.workers.decodes[0][1] == "r.1"

    run(main)


def test_a_dead_prefiller_is_replaced_by_the_other_under_a_new_name() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:
            first: list[str] = []

            async def die_once(where: Member, leg: PrefillLeg) -> None:
                if not first:
                    first.append(where.id)
                    await asyncio.sleep(0.01)
                    raise LegFailed("connection reset", blame="prefiller")

            s.workers.on_prefill = die_once
            tokens, events = await s.run(request())
            assert tokens == expected(PROMPT, 5)
            assert [name for _, name in s.workers.prefills] == ["r.1", "r.2"]
            assert s.workers.prefills[1][0] != first[0]
            assert ("d1", "r.1") in s.workers.cancelled  # its ticket and pages go before the next attempt's
            assert [name for _, name in s.workers.decodes] == ["r.1", "r.2"]
            assert "connection reset" in next(event.error for event in events if event.kind == "rerouted")
            assert s.router.reroutes["prefiller"] == 1
            # The failed one is shunned by the next request, too.
            await s.run(request("next"))
            assert s.workers.prefills[2][0] != first[0]

    run(main)


def test_the_decoders_word_that_the_prefiller_failed_counts_as_well() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def frozen(where: Member, leg: PrefillLeg) -> None:
                if leg.request_id.endswith(".1"):
                    await asyncio.sleep(3600)

            async def complain(where: Member, leg: DecodeLeg) -> None:
                if leg.request_id.endswith(".1"):
                    raise LegFailed("ticket failed: peer lost", blame="prefiller")

            s.workers.on_prefill, s.workers.on_decode = frozen, complain
            tokens, _ = await s.run(request())
            assert tokens == expected(PROMPT, 5)
            assert s.workers.prefills[0][0] != s.workers.prefills[1][0]
            assert s.workers.prefills[0] in s.workers.cancelled

    run(main)


def test_a_prefiller_that_dies_after_its_pages_have_arrived_is_no_matter() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def die_late(where: Member, leg: PrefillLeg) -> None:
                s.workers.kv(leg.request_id).set()
                await asyncio.sleep(0.01)
                raise LegFailed("killed", blame="prefiller")

            async def slow(where: Member, leg: DecodeLeg, index: int) -> None:
                await asyncio.sleep(0.01)

            s.workers.on_prefill, s.workers.on_token = die_late, slow
            tokens, events = await s.run(request())
            assert tokens == expected(PROMPT, 5)
            assert "rerouted" not in [event.kind for event in events]

    run(main)


@pytest.mark.parametrize("resume", [True, False])
def test_a_decoder_that_dies_in_the_middle(resume: bool) -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE, member("d2", "decode"), resume=resume) as s:

            async def die(where: Member, leg: DecodeLeg, index: int) -> None:
                if leg.request_id.endswith(".1") and index == 2:
                    raise LegFailed("gone", blame="decoder")

            s.workers.on_token = die
            if not resume:
                with pytest.raises(RouteFailed, match="after 2 tokens"):
                    await s.run(request())
                return
            tokens, _ = await s.run(request())
            assert tokens == expected(PROMPT, 5)  # neither doubled nor missing
            assert s.workers.decodes[0][0] != s.workers.decodes[1][0]

    run(main)


def test_attempts_are_bounded_and_the_error_names_each() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE, max_attempts=3) as s:

            async def never(where: Member, leg: PrefillLeg) -> None:
                raise LegFailed(f"{where.id} is broken", blame="prefiller")

            s.workers.on_prefill = never
            with pytest.raises(RouteFailed) as caught:
                await s.run(request())
            assert len(s.workers.prefills) == 3
            assert "attempt 3" in str(caught.value) and "p1 is broken" in str(caught.value)
            assert "p2 is broken" in str(caught.value)

    run(main)


def test_every_wait_is_bounded() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE, event_timeout=0.05, max_attempts=2) as s:

            async def hang(where: Member, leg: DecodeLeg) -> None:
                await asyncio.sleep(3600)

            s.workers.on_decode = hang
            with pytest.raises(RouteFailed, match=r"silent for 0.05 s"):
                await s.run(request())
        async with setup(*TWO_AND_ONE) as s:

            async def stuck(where: Member, leg: PrefillLeg) -> None:
                await asyncio.sleep(3600)

            s.workers.on_prefill = stuck
            began = asyncio.get_running_loop().time()
            with pytest.raises(RouteFailed, match=r"0\.1 s are over"):
                await s.run(request(timeout=0.1))
            assert asyncio.get_running_loop().time() - began < 5.0

    run(main)


def test_a_client_that_goes_aborts_both_legs() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def stuck(where: Member, leg: PrefillLeg) -> None:
                await asyncio.sleep(3600)

            s.workers.on_prefill = stuck
            task = asyncio.create_task(s.run(request()))
            while not (s.workers.prefills and s.workers.decodes):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sorted(s.workers.cancelled) == sorted([*s.workers.prefills, *s.workers.decodes])
            assert len(s.workers.cancelled) == 2

    run(main)


def test_closing_the_stream_early_ends_the_decode_leg() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def slow(where: Member, leg: DecodeLeg, index: int) -> None:
                await asyncio.sleep(0.005)

            s.workers.on_token = slow
            events = s.router.route(request(max_tokens=500))
            async for event in events:
                if event.kind == "token":
                    break
            await events.aclose()
            assert s.workers.cancelled == [("d1", "r.1")]

    run(main)


def test_a_decoder_with_the_whole_prefix_spares_the_prefill() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def stuck(where: Member, leg: PrefillLeg) -> None:
                await asyncio.sleep(3600)

            s.workers.on_prefill, s.workers.has_prefix = stuck, True
            tokens, _ = await s.run(request())
            assert tokens == expected(PROMPT, 5)
            assert len(s.workers.prefills) == 1 and s.workers.prefills[0] in s.workers.cancelled

    run(main)


def test_one_token_needs_no_prefiller() -> None:
    async def main() -> None:
        async with setup(member("d1", "decode")) as s:
            tokens, _ = await s.run(request(tokens=(3,)))
            assert tokens == expected((3,), 5) and s.workers.prefills == []

    run(main)


def test_draining_members_get_nothing_new_and_finish_what_they_have() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:
            go = asyncio.Event()

            async def wait(where: Member, leg: PrefillLeg) -> None:
                if leg.request_id == "old.1":
                    await go.wait()

            s.workers.on_prefill = wait
            old = asyncio.create_task(s.run(request("old")))
            while not s.workers.prefills:
                await asyncio.sleep(0.001)
            busy = s.workers.prefills[0][0]
            await s.membership.renew(member(busy, "prefill", state="draining"))
            await asyncio.sleep(0.01)
            for index in range(6):
                await s.run(request(f"new{index}", tokens=(index, *PROMPT)))
            assert {where for where, name in s.workers.prefills if name.startswith("new")} == {"p1", "p2"} - {busy}
            go.set()
            tokens, events = await old
            assert tokens == expected(PROMPT, 5) and "rerouted" not in [event.kind for event in events]

    run(main)


def test_members_join_while_a_request_waits_for_one() -> None:
    async def main() -> None:
        async with setup(member("d1", "decode"), member_timeout=10.0) as s:
            task = asyncio.create_task(s.run(request()))
            await asyncio.sleep(0.05)
            assert not task.done()
            await s.membership.join(member("late", "prefill"), 60.0)
            tokens, _ = await task
            assert tokens == expected(PROMPT, 5) and s.workers.prefills == [("late", "r.1")]

    run(main)


def test_nobody_there_is_said_plainly() -> None:
    async def main() -> None:
        async with setup(member("d1", "decode"), member_timeout=0.05) as s:
            with pytest.raises(NoMembers, match="0 prefillers, 1 decoders"):
                await s.run(request())
        other = member("p1", "prefill", fingerprint="another")
        async with setup(other, member("d1", "decode"), member_timeout=0.05) as s:
            with pytest.raises(NoMembers):  # KV of other weights is never mixed in
                await s.run(request())
            assert s.workers.decodes == []

    run(main)


def test_what_a_worker_refuses_for_good_is_not_tried_elsewhere() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def refuse(where: Member, leg: PrefillLeg) -> None:
                raise LegFailed("11 tokens exceed the context of 10", blame="request")

            s.workers.on_prefill = refuse
            with pytest.raises(RequestRefused, match="exceed the context"):
                await s.run(request())
            assert len(s.workers.prefills) == 1
            with pytest.raises(RequestRefused):
                await s.run(request(tokens=()))

    run(main)


def test_two_that_do_not_fit_together_are_tried_with_others() -> None:
    async def main() -> None:
        async with setup(*TWO_AND_ONE) as s:

            async def unfit(where: Member, leg: DecodeLeg) -> None:
                assert leg.prefiller is not None
                if leg.prefiller.id == "p1":
                    raise LegFailed("layouts differ", blame="pair")

            s.workers.on_decode = unfit
            for index in range(4):
                tokens, events = await s.run(request(f"r{index}", tokens=(index, *PROMPT)))
                assert tokens == expected((index, *PROMPT), 5)
                assert [event.attempt.prefiller.id for event in events if event.kind == "end"] == ["p2"]  # type: ignore[union-attr]
            assert s.router.reroutes["pair"] >= 1

    run(main)


def test_a_busy_member_is_passed_over_but_not_punished() -> None:
    async def main() -> None:
        policy = LoadAndPrefix()
        async with setup(*TWO_AND_ONE, policy=policy) as s:

            async def full(where: Member, leg: PrefillLeg) -> None:
                if leg.request_id.endswith(".1"):
                    raise LegFailed("draining", blame="prefiller", busy=True)

            s.workers.on_prefill = full
            await s.run(request())
            assert all(policy.standing(one).penalty_until == 0 for one in TWO_AND_ONE)

    run(main)


def test_many_at_once_with_failures_all_end_right() -> None:
    async def main() -> None:
        members = [member(f"p{i}", "prefill") for i in range(4)] + [member(f"d{i}", "decode") for i in range(2)]
        async with setup(*members, max_attempts=6) as s:

            async def flaky(where: Member, leg: PrefillLeg) -> None:
                name, attempt = leg.request_id[1:].split(".")
                await asyncio.sleep(0.001 * (int(name) % 7))
                if int(attempt) <= (int(name) % 3):
                    raise LegFailed("flaky", blame="prefiller")

            s.workers.on_prefill = flaky
            wanted = [request(f"r{i}", tokens=(i % 90, *PROMPT)) for i in range(200)]
            results = await asyncio.gather(*(s.run(one) for one in wanted))
            for one, (tokens, _) in zip(wanted, results, strict=True):
                assert tokens == expected(one.tokens, 5)
            names = [name for _, name in s.workers.prefills]
            assert len(names) == 67 + 2 * 67 + 3 * 66
            assert len(set(names)) == len(names)  # no attempt's name is used twice

    run(main)


# ---- the policy ------------------------------------------------------------------------------------------------------
def test_the_policy_prefers_a_cached_prefix_until_the_queue_outweighs_it() -> None:
    policy = LoadAndPrefix()
    one, two = member("p1", "prefill"), member("p2", "prefill")
    prompt = list(range(40))
    policy.began(one, prompt)
    policy.ended(one, prompt, ok=True)
    longer = [*prompt, 50, 51, 52, 53, 54]
    assert {policy.prefiller(longer, [one, two]).id for _ in range(4)} == {"p1"}
    policy.began(one, [90] * 60)  # sixty other tokens are waiting there now: worse than computing forty anew
    assert policy.prefiller(longer, [one, two]).id == "p2"
    policy.ended(one, [90] * 60, ok=True)
    assert policy.prefiller(longer, [one, two]).id == "p1"


def test_the_policy_forgets_the_prefix_of_a_failed_leg() -> None:
    policy = LoadAndPrefix()
    one, two = member("p1", "prefill"), member("p2", "prefill")
    prompt = list(range(40))
    policy.began(one, prompt)
    policy.ended(one, prompt, ok=False)
    assert policy.standing(one).queued_tokens == 0 and policy.standing(one).legs == 0
    assert {policy.prefiller(prompt, [one, two]).id for _ in range(4)} == {"p1", "p2"}


def test_one_leg_that_ends_early_takes_no_prefix_that_others_have_made_or_are_making() -> None:
    policy = LoadAndPrefix()
    one, two = member("p1", "prefill"), member("p2", "prefill")
    shared = list(range(40))
    first, second, third = [*shared, 50, 51, 52, 53], [*shared, 60, 61, 62, 63], [*shared, 70, 71, 72, 73]
    policy.began(one, first)
    policy.ended(one, first, ok=True)
    policy.began(one, second)
    policy.ended(one, second, ok=False)  # its client hung up
    assert {policy.prefiller(third, [one, two]).id for _ in range(4)} == {"p1"}
    assert len(policy.standing(one).index) == 11  # what the second alone had is forgotten
    # Two at once, of which neither has ended: the prefix is on its way as long as one of them is.
    policy.began(two, third)
    policy.began(two, second)
    policy.ended(two, third, ok=False)
    assert len(policy.standing(two).index) == 11
    policy.ended(two, second, ok=True)
    assert len(policy.standing(two).index) == 11
    # A leg that ends after its blocks had to go takes nothing with it either.
    small = member("p3", "prefill", num_blocks=4)
    policy.began(small, shared)
    policy.ended(small, shared, ok=False)
    assert len(policy.standing(small).index) == 0


def test_the_policys_index_is_bounded_by_the_instances_blocks() -> None:
    policy = LoadAndPrefix()
    one = member("p1", "prefill", num_blocks=10)
    for start in range(50):
        prompt = [start] * 40
        policy.began(one, prompt)
        policy.ended(one, prompt, ok=True)
    assert len(policy.standing(one).index) == 10


def test_the_policys_penalty_grows_and_ends() -> None:
    now = [100.0]
    policy = LoadAndPrefix(clock=lambda: now[0])
    one, two = member("p1", "prefill"), member("p2", "prefill")
    for _ in range(3):
        policy.failed(one)
    assert {policy.prefiller([1], [one, two]).id for _ in range(6)} == {"p2"}
    assert policy.prefiller([1], [one]).id == "p1"  # better than nobody
    now[0] += 2.5
    assert {policy.prefiller([1], [one, two]).id for _ in range(6)} == {"p1", "p2"}
