"""The block pool: reference counts, the prefix cache, and books that always balance."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from railwire.runner import BlockPool, OutOfBlocks, block_hashes

# Few tokens and small blocks, so that prefixes coincide all the time.
TOKENS = st.lists(st.integers(0, 1), max_size=9)


class PoolMachine(RuleBasedStateMachine):
    """A pool of 8 blocks of 2 tokens beside a model of it: who holds what, and what each block was filled with."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 2)
        self.held: dict[int, int] = dict.fromkeys(range(8), 0)
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> the whole prefix up to its end, as "written" to it

    def give(self, blocks: list[int]) -> None:
        for block in blocks:
            self.held[block] += 1

    @rule(target=requests, tokens=TOKENS)
    def request(self, tokens: list[int]) -> object:
        """What a server does: look up, allocate the rest, compute, commit."""
        known_before = {
            self.contents[block] for block in self.contents if self.pool.match(block_hashes(self.contents[block], 2))
        }
        hit = self.pool.lookup(tokens)
        assert hit.tokens == 2 * len(hit.blocks) <= len(tokens)
        for i, block in enumerate(hit.blocks):
            assert self.contents[block] == tuple(tokens[: 2 * i + 2]), "a hit on a block that holds something else"
        longer = tuple(tokens[: hit.tokens + 2])
        if len(longer) == hit.tokens + 2:
            assert not (longer in known_before and self.pool.match(block_hashes(longer, 2)) > len(hit.blocks))
        self.give(hit.blocks)
        wanted = self.pool.blocks_for(len(tokens)) - len(hit.blocks)
        free = sum(not count for count in self.held.values())
        try:
            new = self.pool.allocate(wanted)
        except OutOfBlocks:
            assert wanted > free, "refused although there was room"
            self.pool.free(hit.blocks)
            for block in hit.blocks:
                self.held[block] -= 1
            return multiple()
        assert wanted <= free and len(new) == len(set(new)) == wanted
        assert all(not self.held[block] for block in new), "a held block was given to somebody else"
        self.give(new)
        blocks = hit.blocks + new
        for i, block in enumerate(blocks):
            self.contents[block] = tuple(tokens[: 2 * i + 2])
        self.pool.commit(tokens, blocks)
        assert self.pool.match(block_hashes(tokens, 2)) == len(tokens) // 2, "what was committed is not found"
        return tuple(blocks)

    @rule(target=requests, blocks=requests)
    def share(self, blocks: tuple[int, ...]) -> object:
        self.pool.acquire(blocks)
        self.give(list(blocks))
        return blocks

    @rule(blocks=consumes(requests))
    def end(self, blocks: tuple[int, ...]) -> None:
        self.pool.free(blocks)
        for block in blocks:
            self.held[block] -= 1

    @rule(block=st.integers(0, 7))
    def forget(self, block: int) -> None:
        self.pool.forget([block])

    @rule(block=st.integers(0, 7))
    def free_too_often(self, block: int) -> None:
        with pytest.raises(ValueError, match="freed"):
            self.pool.free([block] * (self.held[block] + 1))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        assert self.pool.num_free == sum(not count for count in self.held.values())
        assert [self.pool.references(block) for block in range(8)] == list(self.held.values())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 7), st.integers(0, 40))
