"""Parts of the servers that need no processes: stop strings, addresses, announcements."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="the reference runner needs torch")
pytest.importorskip("aiohttp", reason="the servers need aiohttp")
pytest.importorskip("prometheus_client", reason="the servers need prometheus-client")

from typer.testing import CliRunner

from railwire.cli import app
from railwire.errors import ConnectError
from railwire.serve import decode
from railwire.serve.process import own_url
from railwire.serve.text import StopText
from railwire.topology import default_address


def test_stop_text_holds_back_only_what_may_be_a_stop() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(30)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(2)]
        cutter, shown = StopText(stops), ""
        for character in text:
            shown += cutter.push(character)
            assert text.startswith(shown)
        shown += cutter.finish()
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if not ends:
            assert shown == text and not cutter.hit
        else:
            # The stop that is complete first counts.
            first = min(ends)
            begins = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == first]
            assert shown == text[: min(begins)] and cutter.hit


def test_who_listens_everywhere_is_not_advertised_as_0_0_0_0() -> None:
    assert own_url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert own_url("::1", 80) == own_url("[::1]", 80) == "http://[::1]:80"
    for everywhere in ("0.0.0.0", "::", ""):
        assert own_url(everywhere, 80) == own_url(default_address(), 80)


def test_an_unknown_log_level_is_refused_in_a_sentence() -> None:
    for command in ("prefill", "decode", "router"):
        result = CliRunner().invoke(app, ["serve", command, "--log-level", "loud"])
        assert result.exit_code == 2 and "debug, info, warning, error" in " ".join(result.output.split())


def test_a_queued_request_is_announced_again_when_its_connection_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_AT_ONCE_SECONDS", 0.01)
    monkeypatch.setattr(decode, "_LOOK_SECONDS", 0.01)
    made: list[SimpleNamespace] = []
    announced: list[SimpleNamespace] = []

    async def connect(ranks: object, timeout: float) -> list[SimpleNamespace]:
        if len(made) == 1:
            made.append(SimpleNamespace(connected=False))
            raise ConnectError("it is not back yet")
        made.append(SimpleNamespace(connected=True))
        return made[-1:]

    async def main() -> None:
        free = asyncio.Event()
        worker = SimpleNamespace(
            config=SimpleNamespace(liveness=1.0),
            ranks=SimpleNamespace(connect=connect, announce=lambda links, _: announced.extend(links)),
            _take_in_turn=lambda job: free.wait(),
        )
        worker._announce = partial(decode.DecodeWorker._announce, worker)
        body = SimpleNamespace(request_id="r", prefiller=SimpleNamespace(ranks=()))
        job = SimpleNamespace(body=body, deadline=time.monotonic() + 30, links=None)
        queued = asyncio.create_task(decode.DecodeWorker._queue(worker, job))  # type: ignore[arg-type]
        while not announced:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(announced) == 1, "again, and nothing had happened"
        announced[0].connected = False
        while len(announced) == 1:
            await asyncio.sleep(0.01)
        assert announced[1] is made[2] and job.links == [made[2]]
        free.set()
        await queued

    asyncio.run(asyncio.wait_for(main(), 20))
