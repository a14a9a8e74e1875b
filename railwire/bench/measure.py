"""Taking the figures: contenders in turns, several times, and the median of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import msgspec

from railwire.bench.contender import Contender, Setting
from railwire.bench.contenders import CONTENDERS
from railwire.bench.process import Ends, MissingContender, Run, RunnerError, start
from railwire.bench.remote import Host, RemoteProcess
from railwire.bench.scenarios import BUFFER_BYTES, GPU_BUFFER_BYTES, Scenario
from railwire.bench.work import Work

_LEAST_CALIBRATION_S = 0.05
_MOST_ROUNDS = 1_000_000


class Result(msgspec.Struct, frozen=True, omit_defaults=False):
    """One scenario by one contender over one NIC. Rates are None where nothing was measured; `note` says why.

    gbytes_per_s: 10^9 bytes a second. mops: million pages, writes or messages a second. us_p50, us_p99: microseconds
    of a round (from its submission to its completion; half a round trip for pingpong). verified: the memory held,
    after every single run, exactly what it should.
    """

    contender: str
    nic: str
    op: str
    page_bytes: int
    pages: int
    pattern: str
    window: int
    rounds: int = 0
    gbytes_per_s: float | None = None
    gbytes_per_s_low: float | None = None
    gbytes_per_s_high: float | None = None
    mops: float | None = None
    us_p50: float | None = None
    us_p99: float | None = None
    verified: bool | None = None
    repeats: int = 0
    seen_by_receiver: bool | None = None
    cpus: tuple[int, ...] = ()
    version: str = ""
    note: str = ""
    device: str = "cpu"
    peer_device: str = "cpu"
    memory: str = "registered"
    """Railwire's: "registered", or "allocated" with engine.allocate."""

    @property
    def scenario(self) -> Scenario:
        return Scenario(self.op, self.page_bytes, self.pages, self.window, self.pattern)


class Plan(msgspec.Struct, frozen=True):
    """`seconds` per measured run, `repeats` of them per contender, in turns. `cpus`: one core for each of the two
    processes; empty: the kernel decides."""

    nic: str
    scenarios: tuple[Scenario, ...]
    contenders: tuple[str, ...] = ("railwire",)
    repeats: int = 5
    seconds: float = 0.4
    cpus: tuple[int, ...] = (0, 1)
    timeout_s: float = 60.0
    peer: Host | None = None  # the target is there

    @property
    def steps(self) -> int:
        """How often `progress` is called."""
        return len(self.scenarios) * len(self.contenders) * (self.repeats + 1)


Progress = Callable[[str], None]


class _Entrant:
    """A contender on one NIC: its pair of processes, started when first needed and again after a failure."""

    def __init__(self, contender: Contender, plan: Plan, setting: Setting) -> None:
        self.contender = contender
        self.plan = plan
        self.setting = setting
        self.absent = ""
        self.buffer_bytes = GPU_BUFFER_BYTES if setting.on_gpu else BUFFER_BYTES
        self._pair: Ends | None = None

    @property
    def pair(self) -> Ends:
        if self._pair is None:
            launch = self.contender.launch(self.plan.nic, self.setting)
            if launch is None:
                raise MissingContender(f"{self.contender.name} has nothing for {self.plan.nic}")
            if launch.solo and self.plan.peer:
                raise MissingContender(f"{self.contender.name} has both ends in one process")
            try:
                self._pair = start(
                    launch, self.plan.nic, self.plan.cpus, self.buffer_bytes, self.plan.timeout_s,
                    self._far if self.plan.peer else None,
                )  # fmt: skip
            except MissingContender as error:
                raise MissingContender(self.contender.missing) from error
        return self._pair

    def _far(self) -> RemoteProcess:
        plan = self.plan
        assert plan.peer is not None
        return RemoteProcess(plan.peer, self.contender.name, plan.nic, self.setting, self.buffer_bytes, plan.timeout_s)

    def discard(self) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.kill()

    def close(self) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.close()


