"""The benchmark's arithmetic and its honesty: page orders, verification, ratios, and what it says when a peer fails."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from railwire import _native
from railwire.bench import buffers, contenders, measure, process, report, scenarios
from railwire.bench.contender import Setting
from railwire.bench.measure import Plan, Result
from railwire.bench.process import Launch, MissingContender, RunnerError
from railwire.bench.work import Work

KIB = 1024
BENCH = Path(__file__).resolve().parent.parent / "bench"


def result(contender: str = "railwire", **fields: object) -> Result:
    base = Result(
        contender,
        "shm",
        "pages",
        KIB,
        64,
        "random",
        2,
        10,
        2.0,
        1.9,
        2.1,
        1.953,
        50.0,
        80.0,
        True,
        5,
        True,
        (0, 1),
        "v",
    )
    return measure.msgspec.structs.replace(base, **fields)


works = st.builds(
    Work,
    op=st.just("pages"),
    page_bytes=st.integers(1, 64),
    pages=st.integers(1, 8),
    rounds=st.integers(1, 20),
    pattern=st.sampled_from(["random", "contiguous"]),
    buffer_bytes=st.integers(512, 1024),
    seed=st.integers(0, 9),
)


@given(works)
def test_page_orders_are_permutations(work: Work) -> None:
    for slots in work.order():
        assert slots.shape == (work.groups, work.pages)
        assert len(np.unique(slots)) == slots.size
        assert slots.min() >= 0
        assert (slots.max() + 1) * work.page_bytes <= work.buffer_bytes


def moved(work: Work) -> buffers.Bytes:
    """What a perfect contender leaves in the destination, page by page."""
    source = buffers.pattern(work.buffer_bytes, work.seed)
    destination = np.zeros(work.buffer_bytes, dtype=np.uint8)
    source_slots, destination_slots = work.order()
    n = work.page_bytes
    for index in range(work.rounds):
        group = index % work.groups
        for a, b in zip(source_slots[group], destination_slots[group], strict=True):
            destination[b * n : b * n + n] = source[a * n : a * n + n]
    return destination


@given(works, st.data())
def test_verification_accepts_the_truth_and_nothing_else(work: Work, data: st.DataObject) -> None:
    destination = moved(work)
    assert buffers.verify(work, destination)
    at = data.draw(st.integers(0, work.buffer_bytes - 1))
    destination[at] ^= data.draw(st.integers(1, 255))
    assert not buffers.verify(work, destination)


@given(works, st.integers(1, 8))
def test_arrivals_per_receiver_are_counted_page_by_page(work: Work, slots_per_receiver: int) -> None:
    slots = work.slots // slots_per_receiver * slots_per_receiver
    assume(slots >= work.pages)
    work = replace(work, buffer_bytes=slots * work.page_bytes)
    destination_slots = work.order()[1]
    counted = np.zeros(work.slots // slots_per_receiver, dtype=np.int64)
    for index in range(work.rounds):
        for slot in destination_slots[index % work.groups]:
            counted[slot // slots_per_receiver] += 1
    assert np.array_equal(work.total(work.arrivals(slots_per_receiver)), counted)


def test_a_ping_pong_is_verified_by_its_echo() -> None:
    work = Work("pingpong", 64, buffer_bytes=4096)
    buffer = np.zeros(4096, dtype=np.uint8)
    assert not buffers.verify(work, buffer)
    buffer[2048 : 2048 + 64] = buffers.pattern(64, work.seed)
    assert buffers.verify(work, buffer)


def test_patterns_of_one_seed_agree_whatever_their_length() -> None:
    assert np.array_equal(buffers.pattern(4096, 3)[:100], buffers.pattern(100, 3))


@pytest.mark.parametrize(
    "fields",
    [{"op": "copy"}, {"pattern": "zigzag"}, {"page_bytes": 0}, {"pages": 0}, {"page_bytes": 32 << 20, "pages": 3}],
)
def test_impossible_work_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not one of|at least 1|do not fit"):
        Work.from_dict({"op": "pages", "page_bytes": 64, **fields})


def test_scenarios_from_options() -> None:
    assert scenarios.single("write").page_bytes == 1 << 20
    assert scenarios.single("pages", page_bytes=KIB).pages == 4096
    assert scenarios.single("pingpong").latency
    assert scenarios.single("write", page_bytes=64, window=1).latency
    with pytest.raises(ValueError, match="--window"):
        scenarios.single("write", pages=4)
    assert {scenario.page_bytes for scenario in scenarios.SWEEP} >= {64, KIB, 8 * KIB, 64 * KIB, 1 << 20, 16 << 20}


def test_advantage_is_of_rates_or_of_times() -> None:
    ours, theirs = result(gbytes_per_s=6.0), result("nixl", gbytes_per_s=2.0)
    assert report.advantage(ours, theirs) == pytest.approx(3.0)
    fast, slow = (
        result(name, op="pingpong", pages=1, window=1, us_p50=us) for name, us in (("railwire", 4), ("nixl", 20))
    )
    assert report.advantage(fast, slow) == pytest.approx(5.0)
    assert report.advantage(ours, result("nixl", gbytes_per_s=None)) is None


def test_advantages_compare_only_the_same_work() -> None:
    rows = [result(), result("raw", gbytes_per_s=2.5), result("raw", page_bytes=2 * KIB)]
    assert [ratio for _, ratio in report.advantages(rows)] == [None, pytest.approx(0.8), None]


def test_json_lines_round_trip_and_carry_the_promised_keys() -> None:
    rows = [result(), result("nixl", gbytes_per_s=None, verified=None, note="not installed: pip install ...")]
    lines = [report.json_line(row) for row in rows]
    assert report.read_json_lines(lines) == rows
    promised = {"nic", "op", "page_bytes", "pages", "gbytes_per_s", "mops", "us_p50", "us_p99", "verified", "contender"}
    for line in lines:
        assert "\n" not in line
        assert promised <= set(json.loads(line))


def shown(rows: list[Result]) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(report.table(rows))
    for line in report.notes(rows):
        console.print(line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table_shows_ratios_and_why_something_is_missing() -> None:
    text = shown(
        [result(), result("raw", gbytes_per_s=2.5), result("nixl", gbytes_per_s=None, note="not installed: pip")]
    )
    assert "0.80 x" in text
    assert "nixl, shm: not installed: pip" in text


def test_table_shouts_when_data_is_wrong() -> None:
    assert "NO" in shown([result(verified=False)])
    assert "NO" not in shown([result()])


def test_markdown_has_one_line_per_work() -> None:
    rows = [
        result(page_bytes=64 * KIB, gbytes_per_s=6.0),
        result("nixl", page_bytes=64 * KIB, gbytes_per_s=2.0, verified=False),
        result("nixl", op="pingpong", pages=1, window=1, us_p50=24.0),
    ]
    lines = report.markdown(rows).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| shm | 64 KiB pages, random | 6.00 GB/s | 2.00 GB/s (wrong data) (3.00 x) |"
    assert lines[3].endswith("|  | 24.0 µs |")
    nothing = result("nixl", gbytes_per_s=None)
    assert "| – |" in report.markdown([nothing])  # noqa: RUF001


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from railwire.bench.plot import plot

    latency = result(op="pingpong", pages=1, window=1)
    plot([result(), result("raw"), latency, result(nic="tcp")], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no figures"):
        plot([result(gbytes_per_s=None)], tmp_path / "q.png")


def start(launch: Launch) -> process.Ends:
    return process.start(launch, "shm", (), 1 << 20, timeout_s=5)


def test_a_runner_that_is_not_installed_says_so(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    with pytest.raises(MissingContender):
        start(Launch("rivals.nixl_runner", env=with_rivals(hidden(tmp_path, "nixl"))))


def with_rivals(first: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{first}{os.pathsep}{BENCH}"}


def hidden(directory: Path, package: str) -> Path:
    """A directory in which importing `package` fails, installed or not."""
    (directory / f"{package}.py").write_text(f"raise ImportError('no {package} here')\n")
    return directory


def test_a_runner_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text("import sys\nprint('last words', file=sys.stderr)\nsys.exit(7)\n")
    with pytest.raises(RunnerError, match=r"ended with 7: last words"):
        start(Launch("dying", isolated=False, env={"PYTHONPATH": str(tmp_path)}))


def test_a_missing_peer_costs_its_own_rows_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Railwire is measured and verified, the absent contender is a note."""
    nixl = contenders.CONTENDERS["nixl"]
    env = with_rivals(hidden(tmp_path, "nixl"))
    absent = replace(nixl, launch=lambda nic, setting: Launch("rivals.nixl_runner", env=env))
    monkeypatch.setitem(contenders.CONTENDERS, "nixl", absent)
    scenario = scenarios.Scenario("pages", KIB, 64, 2, "random", rounds=20)
    steps: list[str] = []
    rows = measure.run_plan(
        Plan("shm", (scenario,), ("railwire", "nixl"), repeats=1, cpus=(), timeout_s=20),
        Setting(),
        steps.append,
    )
    ours, theirs = rows
    assert ours.verified
    assert ours.gbytes_per_s is not None
    assert theirs.gbytes_per_s is None
    assert "pip install" in theirs.note
    assert len(steps) == 4


