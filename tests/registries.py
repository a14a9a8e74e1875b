"""Registries of members: what their tests need."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from railwire.kvcache.router.membership import (
    Member,
)


def member(name: str, **more: Any) -> Member:
    settings: dict[str, Any] = {
        "role": "prefill",
        "url": f"http://{name}:1",
        "model": "m",
        "fingerprint": "f",
        "block_tokens": 16,
        "num_blocks": 64,
        "context": 1000,
        "vocab": 100,
        "ranks": (bytes(range(256)), b""),
        **more,
    }
    return Member(id=name, **settings)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run(main: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60.0))  # type: ignore[arg-type]


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.02)
