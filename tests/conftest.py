"""What all tests share: the choice of NIC, seeds that can be given again, other processes, and a check for leaks."""

from __future__ import annotations

import random
import secrets
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import kv_bed
import numpy as np
import pytest
from beds import EMULATED, patient, verbs_nic
from processes import Child, Children

from railwire import TransferEngine
from railwire.testing import SimulatedFabric

if TYPE_CHECKING:
    import weights_bed

NICS = {"tcp": "tcp://127.0.0.1", "shm": "shm"}
if EMULATED:
    NICS["verbs"] = verbs_nic(0)
LIVENESS = patient(1.0)
_KEPT_BY_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("railwire")
    group.addoption(
        "--nic",
        choices=sorted(NICS),
        help="run the two-process tests on this NIC only, and the guarantees on it if it is verbs (make test-rxe)",
    )
    group.addoption("--seed", type=int, help="seed of all randomness in the tests; the header shows the one used")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbits(32)
    if getattr(config.option, "hypothesis_seed", 0) is None:
        config.option.hypothesis_seed = str(config.option.seed)


def pytest_report_header(config: pytest.Config) -> str:
    hypothesis_seed = getattr(config.option, "hypothesis_seed", "none")
    return f"railwire: --seed={config.option.seed} --hypothesis-seed={hypothesis_seed}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "nic" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--nic")
        metafunc.parametrize("nic", [chosen] if chosen else ["tcp", "shm"], indirect=True)


@pytest.fixture
def nic(request: pytest.FixtureRequest) -> str:
    """Name of a NIC that works between processes of this host: tcp and shm in turn, or what --nic says."""
    return NICS[request.param]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed; ``random`` and numpy's global generator start from it."""
    value = zlib.crc32(f"{request.config.option.seed}:{request.node.nodeid}".encode())
    random.seed(value)
    np.random.seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def children() -> Iterator[Children]:
    """``children.spawn(name)``; all end with the test."""
    group = Children()
    yield group
    group.close()


@pytest.fixture
def child(children: Children) -> Child:
    """One other process."""
    return children.spawn()


@pytest.fixture
def open_engine() -> Iterator[Callable[..., TransferEngine]]:
    """Opens engines in the test process; all are closed with the test."""
    engines: list[TransferEngine] = []

    def make(*nics: str, **options: object) -> TransferEngine:
        options.setdefault("liveness", LIVENESS)
        options.setdefault("name", f"test{len(engines)}")
        engine = TransferEngine(nics=list(nics), **options)  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def fabric() -> Iterator[SimulatedFabric]:
    """One that delivers in any order."""
    with SimulatedFabric(reorder=True, max_delay_us=100) as fabric:
        yield fabric


@pytest.fixture
def make_pair(fabric: SimulatedFabric) -> Iterator[kv_bed.Make]:
    """Makes pairs of a prefill and a decode instance."""
    with kv_bed.pairs(fabric) as make:
        yield make


@pytest.fixture
def bed() -> Iterator[weights_bed.Bed]:
    """Trainers and receivers of weights, in one process."""
    import weights_bed  # which imports torch

    bed = weights_bed.Bed()
    yield bed
    bed.close()


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fails a test that leaves a child process behind."""
    before = _children_now()
    yield
    left = {pid: command for pid, command in _children_now().items() if pid not in before}
    if left:
        pytest.fail(f"the test left processes behind: {left}")


def _children_now() -> dict[int, str]:
    found = {}
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            for pid in listing.read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if not any(name in command for name in _KEPT_BY_PYTHON):
                    found[int(pid)] = command
        except OSError:
            pass  # a thread or process that has just ended
    return found
