"""The same kills and hang-ups for every connector: what becomes of answers, of those who wait, and of the pages.

    .venv-vllm/bin/python bench/vllm_faults.py [--seed N] [--requests N] [--json FILE]

For each contender: requests of mixed lengths, some of which hang up at a random moment; in the middle the prefill
process is killed, and started again on its port; then as many requests again. The client sends both legs itself and
repeats nothing. float32, so that a correct answer is the same token by token. Counted are answers that differ from a
single process', requests without any end for 60 s, errors, and the share of KV blocks that is held 60 s after the last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from pairs import CONTENDERS, Pair, Placement, Server, end_on_sigterm
from rich.console import Console
from rich.table import Table
from vllm_connectors import MODEL

from railwire.runner import export

ANSWER = 10
LENGTHS = [20, 100, 129, 257, 400, 600]
HANG_SECONDS = 60.0
REST_SECONDS = 60.0


class Schedule:
    """What happens, the same for everyone: drawn from the seed alone."""

    def __init__(self, seed: int, requests: int) -> None:
        rng = random.Random(seed)
        self.prompts = [
            [rng.randrange(100, 40000) for _ in range(LENGTHS[number % len(LENGTHS)])] for number in range(2 * requests)
        ]
        self.starts = [rng.uniform(0.0, 6.0) for _ in self.prompts]
        self.patience = [rng.uniform(0.05, 4.0) if rng.random() < 0.4 else HANG_SECONDS for _ in self.prompts]
        self.kill_at = rng.uniform(2.0, 4.0)


async def one(pair: Pair, http: aiohttp.ClientSession, schedule: Schedule, number: int, reference: list[int]) -> str:
    await asyncio.sleep(schedule.starts[number])
    patience = schedule.patience[number]
    try:
        answer = await asyncio.wait_for(pair.ask(http, schedule.prompts[number], ANSWER), patience)
    except asyncio.TimeoutError:
        return "hung" if patience >= HANG_SECONDS else "hung up"
    except (aiohttp.ClientError, RuntimeError, OSError):
        return "error"
    if len(answer.tokens) < ANSWER:
        return "cut short"
    return "right" if answer.tokens == reference else "WRONG"


async def held(http: aiohttp.ClientSession, server: Server) -> float:
    """Share of the KV cache that is in use when nobody asks for anything."""
    end = time.monotonic() + REST_SECONDS
    while True:
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}
        try:
            async with http.post(f"{server.url}/v1/completions", json=body) as response:
                await response.read()
            await asyncio.sleep(1.0)
            used = await asyncio.to_thread(server.metric, "vllm:kv_cache_usage_perc")
        except (aiohttp.ClientError, OSError):
            return float("nan")  # it has died
        if used == 0 or time.monotonic() > end:
            return used
        await asyncio.sleep(1.0)


async def run(pair: Pair, schedule: Schedule, requests: int) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as http:
        references = [await pair.alone(http, prompt, ANSWER) for prompt in schedule.prompts]
        await pair.learn(http)
        counts: Counter[str] = Counter()

        def batch(begin: int, end: int) -> asyncio.Future[list[str]]:
            return asyncio.gather(*(one(pair, http, schedule, n, references[n]) for n in range(begin, end)))

        first = asyncio.ensure_future(batch(0, requests))
        await asyncio.sleep(schedule.kill_at)
        await asyncio.to_thread(pair.prefill.kill)
        pair.restart()
        counts.update(await first)
        await asyncio.to_thread(pair.prefill.ready)
        again = "yes"
        try:
            await asyncio.wait_for(pair.learn(http), HANG_SECONDS)
        except (asyncio.TimeoutError, aiohttp.ClientError, RuntimeError, OSError, KeyError) as error:
            again = f"no ({type(error).__name__})"
        counts.update(await batch(requests, 2 * requests))
        return {
            "contender": pair.contender,
            **{kind: counts[kind] for kind in ("right", "WRONG", "cut short", "hung", "error", "hung up")},
            "served after restart": again,
            "decode KV held": await held(http, pair.decode),
            "prefill KV held": await held(http, pair.prefill),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path)
    Placement.add_options(parser)
    arguments = parser.parse_args()
    end_on_sigterm()
    if not (MODEL / "tokenizer_config.json").is_file():
        export.export("smollm2", MODEL)
    print(f"seed {arguments.seed}", flush=True)
    schedule = Schedule(arguments.seed, arguments.requests)
    rows = []
    with tempfile.TemporaryDirectory(prefix="railwire-bench-") as folder:
        for name in arguments.contenders.split(","):
            flags = ["--dtype", "float32", "--max-model-len", "2048"]
            pair = Pair(name, MODEL, Path(folder), flags, Placement.of(arguments))
            try:
                for server in (pair.prefill, pair.decode):
                    server.start()
                for server in (pair.prefill, pair.decode):
                    server.ready()
                rows.append(asyncio.run(run(pair, schedule, arguments.requests)))
                print(json.dumps(rows[-1]), flush=True)
            finally:
                for server in (pair.prefill, pair.decode):
                    server.kill()
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
