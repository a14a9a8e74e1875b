"""`railwire demo`: what it makes of a recorded run, what its client makes of bad streams, and one whole run."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer
from aiohttp import web
from rich.console import Console
from typer.testing import CliRunner

from railwire.demo import table, timeline, trace
from railwire.demo.client import Client
from railwire.demo.cluster import Cluster, Failed
from railwire.demo.record import Attempt, Layer, Record, Request, Worker, attempt_from
from railwire.demo.run import read_prompts

# The package has the function of the same name.
command = importlib.import_module("railwire.cli.demo")

LAYER_BYTES = 1_000_000


def pushed(prefiller: str, began: float, *, late: bool = False) -> Attempt:
    """Three layers of 100 ms, each 50 ms on the wire; the last lands after the computing ended."""
    layers = []
    for index in range(3):
        ready = began + 0.1 * (index + 1)
        posted = ready + (0.02 if late else 0.001)
        layers.append(Layer(index, ready, posted, ready + 0.05, LAYER_BYTES))
    return Attempt(
        prefiller,
        began - 0.01,
        compute_began=began,
        compute_ended=began + 0.32,
        tokens=100,
        nbytes=3 * LAYER_BYTES,
        hidden=2 / 3,
        layers=tuple(layers),
    )


@pytest.fixture
def record() -> Record:
    """Two requests: one in one go, one whose first prefiller was killed."""
    workers = [
        Worker("router", "router", 100, "http://r", state="ready", joined=999.0),
        Worker("prefill-1", "prefill", 101, "http://a", "aa", "killed", 999.0, 1001.5),
        Worker("prefill-2", "prefill", 102, "http://b", "bb", "ready", 999.0),
    ]
    first = Request(0, "one", [1, 2], [1, 2], "x", 101, 1000.0, 1000.5, 1000.6, attempts=[pushed("aa", 1000.1)])
    lost = Attempt("aa", 1001.0, error="prefiller aa has died")
    second = Request(1, "two", [3], [3], "y", 101, 1001.0, 1002.0, 1002.1, attempts=[lost, pushed("bb", 1001.6)])
    return Record("smollm2", 16, [first, second], workers, 1000.0, 1002.1)


def text_of(record: Record, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table.view(record, "headline"))
    return console.export_text()


# ---- the record ------------------------------------------------------------------------------------------------------
def test_the_routers_timing_becomes_an_attempt() -> None:
    entry = {
        "prefiller": "aa",
        "began": 10.0,
        "error": "",
        "decode": {"need_prefill": True, "first_token": 32},
        "prefill": {
            "queued": 10.1, "began": 10.2, "ended": 10.9, "pushed": 11.0, "tokens": 100, "bytes": 7, "hidden": 0.5,
            "layers": [{"layer": 4, "ready": 10.3, "posted": 10.4, "landed": 10.5, "bytes": 7}],
        },
    }  # fmt: skip
    attempt = attempt_from(entry)
    assert (attempt.prefiller, attempt.compute_began, attempt.compute_ended) == ("aa", 10.2, 10.9)
    assert attempt.layers == (Layer(4, 10.3, 10.4, 10.5, 7),)
    assert attempt.hidden == 0.5
    # 100 tokens are 7 pages of 16; two of them the decoder had.
    assert Record("m", 16).pages(attempt) == 5


def test_an_attempt_whose_prefiller_died_has_no_times() -> None:
    attempt = attempt_from({"prefiller": "aa", "began": 1.0, "error": "gone", "decode": {}, "prefill": {}})
    assert (attempt.error, attempt.compute_began, attempt.hidden, attempt.gbytes_per_s) == ("gone", 0.0, None, None)


def test_the_rate_counts_overlapping_transfers_once() -> None:
    layers = (Layer(0, 1.0, 1.0, 1.4, 10**9), Layer(1, 1.2, 1.2, 1.6, 10**9), Layer(2, 2.0, 2.0, 2.4, 10**9))
    attempt = Attempt("aa", 0.0, nbytes=3 * 10**9, layers=layers)
    assert attempt.wire_seconds == pytest.approx(1.0)
    assert attempt.gbytes_per_s == pytest.approx(3.0)


def test_waiting_for_a_ticket_is_no_transfer() -> None:
    assert pushed("aa", 0.0).wire_seconds == pytest.approx(0.15)
    assert pushed("aa", 0.0, late=True).wire_seconds == pytest.approx(0.09)


def test_the_summary(record: Record) -> None:
    summary = record.summary()
    assert summary.ok
    assert (summary.requests, summary.equal, summary.failed, summary.rerouted) == (2, 2, 0, 1)
    assert summary.nbytes == 6 * LAYER_BYTES
    assert summary.hidden == pytest.approx(2 / 3)
    assert summary.gbytes_per_s == pytest.approx(6e6 / 0.3 / 1e9)
    assert summary.per_prefiller == {"prefill-1": 1, "prefill-2": 1}


@pytest.mark.parametrize("what", ["differs", "failed", "unfinished", "unknown"])
def test_a_run_with_a_wrong_answer_is_not_ok(record: Record, what: str) -> None:
    request = record.requests[1]
    if what == "differs":
        request.answer = [4]
    elif what == "failed":
        request.error = "no answer"
    elif what == "unfinished":
        request.ended = 0.0
    else:
        request.expected = None
    assert not record.summary().ok


def test_prompts_are_separated_by_dashes() -> None:
    assert read_prompts("---\na\n\nb\n---\n\n---\nc --- d\n") == ["a\n\nb", "c --- d"]


# ---- what it shows and writes ----------------------------------------------------------------------------------------
def test_the_table_names_prefillers_and_verdicts(record: Record) -> None:
    text = text_of(record)
    assert "prefill-1 > prefill-2" in text
    assert "DIFFERS" not in text
    record.requests[0].answer = [9]
    record.requests[1].error = "HTTP 502"
    text = text_of(record)
    assert "DIFFERS" in text
    assert "FAILED: HTTP 502" in text


def test_the_table_fits_100_columns(record: Record) -> None:
    lines = text_of(record, width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("equal" in line for line in lines) == 2


def test_the_trace_is_well_formed(record: Record, tmp_path: Path) -> None:
    trace.write(record, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_bytes())["traceEvents"]
    begun: dict[Any, list[float]] = defaultdict(list)
    slices: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "M":
            continue
        assert event["ts"] >= -1e6 - 1
        key = (event["pid"], event["cat"], event.get("id"), event["name"])
        if event["ph"] == "b":
            begun[key].append(event["ts"])
        elif event["ph"] == "e":
            assert event["ts"] >= begun[key].pop()
        elif event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert not any(begun.values())
    for spans in slices.values():
        stack: list[float] = []
        for began, ended in spans:  # slices of one thread must nest
            while stack and stack[-1] <= began + 0.2:
                stack.pop()
            assert not stack or ended <= stack[-1] + 0.2
            stack.append(ended)
    assert len(slices[101, 1]) == len(slices[102, 1]) == 4
    assert sum(event["ph"] == "b" and event["cat"] == "transfer" for event in events) == 6
    assert [event["ts"] for event in events if event["name"] == "prefill-1: SIGKILL"] == [pytest.approx(1.5e6)]
    tries = [event["name"] for event in events if event["ph"] == "b" and event.get("id") == "request 2"]
    assert tries == ["request 2", "on prefill-1", "on prefill-2"]


def test_the_timeline_shows_an_undisturbed_request(record: Record, tmp_path: Path) -> None:
    assert timeline.shown(record) is record.requests[0]
    timeline.write(record, tmp_path / "full.png")
    empty = Record("smollm2", 16, [], record.workers, 1000.0, 1002.1)
    assert timeline.shown(empty) is None
    timeline.write(empty, tmp_path / "empty.png")
    full, bare = (tmp_path / "full.png").read_bytes(), (tmp_path / "empty.png").read_bytes()
    assert full.startswith(b"\x89PNG\r\n\x1a\n")
    assert bare.startswith(b"\x89PNG\r\n\x1a\n")
    assert full != bare


# ---- the client ------------------------------------------------------------------------------------------------------
def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"


GOOD = chunk(choices=[{"index": 0, "text": "ab", "token_ids": [5, 6]}])
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, GOOD + chunk(usage={"prompt_tokens": 3}) + DONE, ""),
        (200, GOOD, "the stream broke off"),
        (200, GOOD + chunk(error={"message": "prefiller died"}) + DONE, "prefiller died"),
        (200, chunk(choices=[{"index": 0, "text": "a", "token_ids": [5]}]) + DONE, "1 tokens came instead of 2"),
        (200, b"data: {]\n\n" + DONE, "Expecting"),
        (503, b"not now", "HTTP 503: not now"),
    ],
)
def test_the_client_reports_what_went_wrong(status: int, body: bytes, error: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async def main() -> Request:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        request = Request(0, "prompt", [5, 6])
        async with Client(url, "m", max_tokens=2, concurrency=1, timeout=10.0, tell=lambda: None) as client:
            await client.send(request)
        await runner.cleanup()
        return request

    request = asyncio.run(main())
    assert error in request.error
    assert bool(request.error) == bool(error)
    assert request.equal is (not error)
    assert request.ended >= request.sent > 0
    if not error:
        assert (request.text, request.prompt_tokens) == ("ab", 3)


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [False, True])
def test_the_exit_status_tells_whether_all_answers_are_equal(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    if wrong:
        record.requests[0].answer = [1, 3]
    monkeypatch.setattr(command, "_play", lambda plan, console: (record, []))
    app = typer.Typer()
    app.command()(command.demo)
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["--out", str(tmp_path / "new")])
    assert result.exit_code == int(wrong), result.output
    assert ("Request 1: [1, 3] instead of [1, 2]" in result.output) == wrong
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"railwire-demo.png", "railwire-demo.trace.json"}


@pytest.mark.timeout(60)
def test_a_worker_that_does_not_start_is_reported_with_its_last_words() -> None:
    async def main() -> None:
        async with Cluster(runner="nonsense", model="tiny", options={}) as cluster:
            await cluster.start("router", "router")

    with pytest.raises(Failed, match=r"(?s)router has ended.*nonsense"):
        asyncio.run(main())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_whole_run_on_a_tiny_model(tmp_path: Path) -> None:
    prompts = [
        f"{number}. " + "The quick brown fox jumps over the lazy dog. " * (number % 4 * 8) for number in range(12)
    ]
    (tmp_path / "prompts").write_text("\n---\n".join(prompts))
    shape = ["hidden=256", "intermediate=1024", "layers=8", "num_blocks=512"]
    arguments = ["--model=tiny", "--max-tokens=8", f"--prompts={tmp_path / 'prompts'}", f"--out={tmp_path / 'out'}"]
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", "from railwire.cli import app; app()", "demo", *arguments]
        + [f"--runner-option={option}" for option in shape],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "COLUMNS": "160"},
    )
    seconds = time.monotonic() - began
    assert result.returncode == 0, f"{seconds:.0f} s\n{result.stdout}\n{result.stderr}"
    assert "12 of 12" in result.stdout
    assert "has been killed in the middle" in result.stdout
    assert "the one that was killed was idle" not in result.stdout
    assert "prefill-3 has joined" in result.stdout
    events = json.loads((tmp_path / "out" / "railwire-demo.trace.json").read_bytes())["traceEvents"]
    computed = {event["pid"] for event in events if event["ph"] == "X"}
    names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert names["prefill-3"] in computed
    for pid in names.values():
        assert pid == trace.CLIENT_PID or not Path(f"/proc/{pid}").exists()
