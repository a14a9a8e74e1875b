"""The router's process: OpenAI-compatible HTTP for clients, in front of ``railwire.kvcache.router``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from railwire.kvcache.router import (
    Attempt,
    Member,
    Membership,
    NoMembers,
    RequestRefused,
    RouteFailed,
    Router,
    RouteRequest,
)
from railwire.kvcache.router.registry import open_membership
from railwire.runner import Tokenizer
from railwire.serve import openai
from railwire.serve.by_api import ApiTransport
from railwire.serve.config import RouterConfig
from railwire.serve.openai import ApiError, Completion
from railwire.serve.process import new_registry, serve
from railwire.serve.text import StopText, load_tokenizer

log = logging.getLogger("railwire.serve")

_WRITE_SECONDS = 60.0
_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class Answer:
    """One choice as it grows."""

    def __init__(self, index: int, prompt_tokens: int, stops: list[str], tokenizer: Tokenizer) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.cached = 0
        self.tokens: list[int] = []
        self.text: list[str] = []
        self.reason = ""
        self.attempts: list[Attempt] = []
        self.stop = StopText(stops)
        self.detokenizer = tokenizer.detokenizer()


class RouterService:
    """A :class:`~railwire.serve.process.Service`."""

    role = "router"

    def __init__(self, config: RouterConfig, membership: Membership, registry: CollectorRegistry) -> None:
        self.config = config
        self.draining = False
        self.changed = asyncio.Event()
        self.tokenizer = load_tokenizer(config.runner, config.model, config.options)
        self.transport = ApiTransport(silence=config.event_timeout)
        self.router = Router(
            membership,
            self.transport,
            max_attempts=config.max_attempts,
            event_timeout=config.event_timeout,
            resume=config.resume,
        )
        self._running: set[asyncio.Task[Any]] = set()
        self._active = 0
        self._measure(registry)

    def _measure(self, registry: CollectorRegistry) -> None:
        self._requests = Counter("railwire_router_requests", "Prompts by outcome.", ["outcome"], registry=registry)
        self._reroutes = Counter(
            "railwire_router_reroutes", "Attempts that failed and were followed by another.", registry=registry
        )
        self._tokens = Counter("railwire_router_tokens", "Tokens by kind.", ["kind"], registry=registry)
        self._ttft = Histogram(
            "railwire_router_first_token_seconds", "Time to first token.", buckets=_BUCKETS, registry=registry
        )
        self._gap = Histogram(
            "railwire_router_token_gap_seconds", "Between two tokens.", buckets=_BUCKETS, registry=registry
        )
        active = Gauge("railwire_router_active", "Prompts that are worked on.", registry=registry)
        active.set_function(lambda: self._active)
        members = Gauge("railwire_router_members", "Members known.", ["role", "state"], registry=registry)
        for role in ("prefill", "decode"):
            for state in ("ready", "draining"):
                members.labels(role, state).set_function(functools.partial(self._count, role, state))

    def _count(self, role: str, state: str) -> int:
        return sum(member.role == role and member.state == state for member in self.router.members.values())

    # ---- the service -------------------------------------------------------------------------------------------------
    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/completions", self.completions),
            web.get("/v1/models", self.models),
            web.get("/members", self.members),
        ]

    def member(self, url: str) -> Member | None:
        return None

    async def start(self) -> None:
        await self.router.start()

    def health(self) -> dict[str, Any]:
        roles = [member.role for member in self.router.members.values() if member.state == "ready"]
        return {"active": self._active, "prefillers": roles.count("prefill"), "decoders": roles.count("decode")}

    async def drain(self, timeout: float) -> None:
        if self._running:
            await asyncio.wait(list(self._running), timeout=timeout)
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(list(self._running), timeout=5.0)

    async def close(self) -> None:
        await self.router.close()
        await self.transport.close()

    # ---- what clients see --------------------------------------------------------------------------------------------
    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models: those for which a decoder is there."""
        entries = [
            {"id": name, "object": "model", "created": 0, "owned_by": "railwire"} for name in self.router.models()
        ]
        return web.json_response({"object": "list", "data": entries})

    async def members(self, _: web.Request) -> web.Response:
        """GET /members: who is there, for people."""
        fields = ("id", "role", "state", "url", "model", "load")
        members = [{field: getattr(member, field) for field in fields} for member in self.router.members.values()]
        return web.json_response({"members": members})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await self._completions(request)
        except ApiError as error:
            return error.response()
        except web.HTTPRequestEntityTooLarge as error:
            return ApiError(413, f"a request has at most {self.config.max_body} bytes: {error.reason}").response()
        finally:
            self._running.discard(task)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            raise ApiError(503, "the router is shutting down", kind="server_error", code="draining")
        wanted = await asyncio.to_thread(openai.parse, await request.read(), self.tokenizer, self._context)
        self._check(wanted)
        if self._active + len(wanted.prompts) > self.config.max_active:
            raise ApiError(429, "too many requests are being worked on", kind="rate_limit_error", code="overloaded")
        answers = [
            Answer(index, len(tokens), wanted.stops, self.tokenizer) for index, tokens in enumerate(wanted.prompts)
        ]
        self._active += len(answers)
        try:
            if wanted.stream:
                return await self._stream(request, wanted, answers)
            return await self._whole(wanted, answers)
        finally:
            self._active -= len(answers)

    def _serving(self, model: str) -> list[Member]:
        """Its members; called from other threads, too. Raises ApiError if there are none."""
        members = [m for m in self.router.members.values() if m.model == model]
        if not members:
            names = ", ".join(self.router.models()) or "none yet"
            text = f"the model {model[:200]!r} is not served here; there is: {names}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return members

    def _context(self, model: str) -> int:
        return min(member.context for member in self._serving(model))

    def _check(self, wanted: Completion) -> None:
        members = self._serving(wanted.model)
        vocab, context = min(m.vocab for m in members), min(m.context for m in members)
        for tokens in wanted.prompts:
            if max(tokens) >= vocab:
                raise ApiError(400, f"token ids are 0..{vocab - 1}, not {max(tokens)}", param="prompt")
            if len(tokens) + wanted.max_tokens > context:
                raise ApiError(
                    400,
                    f"{len(tokens)} prompt tokens and {wanted.max_tokens} to come exceed the context of {context}",
                    param="max_tokens",
                    code="context_length_exceeded",
                )

    async def _whole(self, wanted: Completion, answers: list[Answer]) -> web.Response:
        tasks = [asyncio.create_task(self._collect(wanted, answer)) for answer in answers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        choices = [
            openai.choice(a.index, "".join(a.text), a.reason, a.tokens if wanted.token_ids else None) for a in answers
        ]
        more: dict[str, Any] = {"usage": _usage(answers)}
        if wanted.timing:
            more["railwire"] = [_timing(answer) for answer in answers]
        return web.json_response(openai.answer(wanted, choices, **more))

    async def _collect(self, wanted: Completion, answer: Answer) -> None:
        async with contextlib.aclosing(self._generate(wanted, answer)) as pieces:
            async for _ in pieces:
                pass

    async def _stream(self, request: web.Request, wanted: Completion, answers: list[Answer]) -> web.StreamResponse:
        queue: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue()

        async def feed(answer: Answer) -> None:
            try:
                async with contextlib.aclosing(self._generate(wanted, answer)) as pieces:
                    async for text, tokens in pieces:
                        entry = openai.choice(
                            answer.index, text, answer.reason or None, tokens if wanted.token_ids else None
                        )
                        queue.put_nowait(openai.answer(wanted, [entry]))
            except ApiError as error:
                queue.put_nowait(error)
            except Exception as error:  # a bug of ours: a stream that just ends would look like a whole answer
                log.exception("railwire: request %s failed", wanted.id)
                queue.put_nowait(ApiError(500, f"{type(error).__name__}: {error}", kind="server_error"))
            finally:
                queue.put_nowait(None)

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        tasks = [asyncio.create_task(feed(answer)) for answer in answers]
        try:
            # An error that comes before the first token can still be an HTTP error.
            left, item = len(tasks), await queue.get()
            if isinstance(item, ApiError):
                raise item
            await response.prepare(request)
            while True:
                if item is None:
                    left -= 1
                elif isinstance(item, ApiError):
                    await _send(response, item.body)
                    return response
                else:
                    await _send(response, item)
                if not left:
                    break
                item = await queue.get()
            if wanted.usage or wanted.timing:
                more: dict[str, Any] = {"usage": _usage(answers)}
                if wanted.timing:
                    more["railwire"] = [_timing(answer) for answer in answers]
                await _send(response, openai.answer(wanted, [], **more))
            await asyncio.wait_for(response.write(b"data: [DONE]\n\n"), _WRITE_SECONDS)
            await response.write_eof()
        except (ConnectionError, asyncio.TimeoutError):
            log.info("railwire: the client of %s has gone", wanted.id)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return response

    async def _generate(self, wanted: Completion, answer: Answer) -> AsyncGenerator[tuple[str, list[int]], None]:
        """Routes one prompt; yields (text, its tokens). At the end ``answer.reason`` is set, before the last piece."""
        request = RouteRequest(
            id=f"{wanted.id}-{answer.index}",
            model=wanted.model,
            tokens=wanted.prompts[answer.index],
            max_tokens=wanted.max_tokens,
            stop_tokens=() if wanted.ignore_eos else self.tokenizer.stop_tokens,
            sampling=wanted.sampling,
            timeout=self.config.request_timeout,
        )
        began = last = time.monotonic()
        outcome = "cancelled"
        try:
            async with contextlib.aclosing(self.router.route(request)) as events:
                held: list[int] = []
                async for event in events:
                    if event.kind == "started":
                        answer.attempts.append(event.attempt)
                    elif event.kind == "rerouted":
                        self._reroutes.inc()
                    elif event.kind == "token":
                        now = time.monotonic()
                        (self._gap if answer.tokens else self._ttft).observe(now - (last if answer.tokens else began))
                        last = now
                        answer.tokens.append(event.token)
                        held.append(event.token)
                        text = answer.stop.push(answer.detokenizer.push(event.token))
                        answer.text.append(text)
                        if answer.stop.hit:
                            answer.reason = "stop"
                            break  # closing the events ends both legs
                        if text or wanted.token_ids:
                            yield text, held
                            held = []
                    elif event.kind == "end":
                        infos = (event.attempt.prefill_info, event.attempt.decode_info)
                        answer.cached = max(int(info.get("cached_tokens", 0)) for info in infos)
                        answer.reason = "stop" if event.reason == "stop" else "length"
                        rest = answer.stop.push(answer.detokenizer.finish())
                        text = rest + answer.stop.finish()
                        answer.text.append(text)
                        break
            outcome = "ok"
            self._tokens.labels("prompt").inc(answer.prompt_tokens)
            self._tokens.labels("completion").inc(len(answer.tokens))
            yield answer.text[-1] if answer.text else "", held
        except RequestRefused as error:
            outcome = "refused"
            raise ApiError(400, str(error)) from error
        except NoMembers as error:
            outcome = "no_members"
            raise ApiError(503, str(error), kind="server_error", code="no_members") from error
        except RouteFailed as error:
            outcome = "failed"
            raise ApiError(502, str(error), kind="server_error", code="upstream_failed") from error
        finally:
            self._requests.labels(outcome).inc()


async def _send(response: web.StreamResponse, body: dict[str, Any]) -> None:
    # A client that does not read must not hold a decoder's memory for ever.
    await asyncio.wait_for(response.write(b"data: " + msgspec.json.encode(body) + b"\n\n"), _WRITE_SECONDS)


def _usage(answers: list[Answer]) -> dict[str, Any]:
    return openai.usage(
        sum(a.prompt_tokens for a in answers), sum(len(a.tokens) for a in answers), sum(a.cached for a in answers)
    )


def _timing(answer: Answer) -> dict[str, Any]:
    """When what happened, attempt by attempt. Times of a worker are of its monotonic clock; ``clock.epoch`` added
    they are seconds since 1970."""
    attempts = [
        {
            "id": attempt.id,
            "prefiller": attempt.prefiller.id if attempt.prefiller else None,
            "decoder": attempt.decoder.id,
            "tokens": attempt.tokens,
            "began": attempt.began,
            "events": attempt.events,
            "decode": attempt.decode_info,
            "prefill": attempt.prefill_info,
            "error": attempt.error,
        }
        for attempt in answer.attempts
    ]
    now = time.monotonic()
    return {"index": answer.index, "attempts": attempts, "clock": {"monotonic": now, "epoch": time.time() - now}}


async def main(config: RouterConfig) -> None:
    """Runs a router until SIGTERM."""
    registry = new_registry()
    membership = open_membership(config.membership, server=config.host_store, secret=config.secret)
    await serve(config, RouterService(config, membership, registry), membership, registry, max_body=config.max_body)
