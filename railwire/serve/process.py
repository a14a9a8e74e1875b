"""What every serving process has: an HTTP server with /health and /metrics, a place in the registry, and an orderly
end.

The end, on SIGTERM or SIGINT: leave the registry, refuse what is new, let what runs finish (for ``drain_timeout``
seconds, then it is aborted), say goodbye to the peers, exit with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from railwire.errors import ConfigurationError, RailwireError
from railwire.kvcache.router.membership import Member, Membership, keep
from railwire.serve.config import ListenConfig
from railwire.topology import default_address

log = logging.getLogger("railwire.serve")


class Service(Protocol):
    """What a process does besides."""

    draining: bool
    changed: asyncio.Event
    """Set to have the member's record published anew at once."""

    @property
    def role(self) -> str: ...

    def routes(self) -> list[web.RouteDef]: ...

    def member(self, url: str) -> Member | None:
        """The record to publish; None for a process that is no member."""

    async def start(self) -> None: ...

    def health(self) -> dict[str, Any]: ...

    async def drain(self, timeout: float) -> None:
        """Lets what runs finish, for so long; aborts the rest."""

    async def close(self) -> None: ...


def new_registry() -> CollectorRegistry:
    """Metrics of this process alone, with those of the process itself."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def application(service: Service, registry: CollectorRegistry, max_body: int) -> web.Application:
    """The aiohttp application of a service."""

    async def health(_: web.Request) -> web.Response:
        body = {"status": "draining" if service.draining else "ready", "role": service.role, **service.health()}
        return web.json_response(body, status=503 if service.draining else 200)

    async def metrics(_: web.Request) -> web.Response:
        # In a thread: asking an engine for its numbers takes its locks.
        text = await asyncio.to_thread(generate_latest, registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(client_max_size=max_body)
    app.add_routes([web.get("/health", health), web.get("/metrics", metrics), *service.routes()])
    return app


def own_url(host: str, port: int) -> str:
    """Where others reach a process that listens on ``host``. Who listens everywhere is reached at the default address:
    http://0.0.0.0 would lead the others to themselves."""
    host = host.strip("[]")
    if host in ("", "0.0.0.0", "::"):
        host = default_address()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    config: ListenConfig,
    service: Service,
    membership: Membership,
    registry: CollectorRegistry,
    *,
    max_body: int = 64 << 20,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Runs until SIGTERM or SIGINT, and ends in order. ``ready(url)`` is called when requests can come."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def end(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is under way
            loop.call_soon_threadsafe(stop.set)

    # Not loop.add_signal_handler(): closing the loop takes that away again, and a second SIGTERM (supervisors like to
    # send several) would kill the process on its last steps.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    # handler_cancellation: who hangs up wants the work no more.
    runner = web.AppRunner(application(service, registry, max_body), handler_cancellation=True, access_log=None)
    await runner.setup()
    keeper: asyncio.Task[None] | None = None
    record: Member | None = None
    try:
        site = web.TCPSite(runner, config.host, config.port, shutdown_timeout=1.0)
        try:
            await site.start()
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
            ) from error
        port = runner.addresses[0][1]
        url = config.advertise or own_url(config.host, port)
        await service.start()
        record = service.member(url)
        if record is not None:

            def current() -> Member:
                member = service.member(url)
                assert member is not None
                return member

            keeper = asyncio.create_task(keep(membership, current, config.ttl, service.changed))
        (ready or _announce(service.role))(url)
        await stop.wait()
        log.info("railwire: %s worker drains", service.role)
    finally:
        service.draining = True
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if record is not None:
            # If the registry is gone, our time there runs out by itself.
            with contextlib.suppress(RailwireError, asyncio.TimeoutError):
                await asyncio.wait_for(membership.leave(record.id), 2.0)
        try:
            await service.drain(config.drain_timeout)
        finally:
            await runner.cleanup()
            await service.close()
            await membership.close()


def _announce(role: str) -> Callable[[str], None]:
    def announce(url: str) -> None:
        # For whoever started us: where we are (port 0), and that we are there.
        print(json.dumps({"role": role, "url": url, "pid": os.getpid()}), flush=True)

    return announce


def run(main: Callable[[], Any], log_level: str) -> None:
    """Runs ``main()`` on an event loop of its own; the process exits with 0, or 1 and a plain sentence."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings come with stack traces; we say what matters
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        asyncio.run(main())
    except RailwireError as error:
        log.error("railwire: %s", error)
        sys.exit(1)
    finally:
        # It is ending: nothing is left that a signal could ask for. (The interpreter takes its own handlers away before
        # the last second or two of its end, but leaves this.)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
