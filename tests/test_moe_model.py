"""A real mixture-of-experts model, expert-parallel over processes: every logit is the single process's, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from railwire.cli import app

pytest.importorskip("transformers")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["olmoe", pytest.param("qwen", marks=pytest.mark.slow)])
def test_the_demo_is_exact_and_survives_a_death(model: str, seed: int, tmp_path: Path) -> None:
    arguments = ["demo", "moe", "--model", model, "--out", str(tmp_path), "--steps", "6", "--seed", str(seed % 1000)]
    result = CliRunner().invoke(app, [*arguments, "--nic", "tcp://127.0.0.1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "All logits equal" in result.output and "2 (killed)" in result.output
    assert (tmp_path / "railwire-demo-moe.png").stat().st_size > 10_000
