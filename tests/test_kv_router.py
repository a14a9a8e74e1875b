"""The router's logic, with workers that are only pretended: who is chosen, and what happens when one fails."""

from __future__ import annotations

import asyncio

import pytest
from route_bed import PROMPT, TWO_AND_ONE, expected, member, request, run, setup

from railwire.kvcache.router import (
    DecodeLeg,
    LegFailed,
    LoadAndPrefix,
    Member,
    NoMembers,
    PrefillLeg,
    RequestRefused,
    RouteFailed,
)


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
            assert all(policy.state(one).penalty_until == 0 for one in TWO_AND_ONE)

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