class _Attempt:
    """One contender at one scenario."""

    def __init__(self, entrant: _Entrant, scenario: Scenario) -> None:
        self.entrant = entrant
        self.scenario = scenario
        self.runs: list[Run] = []
        self.rounds = 0
        self.note = entrant.absent
        if not self.note and scenario.op not in entrant.contender.ops:
            self.note = f"{entrant.contender.name} is not measured at {scenario.op}"

    def guarded(self, step: Callable[[], None]) -> None:
        """Runs a step unless one before has failed; a failure ends this attempt and its processes, nothing else."""
        if self.note:
            return
        try:
            step()
        except MissingContender as error:
            self.note = self.entrant.absent = str(error)
        except RunnerError as error:
            self.note = str(error)
            self.entrant.discard()

    def work(self, rounds: int) -> Work:
        return self.scenario.work(rounds, self.entrant.buffer_bytes)

    def calibrate(self) -> None:
        """Finds how many rounds fill the time; this warms the path up, too."""
        if self.scenario.rounds:
            self.rounds = self.scenario.rounds
            self.entrant.pair.run(self.work(min(self.rounds, 4)), verify=False)
            return
        rounds = 1 if self.scenario.pages > 1 else self.scenario.window
        while True:
            seconds = self.entrant.pair.run(self.work(rounds), verify=False).seconds
            if seconds >= _LEAST_CALIBRATION_S:
                break
            rounds *= 8 if seconds < _LEAST_CALIBRATION_S / 8 else 2
        self.rounds = max(
            self.scenario.window, min(_MOST_ROUNDS, math.ceil(rounds * self.entrant.plan.seconds / seconds))
        )

    def measure(self) -> None:
        self.runs.append(self.entrant.pair.run(self.work(self.rounds)))

    def result(self) -> Result:
        scenario, plan = self.scenario, self.entrant.plan
        empty = Result(
            contender=self.entrant.contender.name,
            nic=plan.nic,
            op=scenario.op,
            page_bytes=scenario.page_bytes,
            pages=scenario.pages,
            pattern=scenario.pattern,
            window=scenario.window,
            cpus=plan.cpus,
            note=self.note,
            device=self.entrant.setting.devices[0],
            peer_device=self.entrant.setting.devices[1],
            memory=self.entrant.setting.memory,
        )
        if not self.runs:
            return empty
        work = self.work(self.rounds)
        rates = [work.total_bytes / run.seconds / 1e9 for run in self.runs]
        return msgspec.structs.replace(
            empty,
            rounds=self.rounds,
            gbytes_per_s=statistics.median(rates),
            gbytes_per_s_low=min(rates),
            gbytes_per_s_high=max(rates),
            mops=statistics.median(work.total_pages / run.seconds / 1e6 for run in self.runs),
            us_p50=statistics.median(run.us_p50 for run in self.runs),
            us_p99=statistics.median(run.us_p99 for run in self.runs),
            verified=None if any(run.verified is None for run in self.runs) else all(run.verified for run in self.runs),
            repeats=len(self.runs),
            seen_by_receiver=all(run.seen_by_receiver for run in self.runs),
            version=self.entrant.pair.version,
        )


def run_plan(
    plan: Plan, setting: Setting, progress: Progress = lambda _: None, found: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Measures everything in `plan`. `progress(what)` is called before each step, `found` with each result.

    All contenders' processes exist throughout and are idle while another one is measured. Within a scenario they take
    turns, so that a disturbance or a change of clock meets all of them.
    """
    entrants: list[_Entrant] = []
    results: list[Result] = []
    try:
        for name in plan.contenders:
            entrant = _Entrant(CONTENDERS[name], plan, setting)
            entrants.append(entrant)
            if name == "railwire":
                setting = _learn(entrant, setting)
            elif name.startswith(("raw", "plain")) and not _tool_is_built(entrant):
                entrant.absent = entrant.contender.missing
        for scenario in plan.scenarios:
            attempts = [_Attempt(entrant, scenario) for entrant in entrants]
            for attempt in attempts:
                progress(f"{plan.nic}: {scenario.title}, {attempt.entrant.contender.name}")
                attempt.guarded(attempt.calibrate)
            for _ in range(plan.repeats):
                for attempt in attempts:
                    progress(f"{plan.nic}: {scenario.title}, {attempt.entrant.contender.name}")
                    attempt.guarded(attempt.measure)
            for attempt in attempts:
                results.append(attempt.result())
                found(results[-1])
    except BaseException:
        for entrant in entrants:
            entrant.discard()
        raise
    finally:
        for entrant in entrants:
            entrant.close()
    return results


def _learn(entrant: _Entrant, setting: Setting) -> Setting:
    """The others shall have the same library and the same window as Railwire has."""
    try:
        details = entrant.pair.details
    except RunnerError as error:
        entrant.absent = str(error)
        return setting
    return replace(setting, library=details.get("library", ""), link_depth=details.get("link_depth", 0))


def _tool_is_built(entrant: _Entrant) -> bool:
    launch = entrant.contender.launch(entrant.plan.nic, entrant.setting)
    return launch is None or bool(launch.options["tool"])
