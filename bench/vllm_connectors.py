"""Time to first token and throughput of vLLM pairs with Railwire's connector and with NIXL's, on the same prompts.

    .venv-vllm/bin/python bench/vllm_connectors.py [--quick] [--cells 1x600,4x600] [--json FILE] [--plot FILE.png]
    .venv-vllm/bin/python bench/vllm_connectors.py --cores 4 --unbound --no-nap  # on a machine of 16 cores or more

Contenders take turns, round after round, and are stopped while it is another's; each prompt is new to all of them
(prefix caching is off). Two cores: prefill on the first, decode on the second; the client shares them. A contender
of which a turn fails, or takes longer than --patience, is out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
from pairs import CONTENDERS, Answer, Pair, Placement, Server, end_on_sigterm
from rich.console import Console
from rich.table import Table

from railwire.runner import export

MODEL = Path(__file__).resolve().parents[1] / "build" / "models" / "smollm2"
ANSWER = 8
T = TypeVar("T")
# (concurrent, prompt tokens) -> (rounds, requests per round)
CELLS = {
    (1, 100): (12, 2), (1, 600): (10, 1), (1, 3000): (5, 1),
    (4, 100): (6, 4), (4, 600): (4, 4), (4, 3000): (2, 4),
    (16, 100): (4, 16), (16, 600): (2, 16), (16, 3000): (1, 16),
}  # fmt: skip
QUICK = {(1, 100): (3, 1), (1, 600): (3, 1), (4, 100): (2, 4)}


async def take_turn(pairs: dict[str, Pair], pair: Pair) -> None:
    for other in pairs.values():
        other.rest(other is not pair)
    if len(pairs) > 1:
        await asyncio.sleep(0.5)  # it notices that it has been away


async def measure(
    pairs: dict[str, Pair],
    cells: dict[tuple[int, int], tuple[int, int]],
    patience: float,
    report: Callable[..., None],
) -> None:
    rng = random.Random(11)
    names = list(pairs)  # still taking part

    async def turn(name: str, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await asyncio.wait_for(work, patience)
        except (asyncio.TimeoutError, aiohttp.ClientError, RuntimeError, OSError, KeyError) as error:
            names.remove(name)
            report({"contender": name, "failed": repr(error)})
            return None

    # A server that was stopped for long closes what was kept alive as soon as it goes on: each request connects anew.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=connector) as http:

        async def warm(pair: Pair) -> None:
            await take_turn(pairs, pair)
            await pair.learn(http)
            await pair.ask(http, [rng.randrange(100, 40000) for _ in range(300)], ANSWER)

        async def ask_all(pair: Pair, prompts: list[list[int]], at_once: int) -> tuple[float, list[Answer]]:
            gate = asyncio.Semaphore(at_once)
            await take_turn(pairs, pair)

            async def one(prompt: list[int]) -> Answer:
                async with gate:
                    return await pair.ask(http, prompt, ANSWER)

            began = time.monotonic()
            results = await asyncio.gather(*map(one, prompts))
            return time.monotonic() - began, results

        for name, pair in pairs.items():
            await turn(name, warm(pair))
        for (at_once, length), (rounds, requests) in cells.items():
            answers: dict[str, list[Answer]] = {name: [] for name in names}
            seconds = dict.fromkeys(names, 0.0)
            wrong = dict.fromkeys(names, 0)
            for number in range(rounds):
                prompts = [[rng.randrange(100, 40000) for _ in range(length)] for _ in range(requests)]
                given: dict[str, list[list[int]]] = {}
                if not names:
                    raise SystemExit("no contender is left")
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    if result := await turn(name, ask_all(pairs[name], prompts, at_once)):
                        seconds[name] += result[0]
                        answers[name] += result[1]
                        given[name] = [answer.tokens for answer in result[1]]
                for name in names:
                    wrong[name] += sum(a != b for a, b in zip(given[name], given[names[0]], strict=True))
            for name in names:
                first = np.array([answer.first for answer in answers[name]])
                row = {
                    "contender": name, "at_once": at_once, "tokens": length, "requests": len(first),
                    "ttft_p50_ms": round(1e3 * float(np.percentile(first, 50)), 1),
                    "ttft_p99_ms": round(1e3 * float(np.percentile(first, 99)), 1),
                    "prefill_p50_ms": round(1e3 * float(np.median([answer.prefilled for answer in answers[name]])), 1),
                    "prompt_tokens_per_s": round(length * len(first) / seconds[name], 1),
                    "other_answers_than_railwire": wrong[name],
                }  # fmt: skip
                report(row, (1e3 * first).round(1).tolist())


def table(rows: list[dict[str, Any]], names: list[str]) -> None:
    console = Console(width=140)
    out = Table("at once", "tokens", *[f"{name} p50 / p99 ms" for name in names], *[f"{name} tok/s" for name in names])
    cells: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            cells.setdefault((row["at_once"], row["tokens"]), {})[row["contender"]] = row
    for (at_once, length), by_name in cells.items():
        found = [by_name.get(name) for name in names]
        times = [f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f}" if row else "-" for row in found]
        rates = [f"{row['prompt_tokens_per_s']:.0f}" if row else "-" for row in found]
        out.add_row(str(at_once), str(length), *times, *rates)
    console.print(out)


async def picture(pairs: dict[str, Pair], trace: Path, path: Path) -> None:
    """One request of 600 tokens with each connector: when each layer was computed, and when its KV travelled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rng = random.Random(5)
    prompt = [rng.randrange(100, 40000) for _ in range(600)]
    figure, axes = plt.subplots(len(pairs), 1, figsize=(10, 2.6 * len(pairs)), sharex=True)
    async with aiohttp.ClientSession() as http:
        for axis, (name, pair) in zip(np.atleast_1d(axes), pairs.items(), strict=True):
            await take_turn(pairs, pair)
            metric = "vllm:nixl_xfer_time_seconds_sum"
            before = sum(server.metric(metric) for server in (pair.prefill, pair.decode))
            size = trace.stat().st_size if trace.exists() else 0
            began = time.monotonic()
            answer = await pair.ask(http, prompt, ANSWER)
            await asyncio.sleep(2.0)
            if name == "railwire":
                line = trace.read_bytes()[size:].splitlines()[-1]
                record = json.loads(line)
                last = record["opened"]
                for layer in record["layers"]:
                    row = layer["layer"]
                    axis.barh(
                        row, 1e3 * (layer["ready"] - last), left=1e3 * (last - began), color="tab:blue", height=0.9
                    )
                    width = max(1e3 * (layer["landed"] - layer["posted"]), 1.0)
                    axis.barh(row, width, left=1e3 * (layer["posted"] - began), color="tab:orange", height=0.9)
                    last = layer["ready"]
                text = f"{100 * record['hidden']:.0f} % of the KV had landed when the last layer ended"
            else:
                # NIXL moves all layers at once when the prefill is over; how long that took is its own metric.
                took = sum(server.metric(metric) for server in (pair.prefill, pair.decode)) - before
                axis.barh(15, 1e3 * answer.prefilled, left=0, color="tab:blue", height=30)
                axis.barh(15, max(1e3 * took, 1.0), left=1e3 * answer.prefilled, color="tab:orange", height=30)
                text = f"all of it after the prefill, {1e3 * took:.1f} ms by its own metric"
            axis.axvline(1e3 * answer.first, color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{name}: {text}", fontsize=9)
            axis.set_ylabel("layer")
    np.atleast_1d(axes)[-1].set_xlabel(
        "ms since the request (dashed: first token; blue: computing; orange: KV travelling)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def own_figures(prefill: Server, trace: Path) -> None:
    """What only our own connector says of itself."""
    records = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
    shares = [record["hidden"] for record in records if record["tokens"] == 599 and not record["error"]]
    if shares:
        share = 100 * float(np.median(shares))
        print(f"railwire: {share:.1f} % of the KV of 600 tokens had landed before the last layer ended", end=" ")
        print(f"(median of {len(shares)}, least {100 * min(shares):.1f} %)")
    for what, metric in (("layer and step in save_kv_layer", "layer"), ("step in the other hooks", "step")):
        total, count = (prefill.metric(f"vllm:railwire_{metric}_seconds_{kind}") for kind in ("sum", "count"))
        print(f"railwire: {1e6 * total / max(count, 1):.0f} us per {what} (mean of {count:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cells", help="some cells only, in this order, CONCURRENTxTOKENS[:ROUNDS]: 1x600,4x600:20")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="N times as many rounds in each cell")
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS", help="with one turn (600)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--logs", type=Path, help="an existing folder for the logs of all processes")
    Placement.add_options(parser)
    arguments = parser.parse_args()
    end_on_sigterm()
    if not (MODEL / "tokenizer_config.json").is_file():
        export.export("smollm2", MODEL)
    names = arguments.contenders.split(",")
    cells = QUICK if arguments.quick else CELLS
    if arguments.cells:
        wanted = {}
        for at_once, length, rounds in re.findall(r"(\d+)x(\d+)(?::(\d+))?", arguments.cells):
            cell = int(at_once), int(length)
            if cell not in CELLS:
                parser.error(f"no such cell: {cell}; there are {list(CELLS)}")
            wanted[cell] = (int(rounds or CELLS[cell][0]), CELLS[cell][1])
        cells = wanted
    cells = {cell: (arguments.repeat * rounds, requests) for cell, (rounds, requests) in cells.items()}
    placement = Placement.of(arguments)
    rows: list[dict[str, Any]] = []
    if arguments.json:
        arguments.json.unlink(missing_ok=True)

    def report(row: dict[str, Any], ttft_ms: list[float] | None = None) -> None:
        """A row, and in the file the times behind it, request by request in the order of the rounds."""
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.json:  # row by row: a run can be cut short
            with arguments.json.open("a") as file:
                file.write(json.dumps({**row, "ttft_ms": ttft_ms}) + "\n")

    with tempfile.TemporaryDirectory(prefix="railwire-bench-") as folder:
        trace = Path(folder) / "trace.jsonl"
        flags = ["--dtype", "bfloat16", "--max-model-len", "4096"]
        logs = arguments.logs or Path(folder)
        pairs = {name: Pair(name, MODEL, logs, flags, placement, trace) for name in names}
        servers = [server for pair in pairs.values() for server in (pair.prefill, pair.decode)]
        try:
            for some in [servers] if placement.roomy else [servers[at : at + 2] for at in range(0, len(servers), 2)]:
                for server in some:
                    server.start()
                for server in some:
                    server.ready()
                    print(f"{server.name} is up", flush=True)
            asyncio.run(measure(pairs, cells, arguments.patience, report))
            for pair in pairs.values():
                pair.rest(False)
            table(rows, names)
            if "railwire" in pairs:
                own_figures(pairs["railwire"].prefill, trace)
            if arguments.plot:
                asyncio.run(picture(pairs, trace, arguments.plot))
        except BaseException:
            for server in servers:
                if server.log.exists():
                    print(f"--- {server.log.name}\n{server.log.read_text(errors='replace')[-3000:]}", flush=True)
            raise
        finally:
            for server in servers:
                server.kill()


if __name__ == "__main__":
    main()
