"""The answers of a single process: ``python -m railwire.demo.oracle`` reads a job from stdin, writes a line per answer.

It runs in a process of its own so that torch's threads, and the memory of one more model, do not stay with the demo.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from railwire.demo.cluster import Failed, Process
from railwire.errors import RailwireError

_LOAD_SECONDS = 120.0


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """What to compute: greedy answers of ``max_tokens`` tokens, end-of-text ignored."""

    runner: str
    model: str
    options: dict[str, Any]
    prompts: list[str]
    max_tokens: int


class Answer(msgspec.Struct):
    """Of prompt ``index``."""

    index: int
    tokens: list[int]
    text: str
    seconds: float


async def answers(job: Job, process: Process) -> AsyncGenerator[Answer, None]:
    """Starts the process and yields its answers in the order of the prompts.

    Raises:
        Failed: it ended early; the message has its last words.
    """
    await process.start([sys.executable, "-m", "railwire.demo.oracle"], stdin=msgspec.json.encode(job))
    for index in range(len(job.prompts)):
        line = await process.line(_LOAD_SECONDS)
        try:
            answer = msgspec.json.decode(line, type=Answer)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Failed(f"{process.name} wrote {line[:100]!r} instead of an answer") from error
        if answer.index != index:
            raise Failed(f"{process.name} answered prompt {answer.index} instead of {index}")
        yield answer
        await asyncio.sleep(0)


def main() -> None:
    import time

    from railwire import runner as runners
    from railwire.serve.text import ByteTokenizer

    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    runner = runners.create(job.runner, model=job.model, **job.options)
    tokenizer = runner.tokenizer or ByteTokenizer()
    pool = runners.BlockPool(runner.num_blocks, runner.block_tokens)
    for index, prompt in enumerate(job.prompts):
        began = time.monotonic()
        tokens = runners.generate(runner, pool, tokenizer.encode(prompt), job.max_tokens)
        answer = Answer(index, tokens, tokenizer.decode(tokens), time.monotonic() - began)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except (RailwireError, ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"the single process: {error}")