@pytest.mark.parametrize("kind", ["shm", "tcp", "sim"])
@pytest.mark.parametrize("op", ["write", "pages", "scatter", "read", "send", "pingpong"])
def test_every_op_is_measured_and_verified(kind: str, op: str) -> None:
    scenario = scenarios.single(op, page_bytes=4 * KIB, rounds=8, window=2)
    setting = Setting(receivers=2 if op == "scatter" and kind != "sim" else 1)
    (row,) = measure.run_plan(Plan(kind, (scenario,), repeats=1, cpus=(), timeout_s=30), setting)
    assert row.note == ""
    assert row.verified
    assert row.us_p50 is not None
    assert row.us_p50 > 0


def test_the_bare_loop_is_built_and_verified() -> None:
    rivals = importlib.import_module("rivals")
    if rivals.raw_tool() is None:
        pytest.skip("this build has no bare libfabric loop")
    scenario = scenarios.single("pages", page_bytes=4 * KIB, rounds=8, window=2)
    plan = Plan("shm", (scenario,), ("railwire", "raw"), repeats=1, cpus=(), timeout_s=30)
    rows = measure.run_plan(plan, Setting())
    assert [row.verified for row in rows] == [True, True]


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_the_plain_loops_are_verified_beside_memory_that_peers_map(kind: str) -> None:
    work = (
        scenarios.single("pages", page_bytes=KIB, pages=1100, rounds=3, window=2),
        scenarios.single("write", page_bytes=64, rounds=8, window=1),
        scenarios.single("pingpong", rounds=8),
    )
    plan = Plan(kind, work, ("railwire", "plain"), repeats=2, cpus=(), timeout_s=30)
    rows = measure.run_plan(plan, Setting(memory="allocated"))
    assert [(row.note, row.verified) for row in rows] == [("", True)] * 6
    assert kind == "tcp" or "shm, allocated" in report.markdown(rows)


