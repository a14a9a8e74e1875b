"""Prefill and decode with different tensor parallelism: each rank's heads go where they belong."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from instances import Cluster, complete, small, tokens_of

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["tp2-tp1", "tp1-tp2"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("tp")
    cluster = Cluster(folder, small(folder / "model"), ["max-model-len=1024", "block-size=32"])
    try:
        cluster.router.start().ready()
        for name, ranks in zip(("prefill0", "decode0"), request.param, strict=True):
            instance = cluster.add(name, 1, "--runner-option", f"tensor-parallel-size={ranks}")
            # Ranks spin for each other: one that computes shares a core with one that does not, and what it compiled on
            # the way would hold the GIL of our threads for longer than the liveness time.
            instance.environment["TORCHDYNAMO_DISABLE"] = "1"
            if ranks == 2:
                instance.environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
            instance.start()
        for instance in cluster.instances[1:]:
            instance.ready()
        cluster.until(lambda: cluster.sees(1, 1))
        yield cluster
    finally:
        cluster.close()


def test_answers_are_those_of_a_single_process(cluster: Cluster) -> None:
    rng = random.Random(3)
    decoder = cluster.instances[2]
    prompts = [[rng.randrange(512) for _ in range(length)] for length in (2, 31, 32, 33, 100, 320, 513)]
    alone = [tokens_of(complete(decoder.url, "model", p, max_tokens=10, ignore_eos=True)) for p in prompts]
    assert len({tuple(answer) for answer in alone}) == len(alone)  # the model looks at its prompt
    decoder.reset_prefix_cache()
    for prompt, answer in zip(prompts, alone, strict=True):
        routed = complete(cluster.router.url, "model", prompt, max_tokens=10, ignore_eos=True)
        assert tokens_of(routed) == answer
    complete(decoder.url, "model", [1, 2, 3], max_tokens=2)
    assert decoder.metric("vllm:railwire_receive_bytes_count") >= len(prompts)
    assert decoder.metric("vllm:railwire_failed_receives_total") == 0
