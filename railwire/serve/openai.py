"""OpenAI's completions protocol: what clients may ask, and the shape of answers and errors."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from railwire.kvcache.router.transport import Sampling
from railwire.runner import Tokenizer
from railwire.wire import UNREADABLE

MAX_PROMPTS = 64
MAX_STOPS = 16


class ApiError(Exception):
    """An error that a client gets. ``kind`` is OpenAI's type."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return web.json_response(self.body, status=self.status, headers=headers)


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class CompletionBody(msgspec.Struct):
    """POST /v1/completions. Fields of the protocol that are not here are not looked at; those that would change the
    answer :func:`parse` refuses. ``return_token_ids``, ``ignore_eos`` and ``railwire_timing`` are additions."""

    model: str
    prompt: str | list[Any]
    max_tokens: int | None = 16
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    best_of: int | None = None
    echo: bool | None = False
    logprobs: int | None = None
    suffix: str | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    railwire_timing: bool = False


class Completion(msgspec.Struct):
    """A request that has been looked through.

    Attributes:
        prompts: token ids, one list per choice.
    """

    id: str
    created: int
    model: str
    prompts: list[tuple[int, ...]]
    max_tokens: int
    sampling: Sampling
    stops: list[str]
    stream: bool
    usage: bool
    token_ids: bool
    ignore_eos: bool
    timing: bool


def parse(data: bytes, tokenizer: Tokenizer, context_of: Callable[[str], int | None] = lambda _: None) -> Completion:
    """Looks through the body of a request.

    Args:
        context_of: the context of a model by its name, in tokens; None: not known. A prompt that is longer for certain
            is refused before it is turned into tokens, which takes a second for 700 KB of text.

    Raises:
        ApiError: what cannot be answered, naming the parameter; and what ``context_of`` raises.
    """
    try:
        body = msgspec.json.decode(data, type=CompletionBody)
    except UNREADABLE as error:
        raise ApiError(400, f"the request is not valid: {error}") from error
    unsupported = {
        "n": body.n not in (None, 1),
        "best_of": body.best_of not in (None, 1),
        "echo": bool(body.echo),
        "logprobs": body.logprobs is not None,
        "suffix": bool(body.suffix),
        "presence_penalty": bool(body.presence_penalty),
        "frequency_penalty": bool(body.frequency_penalty),
        "logit_bias": bool(body.logit_bias),
    }
    for name, asked in unsupported.items():
        if asked:
            raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    temperature = 0.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if not (math.isfinite(temperature) and 0 <= temperature <= 2):
        raise ApiError(400, f"temperature is 0 to 2, not {temperature}", param="temperature")
    if not (math.isfinite(top_p) and 0 < top_p <= 1):
        raise ApiError(400, f"top_p is above 0 and at most 1, not {top_p}", param="top_p")
    if max_tokens < 1:
        raise ApiError(400, f"max_tokens is at least 1, not {max_tokens}", param="max_tokens")
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    if len(stops) > MAX_STOPS or any(not stop or len(stop) > 1000 for stop in stops):
        raise ApiError(400, f"stop is at most {MAX_STOPS} strings of 1 to 1000 characters", param="stop")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    context = context_of(body.model)
    return Completion(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=body.model,
        prompts=_prompts(body.prompt, tokenizer, context),
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_p, seed % 2**63),
        stops=stops,
        stream=bool(body.stream),
        usage=bool(body.stream_options and body.stream_options.include_usage),
        token_ids=body.return_token_ids,
        ignore_eos=body.ignore_eos,
        timing=body.railwire_timing,
    )


def _prompts(prompt: str | list[Any], tokenizer: Tokenizer, context: int | None) -> list[tuple[int, ...]]:
    """A string, token ids, or a list of either."""
    if isinstance(prompt, str):
        several: list[Any] = [prompt]
    elif prompt and all(type(item) is int for item in prompt):
        several = [prompt]
    else:
        several = prompt
    if not 1 <= len(several) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt has 1 to {MAX_PROMPTS} entries, not {len(several)}", param="prompt")
    prompts = []
    for one in several:
        if isinstance(one, str | list) and context is not None:
            least = -(-len(one) // tokenizer.longest) if isinstance(one, str) else len(one)
            if least >= context:
                raise ApiError(
                    400,
                    f"a prompt of at least {least} tokens leaves no room for an answer in the context of {context}",
                    param="prompt",
                    code="context_length_exceeded",
                )
        if isinstance(one, str):
            tokens = tokenizer.encode(one)
        elif isinstance(one, list) and all(type(item) is int for item in one):
            tokens = one
        else:
            raise ApiError(400, "prompt is a string, a list of token ids, or a list of either", param="prompt")
        if not tokens:
            raise ApiError(400, "an empty prompt cannot be continued", param="prompt")
        if min(tokens) < 0 or max(tokens) >= 2**31:
            raise ApiError(400, "prompt has a token id that is none", param="prompt")
        prompts.append(tuple(tokens))
    return prompts


def choice(index: int, text: str, reason: str | None, token_ids: list[int] | None) -> dict[str, Any]:
    """One entry of ``choices``, of a whole answer or of a chunk of a stream."""
    entry: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
    if token_ids is not None:
        entry["token_ids"] = token_ids
    return entry


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def answer(request: Completion, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A completion object, or a chunk of one."""
    return {
        "id": request.id,
        "object": "text_completion",
        "created": request.created,
        "model": request.model,
        "choices": choices,
        **more,
    }
