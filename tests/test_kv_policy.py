"""Which prefiller and decoder the policy picks."""

from __future__ import annotations

from route_bed import member

from railwire.kvcache.router import (
    LoadAndPrefix,
)


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
    assert policy.state(one).queued_tokens == 0 and policy.state(one).legs == 0
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
    assert len(policy.state(one).index) == 11  # what the second alone had is forgotten
    # Two at once, of which neither has ended: the prefix is on its way as long as one of them is.
    policy.began(two, third)
    policy.began(two, second)
    policy.ended(two, third, ok=False)
    assert len(policy.state(two).index) == 11
    policy.ended(two, second, ok=True)
    assert len(policy.state(two).index) == 11
    # A leg that ends after its blocks had to go takes nothing with it either.
    small = member("p3", "prefill", num_blocks=4)
    policy.began(small, shared)
    policy.ended(small, shared, ok=False)
    assert len(policy.state(small).index) == 0


def test_the_policys_index_is_bounded_by_the_instances_blocks() -> None:
    policy = LoadAndPrefix()
    one = member("p1", "prefill", num_blocks=10)
    for start in range(50):
        prompt = [start] * 40
        policy.began(one, prompt)
        policy.ended(one, prompt, ok=True)
    assert len(policy.state(one).index) == 10


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
