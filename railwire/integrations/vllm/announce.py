"""Keeps this vLLM instance in the registry that the router reads, while its OpenAI server is well."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import aiohttp
from vllm.logger import init_logger

from railwire.errors import RailwireError
from railwire.integrations.vllm.layout import data_parallel_rank
from railwire.integrations.vllm.options import Options
from railwire.kvcache.router.membership import Member, Membership, Role, keep
from railwire.kvcache.router.registry import open_membership

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from railwire.integrations.vllm.scheduler import ConnectorScheduler

log = init_logger("vllm.railwire")

_PROBE_SECONDS = 2.0


class Announcer:
    """A thread with an event loop of its own, in the process of vLLM's scheduler.

    The engine may be alive where its server is not, or not yet: only an instance whose ``/health`` answers is a member.
    """

    def __init__(self, vllm_config: VllmConfig, options: Options, scheduler: ConnectorScheduler) -> None:
        self._config = vllm_config
        self._options = options
        self._scheduler = scheduler
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._main, name="railwire-announce", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Leaves the registry. Within a few seconds, also where the registry does not answer."""
        loop, task = self._loop, self._task
        if loop is not None and task is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
            self._thread.join(5.0)

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        membership = open_membership(self._options.membership, secret=self._options.secret)
        roles: list[Role] = []
        if self._scheduler.sends:
            roles.append("prefill")
        if self._scheduler.receives:
            roles.append("decode")
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PROBE_SECONDS)) as http:
                while True:
                    await self._until(http, well=True)
                    await self._as_member(http, membership, roles)
        except asyncio.CancelledError:
            pass
        finally:
            await membership.close()

    async def _until(self, http: aiohttp.ClientSession, *, well: bool, changed: asyncio.Event | None = None) -> None:
        """Ends when the server answers (or no longer does). ``changed`` is set when draining begins or ends."""
        misses = 0
        draining = self._draining
        while True:
            if changed is not None and draining != self._draining:
                draining = self._draining
                changed.set()
            try:
                async with http.get(f"{self._options.url.rstrip('/')}/health") as answer:
                    answers = answer.status == 200
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                answers = False
            misses = 0 if answers else misses + 1
            # One slow answer of a busy server is no death.
            if answers if well else misses >= 2:
                return
            await asyncio.sleep(min(1.0, self._options.ttl / 5))

    async def _as_member(self, http: aiohttp.ClientSession, membership: Membership, roles: list[Role]) -> None:
        changed = asyncio.Event()

        def record(role: Role) -> Member:
            return self._member(role)

        keepers = [
            asyncio.create_task(keep(membership, lambda role=role: record(role), self._options.ttl, changed))  # type: ignore[misc]
            for role in roles
        ]
        try:
            await self._until(http, well=False, changed=changed)
            log.warning("railwire: %s does not answer; leaving the registry", self._options.url)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            for role in roles:
                try:
                    await asyncio.wait_for(membership.leave(self._member(role).id), 2.0)
                except (RailwireError, asyncio.TimeoutError):
                    pass  # our time there runs out by itself

    @property
    def _draining(self) -> bool:
        return bool(self._options.drain_file) and os.path.exists(self._options.drain_file)

    def _member(self, role: Role) -> Member:
        handshakes = self._scheduler.handshakes
        first = handshakes[0]
        model = self._config.model_config
        names = model.served_model_name
        served = names[0] if isinstance(names, list) and names else names
        return Member(
            id=f"{first.instance}-{role}",
            role=role,
            api="openai",
            url=self._options.url.rstrip("/"),
            model=str(served or model.model),
            fingerprint=first.fingerprint,
            block_tokens=self._config.cache_config.block_size,
            num_blocks=self._config.cache_config.num_gpu_blocks or first.num_blocks,
            context=model.max_model_len,
            vocab=model.get_vocab_size(),
            ranks=tuple(handshake.descriptor for handshake in handshakes) if role == "prefill" else (),
            incarnation=first.incarnation,
            state="draining" if self._draining else "ready",
            load=self._scheduler.queued_tokens if role == "prefill" else 0,
            dp_rank=data_parallel_rank(self._config),
        )
