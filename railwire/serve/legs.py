"""The bodies of the requests that a router sends to workers, and of the errors that come back."""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec
from aiohttp import web

from railwire.kvcache.router.transport import Blame
from railwire.runner import Runner
from railwire.wire import UNREADABLE

T = TypeVar("T")


class PrefillBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /prefill. ``instance`` is the id of the life of the worker that is meant; ``timeout`` in seconds."""

    request_id: str
    instance: str
    tokens: list[int]
    timeout: float


class Prefiller(msgspec.Struct):
    """Whom a decoder gets its KV from: instance id and the descriptors of all ranks (base64 in JSON)."""

    instance: str
    ranks: list[bytes]


class DecodeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /decode; the answer is a stream of JSON lines."""

    request_id: str
    instance: str
    tokens: list[int]
    max_tokens: int
    timeout: float
    prefiller: Prefiller | None = None
    stop_tokens: list[int] = []
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class LegError(Exception):
    """A leg that a worker does not, or cannot, do. See ``LegFailed`` for ``blame`` and ``busy``."""

    def __init__(self, message: str, *, blame: Blame, busy: bool = False, status: int = 500) -> None:
        super().__init__(message)
        self.blame: Blame = blame
        self.busy = busy
        self.status = status

    @property
    def body(self) -> dict[str, object]:
        return {"message": str(self), "blame": self.blame, "busy": self.busy}

    def response(self) -> web.Response:
        return web.json_response({"error": self.body}, status=self.status)


async def read_body(request: web.Request, kind: type[T]) -> T:
    """Raises LegError if the request is no such body."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except UNREADABLE as error:
        raise LegError(f"not the body of {request.path}: {error}", blame="request", status=400) from error


def check(
    runner: Runner, instance: str, draining: bool, role: Blame, body: PrefillBody | DecodeBody, room: int
) -> None:
    """What both kinds of worker refuse.

    Args:
        room: tokens that are generated besides.

    Raises:
        LegError: another life of this worker is meant, it is draining, or the request cannot be.
    """
    if body.instance != instance:
        raise LegError(f"instance {body.instance} is meant, this is {instance}", blame=role, status=409)
    if draining:
        raise LegError(f"this {role} is draining", blame=role, busy=True, status=503)
    if not 1 <= len(body.request_id) <= 256:
        raise LegError("a request id has 1 to 256 characters", blame="request", status=400)
    if not body.tokens or not (min(body.tokens) >= 0 and max(body.tokens) < runner.vocab):
        raise LegError(f"tokens are 0..{runner.vocab - 1}, and at least one", blame="request", status=400)
    if not 0 < body.timeout <= 86400:
        raise LegError(f"a time-out of {body.timeout} s cannot be", blame="request", status=400)
    total = len(body.tokens) + room
    if total > runner.context:
        raise LegError(f"{total} tokens exceed the context of {runner.context}", blame="request", status=400)
    if total > runner.num_blocks * runner.block_tokens:
        raise LegError(
            f"{total} tokens exceed the KV cache of {runner.num_blocks} blocks of {runner.block_tokens}",
            blame="request",
            status=400,
        )


def clock() -> dict[str, float]:
    """This process's monotonic clock, and what to add to get seconds since 1970. On one host all processes share it."""
    now = time.monotonic()
    return {"monotonic": now, "epoch": time.time() - now}
