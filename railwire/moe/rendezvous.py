"""How the ranks of a group find each other: an *exchange* is a function that all ranks call, each with some bytes, and
that returns what all of them gave, in rank order. Any all-gather will do; here is one over any torch ``Store``."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

Exchange = Callable[[bytes], Sequence[bytes]]


def file_store(path: str, ranks: int = -1) -> Any:
    """A torch store in a file, for ranks of one host."""
    import torch.distributed as dist

    return dist.FileStore(path, ranks)  # type: ignore[attr-defined]


class StoreExchange:
    """An exchange over a ``torch.distributed`` store (TCPStore, FileStore, HashStore) or process group.

    Args:
        store: shared by the ranks.
        rank, ranks: this process and how many there are.
        prefix: keys begin so: one for each group.
        timeout: seconds to wait for the others.
        present: ranks that take part; the others' bytes are empty. None: all.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, prefix: str = "moe", timeout: float = 60.0,
        present: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._prefix = prefix
        self._timeout = datetime.timedelta(seconds=timeout)
        self._present = set(range(ranks) if present is None else present)
        self._round = 0

    def __call__(self, data: bytes) -> list[bytes]:
        self._round += 1
        self._store.set(f"{self._prefix}/{self._round}/{self._rank}", data)
        keys = [f"{self._prefix}/{self._round}/{rank}" for rank in sorted(self._present)]
        self._store.wait(keys, self._timeout)
        found = dict(zip(sorted(self._present), (self._store.get(key) for key in keys), strict=True))
        return [bytes(found.get(rank, b"")) for rank in range(self._ranks)]


class GroupExchange:
    """An exchange over a ``torch.distributed`` process group (its all-gather of objects)."""

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def __call__(self, data: bytes) -> list[bytes]:
        import torch.distributed as dist

        out: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(out, data, group=self._group)
        return [bytes(item) for item in out]
