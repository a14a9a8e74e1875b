"""The router: sends both legs of a request at once, watches them, and starts again elsewhere when one fails.

It holds no KV and no weights. Members may join, drain and vanish while requests run; a request is bound to no member
but the two of its present attempt, and each attempt has a name, tickets and pages of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from railwire.kvcache.router.membership import Member, Membership, Role
from railwire.kvcache.router.policy import LoadAndPrefix, Policy
from railwire.kvcache.router.transport import (
    DecodeEvent,
    DecodeLeg,
    LegFailed,
    NoMembers,
    PrefillLeg,
    RequestRefused,
    RouteFailed,
    RouteRequest,
    Transport,
)

log = logging.getLogger("railwire.kvcache.router")


@dataclass
class Attempt:
    """One try of a request with a prefiller and a decoder; times are the router's monotonic seconds."""

    id: str
    decoder: Member
    prefiller: Member | None
    tokens: int
    began: float = field(default_factory=time.monotonic)
    events: dict[str, float] = field(default_factory=dict)
    decode_info: dict[str, Any] = field(default_factory=dict)
    prefill_info: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class RouteEvent:
    """What a client's stream is made of.

    Attributes:
        kind: "started" (an attempt), "arrived" (the KV), "token", "rerouted" (with ``error``), "end" (with ``reason``).
        attempt: the one that it came from.
    """

    kind: Literal["started", "arrived", "token", "rerouted", "end"]
    attempt: Attempt
    token: int = -1
    reason: str = ""
    error: str = ""