def test_hashes_are_chained(tokens: list[int], block_tokens: int, change: int) -> None:
    hashes = block_hashes(tokens, block_tokens)
    assert len(hashes) == len(tokens) // block_tokens
    assert block_hashes(np.array(tokens, dtype=np.int32), block_tokens) == hashes
    if change < len(tokens):
        other = list(tokens)
        other[change] ^= 1
        differing = [a != b for a, b in zip(hashes, block_hashes(other, block_tokens), strict=True)]
        assert differing == [i >= change // block_tokens for i in range(len(hashes))]


def test_salt_keeps_tenants_apart() -> None:
    assert not set(block_hashes(range(8), 2, b"a")) & set(block_hashes(range(8), 2, b"b"))


def test_least_recently_used_goes_first_and_tail_before_head() -> None:
    pool = BlockPool(4, 1)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.commit([1, 2], old)
    pool.commit([3, 4], new)
    pool.free(old)
    pool.free(new)
    assert (pool.num_free, pool.num_cached) == (4, 4)
    assert pool.allocate(1) == [old[1]]  # of the older prefix, its end
    assert pool.lookup([1, 2]).blocks == [old[0]]  # a use: now the other prefix is the older one
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.evictions == 3
    with pytest.raises(OutOfBlocks, match="1 KV blocks wanted, 0 of 4 are free"):
        pool.allocate(1)


def test_held_blocks_outlive_any_pressure() -> None:
    pool = BlockPool(3, 2)
    first = pool.allocate(1)
    pool.commit([7, 8], first)
    second = pool.lookup([7, 8, 9])
    assert second == (first, 2)
    pool.free(first)
    with pytest.raises(OutOfBlocks):
        pool.allocate(3)
    assert first[0] not in pool.allocate(2)
    pool.free(second.blocks)
    assert pool.allocate(1) == first and pool.lookup([7, 8]).blocks == []


def test_lookup_limit_leaves_the_last_token() -> None:
    pool = BlockPool(4, 2)
    pool.commit([1, 2, 3, 4], pool.allocate(2))
    assert pool.lookup([1, 2, 3, 4]).tokens == 4
    assert pool.lookup([1, 2, 3, 4], limit=3).tokens == 2
    assert pool.lookup([1, 2, 3, 4], limit=-1).tokens == 0


def test_equal_prefix_in_two_blocks_keeps_the_first() -> None:
    pool = BlockPool(4, 1)
    one, two = pool.allocate(1), pool.allocate(2)
    assert pool.commit([5], one) == 1
    assert pool.commit([5, 6], two) == 1
    assert pool.lookup([5, 6]).blocks == [one[0], two[1]]


def test_prefix_cache_off() -> None:
    pool = BlockPool(2, 1, prefix_cache=False)
    assert pool.commit([1], pool.allocate(1)) == 0 and pool.lookup([1]).tokens == 0


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda pool: pool.allocate(-1), "cannot allocate -1"),
        (lambda pool: pool.free([4]), "no block 4"),
        (lambda pool: pool.free([-1]), "no block -1"),
        (lambda pool: pool.free([0, 0]), "freed 2 times but held 1 times"),
        (lambda pool: pool.acquire([0, 3]), "block 3 is held by nobody"),
        (lambda pool: pool.commit([1, 2, 3, 4], [1]), "fill 2 blocks; only 1"),
        (lambda pool: pool.commit([1, 2], [3]), "block 3 is held by nobody"),
        (lambda pool: pool.commit([1, 2, 3, 4], [1, 1]), "twice"),
        (lambda pool: pool.commit([8, 8], [0]), "already known for another prefix"),
    ],
)
def test_bad_input_changes_nothing(use: object, message: str) -> None:
    pool = BlockPool(4, 2)
    pool.commit([1, 1], pool.allocate(1))
    pool.allocate(1)
    before = [pool.references(block) for block in range(4)], pool.num_free, pool.num_cached
    with pytest.raises(ValueError, match=message):
        use(pool)  # type: ignore[operator]
    pool.check()
    assert ([pool.references(block) for block in range(4)], pool.num_free, pool.num_cached) == before


def test_clear_forgets_prefixes_but_not_holders() -> None:
    pool = BlockPool(3, 1)
    blocks = pool.allocate(2)
    pool.commit([1, 2], blocks)
    pool.free(blocks[1:])
    pool.clear()
    pool.check()
    assert (pool.num_cached, pool.num_free, pool.lookup([1, 2]).tokens) == (0, 2, 0)
    assert sorted(pool.allocate(2) + blocks[:1]) == [0, 1, 2] and all(a < b for a, b in pairwise(sorted(blocks)))
