"""A run as a trace in Chrome's JSON format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Computing is on a thread of its process, layer by layer inside the request. Transfers overlap each other, so they are
asynchronous slices; so are requests and their attempts. Times are microseconds since the first prompt was sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from railwire.demo.record import Attempt, Record, Request, Worker

Event = dict[str, Any]

CLIENT_PID = 1
_COMPUTE = 1


def events(record: Record) -> list[Event]:
    """All events, in the order of their times; metadata first."""
    pids = {worker.instance: _pid(worker) for worker in record.workers if worker.instance}
    found = [_metadata("process_name", CLIENT_PID, 0, "client"), _metadata("process_sort_index", CLIENT_PID, 0, 0)]
    for index, worker in enumerate(record.workers, start=1):
        found += [
            _metadata("process_name", _pid(worker), 0, worker.name),
            _metadata("process_sort_index", _pid(worker), 0, index),
            _metadata("thread_name", _pid(worker), _COMPUTE, "compute"),
        ]
    timed: list[Event] = []
    for worker in record.workers:
        timed += _life(worker)
    for request in record.requests:
        timed += _request(record, request)
        for number, attempt in enumerate(request.attempts, start=1):
            pid = pids.get(attempt.prefiller)
            if pid is not None and attempt.compute_began:
                timed += _compute(request, attempt, pid) + _transfers(request, number, attempt, pid)
    # Outer slices before inner ones that begin at the same moment.
    timed.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    for event in timed:
        event["ts"] = round((event["ts"] - record.began) * 1e6, 1)
        if "dur" in event:
            event["dur"] = round(event["dur"] * 1e6, 1)
    return found + timed


def write(record: Record, path: Path) -> None:
    """Writes the trace file."""
    summary = record.summary()
    other = {"model": record.model, "requests": summary.requests, "equal": summary.equal, "rerouted": summary.rerouted}
    body = {"traceEvents": events(record), "displayTimeUnit": "ms", "otherData": other}
    path.write_bytes(msgspec.json.encode(body))


def _pid(worker: Worker) -> int:
    return worker.pid or CLIENT_PID


def _metadata(name: str, pid: int, tid: int, value: str | int) -> Event:
    key = "sort_index" if name.endswith("sort_index") else "name"
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {key: value}}


def _life(worker: Worker) -> list[Event]:
    marks = (("joined", worker.joined), ("SIGKILL", worker.killed))
    return [
        {
            "ph": "i",
            "s": "g",
            "name": f"{worker.name}: {name}",
            "cat": "life",
            "pid": _pid(worker),
            "tid": _COMPUTE,
            "ts": when,
        }
        for name, when in marks
        if when
    ]


def _span(name: str, category: str, key: str, pid: int, began: float, ended: float, **args: Any) -> list[Event]:
    """An asynchronous slice."""
    common = {"name": name, "cat": category, "id": key, "pid": pid, "tid": 0}
    return [{**common, "ph": "b", "ts": began, "args": args}, {**common, "ph": "e", "ts": max(began, ended)}]


def _request(record: Record, request: Request) -> list[Event]:
    if not request.sent:
        return []
    key, ended = f"request {request.index + 1}", request.ended or record.ended
    found = _span(
        key, "request", key, CLIENT_PID, request.sent, ended,
        prompt_tokens=request.prompt_tokens, tokens=len(request.answer), equal=request.equal, error=request.error,
    )  # fmt: skip
    for number, attempt in enumerate(request.attempts):
        later = request.attempts[number + 1].began if number + 1 < len(request.attempts) else ended
        name = record.name_of(attempt.prefiller) or "no prefill needed"
        # An attempt's clock is the router's; it cannot have begun before its request.
        began = max(attempt.began, request.sent)
        found += _span(f"on {name}", "request", key, CLIENT_PID, began, later, error=attempt.error)
    if request.first_token:
        mark = {"name": "first token", "cat": "request", "id": key, "pid": CLIENT_PID, "tid": 0}
        found.append({**mark, "ph": "n", "ts": request.first_token})
    return found


def _compute(request: Request, attempt: Attempt, pid: int) -> list[Event]:
    common = {"ph": "X", "cat": "compute", "pid": pid, "tid": _COMPUTE}
    whole = {
        **common,
        "name": f"prefill {request.index + 1}",
        "ts": attempt.compute_began,
        "dur": attempt.compute_ended - attempt.compute_began,
        "args": {"tokens": attempt.tokens, "hidden": attempt.hidden, "bytes": attempt.nbytes},
    }
    found, before = [whole], attempt.compute_began
    for layer in attempt.layers:
        if before <= layer.ready <= attempt.compute_ended:
            name = f"KV of layer {layer.index}"
            found.append({**common, "name": name, "ts": before, "dur": layer.ready - before})
            before = layer.ready
    return found


def _transfers(request: Request, number: int, attempt: Attempt, pid: int) -> list[Event]:
    found: list[Event] = []
    for layer in attempt.layers:
        if layer.nbytes and layer.landed:
            key = f"{request.index + 1}.{number}.{layer.index}"
            name = f"push {request.index + 1}, layer {layer.index}"
            found += _span(name, "transfer", key, pid, layer.began, layer.landed, bytes=layer.nbytes)
    return found