def test_other_interpreters_can_run_the_runners() -> None:
    """The runners of other engines import nothing of railwire's native part, nor msgspec, typer or rich."""
    modules = [f"railwire.bench.{name}" for name in ("runner", "plain_runner")]
    modules += ["rivals.raw_runner", "rivals.nixl_runner", "rivals.mooncake_runner"]
    code = (
        "import sys, types; package = types.ModuleType('railwire'); package.__path__ = [sys.argv[1]];"
        "sys.modules['railwire'] = package;"
        "sys.modules.update(dict.fromkeys(['railwire._native', 'msgspec', 'typer', 'rich']));"
    )
    code += f"sys.path.append({str(BENCH)!r});" + "; ".join(f"import {name}" for name in modules)
    # As they are without the engines: what they lack is said when they are run.
    subprocess.run([sys.executable, "-c", code, str(process.PACKAGE)], check=True, timeout=60)


def test_other_engines_are_measured_from_a_checkout_only(tmp_path: Path) -> None:
    """A wheel has no rivals, and says where they are; what it has is measured."""
    package = tmp_path / "railwire"
    shutil.copytree(process.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'ScikitBuild' not in type(one).__name__];"
        f"import importlib.util as u; path = {_native.__file__!r};"
        "spec = u.spec_from_file_location('railwire._native', path); native = u.module_from_spec(spec);"
        "spec.loader.exec_module(native); sys.modules['railwire._native'] = native;"
        "from railwire.cli import app; app()"
    )
    bench = [sys.executable, "-c", code, "bench", "p2p", "--nic", "sim", "--op", "write", "--seconds", "0.01"]
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "cwd": tmp_path}
    for rival in ("nixl", "raw"):
        refused = subprocess.run([*bench, "--against", rival], **options, capture_output=True, text=True, timeout=60)
        said = " ".join(refused.stderr.replace("\u2502", " ").split())
        assert refused.returncode == 2 and f"{rival} is measured from a checkout" in said, refused.stderr