class Router:
    """Use it from one event loop, after :meth:`start`.

    Args:
        max_attempts: attempts per request.
        member_timeout: seconds that a request waits for a prefiller and a decoder to be there.
        event_timeout: seconds without any word from a decoder (they report several times in this span that they are
            alive) after which it counts as failed.
        resume: continue elsewhere after the first token, too: what has been generated becomes part of the prompt. The
            continuation may differ from that of an uninterrupted answer where two tokens are equally likely.
        poll: seconds between looks for members while a request waits for one.
    """

    def __init__(
        self,
        membership: Membership,
        transport: Transport,
        policy: Policy | None = None,
        *,
        max_attempts: int = 4,
        member_timeout: float = 5.0,
        event_timeout: float = 15.0,
        resume: bool = True,
    ) -> None:
        self.membership = membership
        self.transport = transport
        self.policy: Policy = LoadAndPrefix() if policy is None else policy
        self.max_attempts = max_attempts
        self.member_timeout = member_timeout
        self.event_timeout = event_timeout
        self.resume = resume
        self.reroutes: Counter[str] = Counter()
        """By blame."""
        self.active = 0
        self._members: dict[str, Member] = {}
        self._news = asyncio.Condition()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to follow the registry."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch(), name="railwire-router-members")

    async def close(self) -> None:
        """Stops to follow the registry. Requests that run go on with the members known."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None

    @property
    def members(self) -> Mapping[str, Member]:
        """Those known now, by id."""
        return self._members

    def models(self) -> list[str]:
        """Models for which there is a ready decoder."""
        return sorted({m.model for m in self._members.values() if m.role == "decode" and m.state == "ready"})

    async def route(self, request: RouteRequest) -> AsyncGenerator[RouteEvent, None]:
        """Answers a request, event by event; ends after "end". Closing the generator (or cancelling the task that
        reads it) aborts both legs.

        Raises:
            NoMembers, RouteFailed: no answer; the message says what each attempt met.
            RequestRefused: this request cannot be answered.
        """
        if not request.tokens or request.max_tokens < 1:
            raise RequestRefused("a request has at least one prompt token, and asks for at least one")
        deadline = time.monotonic() + request.timeout
        given: list[int] = []
        avoid: set[str] = set()
        unfit: set[tuple[str, str]] = set()
        errors: list[str] = []
        self.active += 1
        try:
            for number in range(1, self.max_attempts + 1):
                tokens = (*request.tokens, *given)
                decoder, prefiller = await self._choose(request.model, tokens, avoid, unfit, deadline, errors)
                attempt = Attempt(f"{request.id}.{number}", decoder, prefiller, len(tokens))
                yield RouteEvent("started", attempt)
                try:
                    events = self._attempt(request, attempt, tokens, request.max_tokens - len(given), deadline)
                    async with contextlib.aclosing(events):
                        async for event in events:
                            if event.kind == "token":
                                given.append(event.token)
                            yield event
                            if event.kind == "end":
                                return
                    raise LegFailed(f"decoder {decoder.id} ended without saying why", blame="decoder")
                except LegFailed as failure:
                    attempt.error = str(failure)
                    errors.append(f"attempt {number}: {failure}")
                    log.warning("railwire: request %s, attempt %d: %s", request.id, number, failure)
                    if failure.blame == "request":
                        raise RequestRefused(str(failure)) from failure
                    if given and not self.resume:
                        raise RouteFailed(
                            f"request {request.id} broke off after {len(given)} tokens: {failure}"
                        ) from failure
                    if time.monotonic() >= deadline:
                        break
                    if failure.blame == "pair" and prefiller is not None:
                        unfit.add((prefiller.id, decoder.id))
                    else:
                        at_fault = prefiller if failure.blame == "prefiller" and prefiller is not None else decoder
                        avoid.add(at_fault.id)
                        if not failure.busy:
                            self.policy.failed(at_fault)
                    self.reroutes[failure.blame] += 1
                    yield RouteEvent("rerouted", attempt, error=str(failure))
                if len(given) >= request.max_tokens:  # its last word got lost, nothing else
                    yield RouteEvent("end", attempt, reason="length")
                    return
                await asyncio.sleep(min(0.02 * 4 ** (number - 1), 0.5) if number > 1 else 0)
            raise RouteFailed(f"request {request.id} failed {len(errors)} times: " + "; ".join(errors))
        finally:
            self.active -= 1

    # ---- members -----------------------------------------------------------------------------------------------------
    async def _watch(self) -> None:
        while True:
            try:
                async for members in self.membership.watch():
                    self._members = members
                    self.policy.members(members.keys())
                    async with self._news:
                        self._news.notify_all()
            except Exception:  # of a registry from elsewhere: requests go on with the members known
                log.exception("railwire: following the registry of members failed; trying again")
            await asyncio.sleep(1.0)

    async def _choose(
        self,
        model: str,
        tokens: Sequence[int],
        avoid: set[str],
        unfit: set[tuple[str, str]],
        deadline: float,
        errors: Sequence[str],
    ) -> tuple[Member, Member | None]:
        """A decoder, and a prefiller with the same weights if there is something to prefill."""
        until = min(deadline, time.monotonic() + self.member_timeout)
        while True:
            pair = self._pair(model, tokens, avoid, unfit)
            if pair is not None:
                return pair
            left = until - time.monotonic()
            if left <= 0:
                counts = Counter(member.role for member in self._members.values() if member.model == model)
                text = (
                    f"no prefiller and decoder for model {model!r} that fit each other "
                    f"({counts['prefill']} prefillers, {counts['decode']} decoders are known, draining ones included)"
                )
                raise NoMembers("; ".join([text, *errors]))
            async with self._news:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), min(left, 0.25))

    def _pair(
        self, model: str, tokens: Sequence[int], avoid: set[str], unfit: set[tuple[str, str]]
    ) -> tuple[Member, Member | None] | None:
        def ready(role: Role) -> list[Member]:
            members = [m for m in self._members.values() if m.role == role and m.state == "ready" and m.model == model]
            # Those that failed this request before are better than nobody: they may have failed for a passing reason.
            return [m for m in members if m.id not in avoid] + [m for m in members if m.id in avoid]

        decoders, prefillers = ready("decode"), ready("prefill")
        if len(tokens) > 1:
            prints = {m.fingerprint for m in prefillers}
            decoders = [m for m in decoders if m.fingerprint in prints]
        while decoders:
            fresh = [m for m in decoders if m.id not in avoid]
            decoder = self.policy.decoder(tokens, fresh or decoders)
            if len(tokens) == 1:
                return decoder, None
            fitting = [
                m for m in prefillers if m.fingerprint == decoder.fingerprint and (m.id, decoder.id) not in unfit
            ]
            if fitting:
                return decoder, self.policy.prefiller(tokens, [m for m in fitting if m.id not in avoid] or fitting)
            decoders = [m for m in decoders if m.id != decoder.id]
        return None

    # ---- one attempt -------------------------------------------------------------------------------------------------
    async def _attempt(
        self, request: RouteRequest, attempt: Attempt, tokens: tuple[int, ...], max_tokens: int, deadline: float
    ) -> AsyncGenerator[RouteEvent, None]:
        queue: asyncio.Queue[DecodeEvent | LegFailed | None] = asyncio.Queue()
        left = max(0.001, deadline - time.monotonic())
        decode_leg = DecodeLeg(
            attempt.id, tokens, max_tokens, attempt.prefiller, request.stop_tokens, request.sampling, left
        )
        tasks = [asyncio.create_task(self._decode(attempt, decode_leg, queue), name=f"decode {attempt.id}")]
        prefill: asyncio.Task[None] | None = None
        if attempt.prefiller is not None:
            leg = PrefillLeg(attempt.id, tokens, left)
            prefill = asyncio.create_task(
                self._prefill(attempt, attempt.prefiller, leg, queue), name=f"prefill {attempt.id}"
            )
            tasks.append(prefill)
        have_kv = False
        last_word = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise LegFailed(f"its {request.timeout:g} s are over", blame="decoder")
                silence = last_word + self.event_timeout - now
                try:
                    item = await asyncio.wait_for(queue.get(), max(0.001, min(silence, deadline - now)))
                except asyncio.TimeoutError:
                    if time.monotonic() < deadline:
                        text = f"decoder {attempt.decoder.id} has been silent for {self.event_timeout:g} s"
                        raise LegFailed(text, blame="decoder") from None
                    continue
                if item is None:
                    return
                if isinstance(item, LegFailed):
                    if item.blame == "prefiller" and have_kv:
                        attempt.error = str(item)
                        continue  # its work is here; what became of it is no longer this request's affair
                    raise item
                last_word = time.monotonic()
                attempt.events.setdefault(item.kind, last_word)
                if item.kind == "token":
                    yield RouteEvent("token", attempt, token=item.token)
                elif item.kind == "end":
                    attempt.decode_info.update(item.info)
                    if prefill is not None and not prefill.done():
                        # Its timeline is on the way: the pages have all come.
                        await asyncio.wait([prefill], timeout=1.0)
                    yield RouteEvent("end", attempt, reason=str(item.info.get("reason", "length")))
                    return
                else:
                    attempt.decode_info.update(item.info)
                    if item.kind == "arrived":
                        have_kv = True
                        yield RouteEvent("arrived", attempt)
                    elif item.kind == "accepted" and item.info.get("need_prefill") is False:
                        have_kv = True  # it has the whole prefix itself
                        if prefill is not None:
                            prefill.cancel()
        finally:
            for task in tasks:
                task.cancel()
            # Each ends its connection; that takes no answer from the other end.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _prefill(
        self, attempt: Attempt, member: Member, leg: PrefillLeg, queue: asyncio.Queue[DecodeEvent | LegFailed | None]
    ) -> None:
        self.policy.began(member, leg.tokens)
        ok = False
        try:
            attempt.prefill_info.update(await self.transport.prefill(member, leg))
            attempt.events.setdefault("prefilled", time.monotonic())
            ok = True
        except LegFailed as failure:
            # The decoder did not want it, or is lost: it is the decoder's leg that says what happened.
            attempt.prefill_info["error"] = str(failure)
            if failure.blame != "decoder":
                queue.put_nowait(failure)
        finally:
            self.policy.ended(member, leg.tokens, ok)

    async def _decode(
        self, attempt: Attempt, leg: DecodeLeg, queue: asyncio.Queue[DecodeEvent | LegFailed | None]
    ) -> None:
        member = attempt.decoder
        self.policy.began(member, leg.tokens)
        ok = False
        try:
            events = self.transport.decode(member, leg)
            try:
                async for event in events:
                    ok = ok or event.kind == "end"
                    queue.put_nowait(event)
            finally:
                closing = getattr(events, "aclose", None)
                if closing is not None:
                    await closing()
            queue.put_nowait(None)
        except LegFailed as failure:
            queue.put_nowait(failure)
        finally:
            self.policy.ended(member, leg.tokens, ok)
