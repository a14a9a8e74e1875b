"""The first day on new hardware: one program on two hosts, in a fixed order, and a table that says what was verified.

``b`` waits, ``a`` drives (``scripts/first-day.sh``, docs/first-day.md). Each row of the table is a row of the README's
support table; each step has passed, or failed with the reason, or was not run, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from railwire import __version__
from railwire.bench.contender import Setting
from railwire.bench.contenders import CONTENDERS, WHERE_RIVALS_ARE
from railwire.bench.first_day_agent import doctor, facts, payload
from railwire.bench.first_day_meeting import BACK, IMM, LIVENESS, AgentServer, Far, Meeting, Row
from railwire.bench.measure import Plan, run_plan
from railwire.bench.process import RunnerError
from railwire.bench.remote import DEFAULT_PORT, Host, Listener, kind_of
from railwire.bench.scenarios import Scenario, format_bytes
from railwire.errors import RailwireError
from railwire.memory import Pages, RemoteRegion
from railwire.transfer import Transfer

_SEED = 5
_BASELINES = {"verbs": "perftest", "efa": "fi_rma_bw", "libfabric:efa-direct": "fi_rma_bw"}


class NotRun(Exception):
    """A step that cannot be run here; why."""


def until(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(what)


class Day:
    """All steps for one row. Each returns what is to be said of it; raising is failing."""

    def __init__(self, row: Row, options: argparse.Namespace, host: Host) -> None:
        self.row, self.options, self.host = row, options, host

    def run(self, say: Callable[[str], None]) -> None:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("registration", self.registration),
            ("bare immediates", self.immediates),
            ("sizes, one NIC", lambda: self.sizes(self.row.nics[:1])),
            ("sizes, all NICs", lambda: self.sizes(self.row.nics, several=True)),
            ("pages after idleness", self.pages),
            ("a peer killed beside another", self.killed),
            ("revoke under load", self.revoked),
            ("an interface taken down", self.down),
            ("benchmark", self.benchmark),
            ("vendor's baseline", self.baseline),
        ]
        for name, step in steps:
            try:
                text = "verified: " + step()
            except NotRun as why:
                text = f"not run: {why}"
            except Exception as error:
                text = f"FAILED: {type(error).__name__}: {error}"
            self.row.steps[name] = text
            say(f"{self.row.title}: {name}: {text}")
            if name == "registration" and text.startswith("FAILED"):
                return  # nothing else can be

    def meeting(self, nics: Sequence[str] | None = None, nbytes: int = 0) -> Meeting:
        return Meeting(self.row, self.host, nbytes or min(self.options.largest, 64 << 20), nics)

    def registration(self) -> str:
        with self.meeting(nbytes=self.options.largest) as m:
            warnings = [nic.warning for nic in m.engine.nics if nic.warning]
            names = ", ".join(f"{nic.name} ({nic.provider})" for nic in m.engine.nics)
            return f"{format_bytes(self.options.largest)} on {names}" + "".join(f"; {text}" for text in warnings)

    def immediates(self) -> str:
        with self.meeting() as m:
            for _ in range(100):
                m.write(0)
            m.far.ask("expect", imm=IMM, count=100, timeout=20)
            m.far.tell("answer", imm=BACK)
            m.engine.counter(BACK).expect(1, timeout=20).wait()
            m.far.answer()
        return "100 there, 1 back"

    def sizes(self, nics: Sequence[str], several: bool = False) -> str:
        if several and len(nics) < 2:
            raise NotRun("one NIC of this kind was named")
        largest = self.options.largest
        sizes = [n for n in (64, 4096, 65536, 1 << 20, 64 << 20, 1 << 30, 8 << 30) if n < largest] + [largest]
        with self.meeting(nics, largest) as m:
            for seed, nbytes in enumerate(sizes):
                m.far.ask("clear")
                m.memory.write(payload(nbytes, seed))
                m.far.tell("expect", imm=IMM, count=1, timeout=120)
                m.write(nbytes).wait(120)
                m.far.answer()
                if not m.far.ask("right", nbytes=nbytes, seed=seed)["right"]:
                    raise ValueError(f"{nbytes} bytes did not arrive as they were sent")
        return f"{format_bytes(sizes[0])} to {format_bytes(sizes[-1])}, every byte"

    def pages(self) -> str:
        total = self.options.pages
        with self.meeting() as m:
            slots = m.nbytes // 4096
            m.memory.write(payload(m.nbytes, _SEED))
            m.far.tell("expect", imm=IMM, count=total, timeout=120 + self.options.idle)
            time.sleep(self.options.idle)
            order = np.random.default_rng(_SEED).permutation(slots)
            begin, left, posted = time.monotonic(), total, []
            while left > 0:
                part = order[: min(slots, left)]
                pages = Pages(part, 4096)
                posted.append(m.engine.write_pages(m.memory.region, pages, m.remote, pages, 4096, imm=IMM))
                left -= len(part)
            for transfer in posted:
                transfer.wait(120)
            m.far.answer()
            seconds = time.monotonic() - begin
            if total >= slots and not m.far.ask("right", nbytes=slots * 4096, seed=_SEED)["right"]:
                raise ValueError("the pages are not what was sent")
        return f"{total:,} pages of 4 KiB after {self.options.idle:g} s, {total / seconds / 1e6:.3f} M/s"

    def load(self, m: Meeting, remote: RemoteRegion, window: list[Transfer]) -> int:
        """Keeps eight writes under way. How many have ended well; raises what a write failed with."""
        done = 0
        while len(window) < 8:
            window.append(m.write(min(m.nbytes, 1 << 20), None, remote))
        while window and window[0].done():
            window.pop(0).wait(0)
            done += 1
        return done

    def killed(self) -> str:
        with self.meeting() as m:
            m.memory.write(payload(m.nbytes, _SEED))
            victim, _, victims = m.meet()
            mine: list[Transfer] = []
            theirs: list[Transfer] = []
            done = 0
            for end in (time.monotonic() + self.options.seconds,):
                while time.monotonic() < end:
                    done += self.load(m, m.remote, mine) + self.load(m, victims, theirs)
            victim.tell("die")
            begin, reason = time.monotonic(), ""
            while not reason:
                done += self.load(m, m.remote, mine)
                try:
                    self.load(m, victims, theirs)
                except RailwireError as error:
                    reason = str(error)
                until(begin + 4 * LIVENESS, "writes to a dead peer did not fail")
            seconds = time.monotonic() - begin
            for transfer in mine:
                transfer.wait(20)
            nbytes = min(m.nbytes, 1 << 20)
            m.far.ask("clear")
            m.write(nbytes).wait(20)
            m.far.ask("expect", imm=IMM, count=1, timeout=20)
            if not m.far.ask("right", nbytes=nbytes, seed=_SEED)["right"]:
                raise ValueError("what went to the living peer is not what was sent")
        return f"known after {seconds:.2f} s ({reason[:120]}); {done} writes to the other went on"

    def revoked(self) -> str:
        with self.meeting() as m:
            m.memory.write(payload(m.nbytes, _SEED))
            window: list[Transfer] = []
            end = time.monotonic() + self.options.seconds
            while time.monotonic() < end:
                self.load(m, m.remote, window)
            m.far.tell("revoke")
            begin = time.monotonic()
            with contextlib.suppress(RailwireError):
                while True:
                    self.load(m, m.remote, window)
                    until(begin + 4 * LIVENESS, "writes to a revoked region did not fail")
            revoked = m.far.answer()
            time.sleep(0.5)
            if m.far.ask("crc")["crc"] != revoked["crc"]:
                raise ValueError("bytes landed after revoke() had returned")
            m.far.ask("clear")
            m.remote = RemoteRegion.from_bytes(bytes.fromhex(revoked["descriptor"]))
            m.write(4096).wait(20)
            m.far.ask("expect", imm=IMM, count=1, timeout=20)
        return "nothing landed afterwards; the new descriptor works"

    def down(self) -> str:
        if not self.options.down:
            raise NotRun("no --down and --up commands were given")
        with self.meeting() as m:
            m.memory.write(payload(m.nbytes, _SEED))
            window: list[Transfer] = []
            done, failed = 0, ""
            for command, seconds in ((self.options.down, 2.0), (self.options.up, self.options.seconds)):
                subprocess.run(command, shell=True, check=True, timeout=30, capture_output=True)
                end = time.monotonic() + seconds
                while time.monotonic() < end and not failed:
                    try:
                        done += self.load(m, m.remote, window)
                    except RailwireError as error:
                        failed = str(error)
            if failed and len(self.row.nics) > 1:
                raise ValueError(f"with {len(self.row.nics)} NICs nothing may fail: {failed}")
            for transfer in window:
                with contextlib.suppress(*([RailwireError] if failed else [])):
                    transfer.wait(20)
        with self.meeting() as m:  # it works again
            m.memory.write(payload(4096, _SEED))
            m.write(4096).wait(20)
            m.far.ask("expect", imm=IMM, count=1, timeout=20)
            if not m.far.ask("right", nbytes=4096, seed=_SEED)["right"]:
                raise ValueError("after it came up again, other bytes arrived")
        return f"{done} writes went on; " + (f"then: {failed[:120]}" if failed else "none failed")

    def measure(self, contenders: tuple[str, ...]) -> str:
        nic = "auto" if self.row.nics == ["auto"] else self.row.nics[0]
        scenarios = (Scenario("pages", 64 << 10, pages=256, window=4), Scenario("pingpong", 64))
        plan = Plan(nic, scenarios, contenders, 3, self.options.seconds, (), 60.0, self.host)
        setting = Setting(devices=(self.row.device, self.row.device), two_hosts=True, peer=self.host.host)
        texts = []
        for one in run_plan(plan, setting):
            if one.gbytes_per_s is None:
                if one.contender == "railwire":
                    raise RunnerError(one.note)
                if "not measured" not in one.note:
                    raise NotRun(one.note)
                continue
            if one.verified is False:
                raise ValueError(f"{one.contender}: the data was not what it should be")
            figure = f"{one.us_p50:.1f} us" if one.op == "pingpong" else f"{one.gbytes_per_s:.2f} GB/s"
            texts.append(f"{one.contender} {figure} ({one.scenario.title})")
        return ", ".join(texts)

    def benchmark(self) -> str:
        return self.measure(("railwire",))

    def baseline(self) -> str:
        name = _BASELINES.get(kind_of(self.row.nics[0]))
        if name is None:
            raise NotRun("there is none for this kind of NIC")
        if name not in CONTENDERS:
            raise NotRun(f"{name} {WHERE_RIVALS_ARE}")
        return self.measure(("railwire", name))


def rows_of(nics: Sequence[str], gpu: str) -> list[Row]:
    """One row for the NICs of each kind, and another one for GPU memory over them."""
    kinds: dict[str, list[str]] = {}
    for nic in nics:
        kinds.setdefault(kind_of(nic), []).append(nic)
    rows = [Row(kind, own) for kind, own in kinds.items()]
    if gpu:
        rows += [Row(f"{kind}, {gpu}", own, gpu) for kind, own in kinds.items() if kind != "tcp"]
    return rows


def show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The first day", show_lines=True)
    for column in ("NIC and memory", "state", "steps"):
        table.add_column(column)
    for row in rows:
        style = {"verified": "green", "FAILED": "bold red"}.get(row.state, "yellow")
        table.add_row(row.title, f"[{style}]{row.state}[/]", "\n".join(f"{a}: {b}" for a, b in row.steps.items()))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def wait_at(options: argparse.Namespace) -> None:
    """Side b."""
    listener = Listener(options.bind, options.port, secret=options.secret, nics=options.nic, device="")
    agents = AgentServer(options.bind, options.port + 1, options.secret, options.nic)
    threads = [threading.Thread(target=one.serve, daemon=True) for one in (listener, agents)]
    for thread in threads:
        thread.start()
    print(f"side b waits at {options.bind} ports {options.port} and {options.port + 1}; now side a", flush=True)
    try:
        threads[0].join()
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
        agents.close()


def drive(options: argparse.Namespace) -> int:
    """Side a. The exit status: 0 if nothing failed."""
    host = Host(options.peer, options.port, options.secret)
    far = Far(host)
    report: dict[str, Any] = {
        "railwire": __version__,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "a": {"facts": facts(), "doctor": doctor()},
        "b": {"facts": far.ask("facts"), "doctor": far.ask("doctor")},
    }
    far.close()
    rows = rows_of(options.nic or ["auto", "tcp"], options.gpu)
    for row in rows:
        Day(row, options, host).run(lambda text: print(text, flush=True))
    show(rows)
    report["rows"] = [
        {"title": row.title, "nics": row.nics, "device": row.device, "state": row.state, "steps": row.steps}
        for row in rows
    ]
    path = Path(options.report or f"first-day-{platform.node()}-{time.strftime('%Y%m%d-%H%M')}.json")
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"The whole of it is in {path}; it names hosts, addresses and devices, and nothing else of yours.")
    return 1 if any(row.state == "FAILED" for row in rows) else 0


def size(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="first-day.sh", description=__doc__)
    parser.add_argument("side", choices=("a", "b"))
    parser.add_argument("--peer", help="side a: where side b is")
    parser.add_argument("--bind", default="0.0.0.0", help="side b: the address to wait at")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="this one and the next are used")
    parser.add_argument("--secret", default="", help="a word that both sides give")
    parser.add_argument("--nic", action="append", default=[], help="of this host, repeatable; without: auto and tcp")
    parser.add_argument("--gpu", default="", help="cuda:N: GPU memory as well")
    parser.add_argument("--largest", type=size, default=size("1G"), help="the longest write: 8G on a machine with room")
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds before the pages")
    parser.add_argument("--seconds", type=float, default=1.0, help="of load, and of a measured run")
    parser.add_argument("--down", default="", help="a command that takes an interface down, or waits until you did")
    parser.add_argument("--up", default="true", help="the command that brings it up again")
    parser.add_argument("--report", default="", help="the file for all of it")
    options = parser.parse_args(arguments)
    if options.side == "b":
        wait_at(options)
        return 0
    if not options.peer:
        parser.error("side a needs --peer HOST")
    return drive(options)


if __name__ == "__main__":
    sys.exit(main())
