"""Which KV blocks are free, who holds the others, and which hold a prefix that another request can use.

A block is in exactly one of three states:

* referenced: at least one request holds it; it is never given to anybody else as new;
* cached: nobody holds it, but it keeps a known prefix; it counts as free and is evicted, least recently used first;
* blank: nobody holds it and nothing is known about its contents.

``num_free`` = blank + cached, and referenced + num_free = num_blocks, always.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from railwire.errors import RailwireError


class OutOfBlocks(RailwireError):
    """There are not enough free blocks now: wait until a request ends, or start with more (``num_blocks``)."""


class Hit(NamedTuple):
    """Blocks that hold the K/V of the first ``tokens`` tokens; the caller holds a reference to each."""

    blocks: list[int]
    tokens: int


def block_hashes(tokens: Sequence[int], block_tokens: int, salt: bytes = b"") -> list[bytes]:
    """One 16-byte hash per *full* block, each chained to the one before: equal hashes mean equal prefixes.

    Blake2b, because the tokens come from users: a collision would show one user another's answer.
    ``salt`` keeps things apart that must not share (models, tenants).
    """
    data = np.asarray(tokens, dtype="<i8")
    previous = hashlib.blake2b(salt, digest_size=16).digest()
    hashes = []
    for begin in range(0, len(data) - block_tokens + 1, block_tokens):
        previous = hashlib.blake2b(previous + data[begin : begin + block_tokens].tobytes(), digest_size=16).digest()
        hashes.append(previous)
    return hashes


class BlockPool:
    """Hands out block ids 0..num_blocks-1 and remembers prefixes. Every method is atomic and safe from any thread.

    Args:
        num_blocks: how many blocks the cache has.
        block_tokens: tokens of a block.
        salt: see :func:`block_hashes`.
        prefix_cache: False: nothing is ever remembered.
    """

    def __init__(self, num_blocks: int, block_tokens: int, *, salt: bytes = b"", prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_tokens} tokens cannot be")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.salt = salt
        self.prefix_cache = prefix_cache
        self.evictions = 0
        self._lock = threading.Lock()
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first, recently used ones again soon
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached blocks, least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could hand out now: blank and cached ones."""
        with self._lock:
            return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks, held or not, whose prefix is known."""
        with self._lock:
            return len(self._hash_of)

    def references(self, block: int) -> int:
        """How many hold this block."""
        with self._lock:
            self._check([block])
            return self._references[block]

    def blocks_for(self, tokens: int) -> int:
        """How many blocks that many tokens need."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, one reference each. Blank ones first, then the least recently used of the cached.

        Raises:
            OutOfBlocks: fewer are free; nothing was taken.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        with self._lock:
            free = len(self._blank) + len(self._idle)
            if count > free:
                raise OutOfBlocks(f"{count} KV blocks wanted, {free} of {self.num_blocks} are free")
            blocks = []
            for _ in range(count):
                if self._blank:
                    block = self._blank.pop()
                else:
                    block, _ = self._idle.popitem(last=False)
                    self._forget(block)
                    self.evictions += 1
                self._references[block] = 1
                blocks.append(block)
            return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference to each of these referenced blocks.

        Raises:
            ValueError: nobody holds one of them (its contents may be gone); nothing changed.
        """
        with self._lock:
            self._check(blocks)
            self._check_held(blocks)
            for block in blocks:
                self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Gives one reference to each back. A block of a known prefix stays cached until its place is wanted.

        Give a request's blocks in the order of its block table: the end of a prefix is evicted before its beginning,
        without which the end is of no use.

        Raises:
            ValueError: more references than there are; nothing changed.
        """
        given = list(blocks)
        with self._lock:
            self._check(given)
            for block, count in Counter(given).items():
                if count > self._references[block]:
                    raise ValueError(f"block {block} is freed {count} times but held {self._references[block]} times")
            for block in reversed(given):
                self._references[block] -= 1
                if self._references[block]:
                    continue
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def lookup(self, tokens: Sequence[int], *, limit: int | None = None) -> Hit:
        """The longest known prefix of ``tokens`` in whole blocks, with a reference to each block.

        Args:
            limit: cover at most so many tokens (say ``len(tokens) - 1`` if the last one must be run).
        """
        hashes = block_hashes(tokens if limit is None else tokens[: max(0, limit)], self.block_tokens, self.salt)
        with self._lock:
            blocks = []
            for digest in hashes:
                block = self._block_of.get(digest)
                if block is None:
                    break
                blocks.append(block)
                self._references[block] += 1
                self._idle.pop(block, None)
            return Hit(blocks, len(blocks) * self.block_tokens)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading ones of these block hashes are known; takes no reference."""
        with self._lock:
            for count, digest in enumerate(hashes):
                if digest not in self._block_of:
                    return count
            return len(hashes)

    def commit(self, tokens: Sequence[int], blocks: Sequence[int]) -> int:
        """Remembers that ``blocks`` hold the K/V of ``tokens`` (a whole prefix from position 0, KV complete).

        Only full blocks are remembered; where an equal prefix is known in another block, that one stays.
        Returns how many blocks were newly remembered.

        Raises:
            ValueError: fewer blocks than full blocks of tokens, a block that nobody holds, or one that was
                remembered for another prefix; nothing changed.
        """
        if not self.prefix_cache:
            return 0
        hashes = block_hashes(tokens, self.block_tokens, self.salt)
        if len(hashes) > len(blocks):
            raise ValueError(f"{len(tokens)} tokens fill {len(hashes)} blocks; only {len(blocks)} are given")
        full = list(blocks[: len(hashes)])
        with self._lock:
            self._check(full)
            self._check_held(full)
            if len(set(full)) != len(full):
                raise ValueError("a block stands twice in the block table")
            for block, digest in zip(full, hashes, strict=True):
                if self._hash_of.get(block, digest) != digest:
                    raise ValueError(f"block {block} is already known for another prefix: forget() it first")
            added = 0
            for block, digest in zip(full, hashes, strict=True):
                if digest not in self._block_of:
                    self._block_of[digest] = block
                    self._hash_of[block] = digest
                    added += 1
            return added

    def forget(self, blocks: Iterable[int]) -> None:
        """Nothing is known about these blocks' contents any more (say their KV turned out broken)."""
        given = list(blocks)
        with self._lock:
            self._check(given)
            for block in given:
                self._forget(block)
                if block in self._idle:
                    del self._idle[block]
                    self._blank.append(block)

    def clear(self) -> None:
        """Forgets every prefix (say the weights have changed). References stay."""
        self.forget(range(self.num_blocks))

    def check(self) -> None:
        """Raises AssertionError if the books do not balance; for tests and for a server's debug endpoint."""
        with self._lock:
            held = {block for block, count in enumerate(self._references) if count}
            blank, idle = set(self._blank), set(self._idle)
            assert min(self._references) >= 0, "a negative reference count"
            assert len(blank) == len(self._blank), "a blank block is listed twice"
            assert not (blank & idle or blank & held or idle & held), "a block is in two states"
            assert len(blank) + len(idle) + len(held) == self.num_blocks, "a block is lost"
            assert idle <= self._hash_of.keys() and not blank & self._hash_of.keys(), "states and hashes disagree"
            assert {block: digest for digest, block in self._block_of.items()} == self._hash_of, "the maps disagree"

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def _check(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"there is no block {block}: the pool has {self.num_blocks}")

    def _check_held(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not self._references[block]:
                raise ValueError(f"block {block} is held by nobody")
