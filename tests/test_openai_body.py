"""Bodies of clients that are too long, or nested too deeply: refused before they cost anything."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the servers need aiohttp")
pytest.importorskip("tokenizers", reason="the tokenizers are those of Hugging Face")

from tokenizers import pre_tokenizers

from railwire.runner.tokenizer import BytePairTokenizer, build
from railwire.serve import openai
from railwire.serve.openai import ApiError
from railwire.serve.text import ByteTokenizer


def body(prompt: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": prompt, "max_tokens": 1}).encode()


@pytest.mark.parametrize("depth", [1100, 50_000])
def test_nested_brackets_are_refused_as_what_they_are(depth: int) -> None:
    for data in (
        b'{"model": "m", "prompt": ' + b"[" * depth + b"]" * depth + b"}",
        b'{"model": "m", "prompt": "x", "unknown": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
    ):
        with pytest.raises(ApiError) as caught:
            openai.parse(data, ByteTokenizer())
        assert caught.value.status == 400


class Untouched(ByteTokenizer):
    longest = 10

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        raise AssertionError("it was to be refused by its length")


@pytest.mark.parametrize("prompt", ["x" * 1000, ["short", "x" * 1000], [1] * 100, [[1], [2] * 100]])
def test_a_prompt_that_is_too_long_is_refused_before_it_is_tokenised(prompt: Any) -> None:
    tokenizer = Untouched()
    if prompt == ["short", "x" * 1000]:
        tokenizer.encode = lambda text, special=False: [1]  # type: ignore[method-assign]
    with pytest.raises(ApiError) as caught:
        openai.parse(body(prompt), tokenizer, lambda model: 100)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_what_may_fit_is_tokenised() -> None:
    parsed = openai.parse(body("x" * 99), ByteTokenizer(), lambda model: 100)
    assert parsed.prompts == [tuple(b"x" * 99)]


def test_other_threads_run_while_a_text_becomes_tokens() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    merges = [f"{a} {b}" for a, b in words]
    tokenizer = BytePairTokenizer(build("gpt2", "gpt-2", letters + words, merges, [1] * (len(letters) + len(words))))
    assert tokenizer.longest == 2
    text = "abcdefgh" * 100_000
    ran: list[float] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.001):
            ran.append(time.monotonic())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        began = time.monotonic()
        tokens = tokenizer.encode(text)
        ended = time.monotonic()
    finally:
        stop.set()
        thread.join()
    assert len(tokens) == len(text) // 2
    # Where the GIL is held all along the other thread wakes once at most.
    assert sum(began < when < ended for when in ran) >= 3, ended - began
