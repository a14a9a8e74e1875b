"""Which instance gets a request: by what is queued there, by the prefix it is thought to have, by how it has failed.

Everything is counted in prompt tokens that stand between a request and its first token. What is believed here of
caches can be wrong (an instance evicts as it likes): that costs time, never correctness.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from railwire.kvcache.router.membership import Member

_FIRST_PENALTY = 0.5  # seconds
_LAST_PENALTY = 30.0


class Policy(Protocol):
    """Chooses among members. One event loop calls it; nothing here waits."""

    def prefiller(self, tokens: Sequence[int], candidates: Sequence[Member]) -> Member:
        """One of ``candidates`` (at least one) to compute this prompt."""

    def decoder(self, tokens: Sequence[int], candidates: Sequence[Member]) -> Member:
        """One of ``candidates`` to continue it."""

    def began(self, member: Member, tokens: Sequence[int]) -> None:
        """A leg with this prompt has been sent there; :meth:`ended` follows."""

    def ended(self, member: Member, tokens: Sequence[int], ok: bool) -> None:
        """The leg is over: it did its work, or it failed or was cancelled."""

    def failed(self, member: Member) -> None:
        """An attempt failed, and it was this member's fault."""

    def members(self, ids: Collection[str]) -> None:
        """These are all there are now: what is known of others can go."""


def prefix_hashes(tokens: Sequence[int], block_tokens: int, salt: bytes) -> list[bytes]:
    """8-byte hashes of the whole blocks, each chained to those before: equal ones stand for equal prefixes."""
    data = np.asarray(tokens, dtype="<i8")
    previous = salt
    hashes = []
    for begin in range(0, len(data) - block_tokens + 1, block_tokens):
        piece = previous + data[begin : begin + block_tokens].tobytes()
        previous = hashlib.blake2b(piece, digest_size=8).digest()
        hashes.append(previous)
    return hashes


@dataclass(slots=True)
class _Known:
    legs: int = 0
    """Legs under way that will make it, or use it."""
    made: bool = False
    """A leg that makes or uses it has done its work."""


class PrefixIndex:
    """What one instance is thought to have cached: as many blocks as it has, the least recently used go first.

    A leg claims its blocks when it begins. What no leg has ever finished is forgotten with the last that claimed it;
    what one has finished stays, whatever becomes of others.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that are known."""
        for count, digest in enumerate(hashes):
            if digest not in self._known:
                return count
        return len(hashes)

    def claim(self, hashes: Sequence[bytes]) -> None:
        """A leg begins."""
        for known in self._touch(hashes):
            known.legs += 1
        self._shrink()

    def made(self, hashes: Sequence[bytes]) -> None:
        """A leg has done its work."""
        for known in self._touch(hashes):
            known.legs = max(0, known.legs - 1)
            known.made = True
        self._shrink()

    def unclaim(self, hashes: Iterable[bytes]) -> None:
        """A leg has failed, or was cancelled. It may have made some; the next prompt would find out anyway."""
        for digest in hashes:
            known = self._known.get(digest)
            if known is None:
                continue
            known.legs -= 1
            if known.legs <= 0 and not known.made:
                del self._known[digest]

    def _touch(self, hashes: Sequence[bytes]) -> Iterator[_Known]:
        for digest in reversed(hashes):  # the beginning of a prefix is the last to go
            known = self._known.setdefault(digest, _Known())
            self._known.move_to_end(digest)
            yield known

    def _shrink(self) -> None:
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)


@dataclass
class MemberState:
    """What the router itself knows of a member."""

    index: PrefixIndex
    queued_tokens: int = 0
    legs: int = 0
    failures: int = 0
    """In a row."""
    penalty_until: float = 0.0
    charged: dict[tuple[int, int], list[int]] = field(default_factory=dict)


class LoadAndPrefix:
    """The default policy. The cost of a prefiller is its queued tokens plus those of the prompt that it does not
    have; that of a decoder is its running legs. Members that failed of late are used only if there are no others.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, MemberState] = {}
        self._turn = 0
        self._hashed: tuple[Sequence[int], dict[tuple[int, str], list[bytes]]] = ((), {})

    def state(self, member: Member) -> MemberState:
        known = self._states.get(member.id)
        if known is None:
            known = self._states[member.id] = MemberState(PrefixIndex(member.num_blocks))
        return known

    def prefiller(self, tokens: Sequence[int], candidates: Sequence[Member]) -> Member:
        def cost(member: Member) -> float:
            state = self.state(member)
            have = state.index.match(self._hashes(member, tokens)) * member.block_tokens
            # A member's own word counts where other routers send to it, too.
            return max(state.queued_tokens, member.load) + len(tokens) - have

        return self._cheapest(candidates, cost)

    def decoder(self, tokens: Sequence[int], candidates: Sequence[Member]) -> Member:
        def cost(member: Member) -> float:
            have = self.state(member).index.match(self._hashes(member, tokens)) * member.block_tokens
            # Legs share the decoder's steps; of two equally busy ones, the prefix decides.
            return self.state(member).legs - 0.5 * have / max(1, len(tokens))

        return self._cheapest(candidates, cost)

    def began(self, member: Member, tokens: Sequence[int]) -> None:
        state = self.state(member)
        hashes = self._hashes(member, tokens)
        have = state.index.match(hashes) * member.block_tokens
        charge = max(0, len(tokens) - have)
        state.queued_tokens += charge
        state.legs += 1
        state.charged.setdefault(self._key(tokens), []).append(charge)
        # At once, so that those with the same prefix that come meanwhile follow it.
        state.index.claim(hashes)

    def ended(self, member: Member, tokens: Sequence[int], ok: bool) -> None:
        state = self.state(member)
        charges = state.charged.get(self._key(tokens))
        if charges:
            state.queued_tokens -= charges.pop()
            state.legs -= 1
            if not charges:
                del state.charged[self._key(tokens)]
        if ok:
            state.failures = 0
            state.penalty_until = 0.0
            state.index.made(self._hashes(member, tokens))
        else:
            state.index.unclaim(self._hashes(member, tokens))

    def failed(self, member: Member) -> None:
        state = self.state(member)
        state.failures += 1
        pause = min(_LAST_PENALTY, _FIRST_PENALTY * 2 ** min(state.failures - 1, 10))
        state.penalty_until = self._clock() + pause

    def members(self, ids: Collection[str]) -> None:
        self._states = {key: state for key, state in self._states.items() if key in ids or state.legs > 0}

    def _cheapest(self, candidates: Sequence[Member], cost: Callable[[Member], float]) -> Member:
        now = self._clock()
        good = [member for member in candidates if self.state(member).penalty_until <= now] or list(candidates)
        costs = [cost(member) for member in good]
        best = min(costs)
        equal = [member for member, value in zip(good, costs, strict=True) if value == best]
        self._turn += len(equal) > 1  # a choice among one takes nobody's turn
        return equal[self._turn % len(equal)]

    def _hashes(self, member: Member, tokens: Sequence[int]) -> list[bytes]:
        if self._hashed[0] is not tokens:  # a request asks for the same several times
            self._hashed = (tokens, {})
        key = (member.block_tokens, member.fingerprint)
        known = self._hashed[1].get(key)
        if known is None:
            known = self._hashed[1][key] = prefix_hashes(tokens, member.block_tokens, member.fingerprint.encode())
        return known

    @staticmethod
    def _key(tokens: Sequence[int]) -> tuple[int, int]:
        return len(tokens), hash(tuple(tokens))
