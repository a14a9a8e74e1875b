"""The paged Llama against a dense one written here, and token-exactness however the work is cut. Random weights."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the reference runner needs torch: pip install 'railwire[kvcache]'")

from railwire.runner import BlockPool, DecodeItem, create, generate, greedy  # noqa: E402
from railwire.runner.config import ModelConfig  # noqa: E402
from railwire.runner.llama import DECODE_TILE, PREFILL_TILE  # noqa: E402
from railwire.runner.weights import tiny  # noqa: E402

torch.set_num_threads(1)


def dense_logits(config: ModelConfig, weights: dict[str, Any], tokens: list[int]) -> Any:
    """Logits after every token, float64, without pages, tiles or torch's attention; rotation by complex numbers."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    n, dim, half = len(tokens), config.head_dim, config.head_dim // 2
    angles = torch.arange(n).double()[:, None] * config.rope_base ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Any, name: str) -> Any:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * w[name]

    def rotate(x: Any) -> Any:
        turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = w["embed"][tokens]
    for i in range(config.layers):
        qkv = norm(x, f"{i}.attn_norm") @ w[f"{i}.qkv"].T
        q, k, v = qkv.view(n, -1, dim).split((config.q_heads, config.kv_heads, config.kv_heads), dim=1)
        q, k = rotate(q), rotate(k)
        heads = []
        for head in range(config.q_heads):
            shared = head // (config.q_heads // config.kv_heads)
            scores = (q[:, head] @ k[:, shared].T / math.sqrt(dim)).masked_fill(torch.ones(n, n).triu(1) > 0, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, dim=-1) @ w[f"{i}.o"].T
        gate, up = (norm(x, f"{i}.ffn_norm") @ w[f"{i}.gate_up"].T).chunk(2, dim=-1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{i}.down"].T
    return norm(x, "norm") @ w["embed"].T


def some_tokens(seed: int, count: int, vocab: int = 256) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=count)


def scattered(runner: Any, count: int, seed: int = 0) -> list[int]:
    """Block ids in no order."""
    return random.Random(seed).sample(range(runner.num_blocks), count)


SHAPES = [
    {},
    {"block_tokens": 1, "num_blocks": 256},
    {"block_tokens": 3, "kv_layout": "NHD"},
    {"block_tokens": 128, "num_blocks": 8, "kv_layout": "NHD"},
    {"q_heads": 6, "kv_heads": 6, "head_dim": 8},
    {"q_heads": 9, "kv_heads": 3, "head_dim": 10, "hidden": 40, "vocab": 300, "tp_size": 3, "pp_size": 2, "layers": 5},
    {"q_heads": 8, "kv_heads": 2, "tp_size": 2, "kv_layout": "NHD"},
    {"q_heads": 8, "kv_heads": 2, "tp_size": 8, "pp_size": 3},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_paged_equals_dense(options: dict[str, Any]) -> None:
    runner = create("reference", model="tiny", **{"num_blocks": 96, **options})
    shape = {k: v for k, v in options.items() if k in ("q_heads", "kv_heads", "head_dim", "hidden", "vocab", "layers")}
    loaded = tiny(torch.float32, **shape)
    tokens = some_tokens(1, 150)
    table = scattered(runner, -(-len(tokens) // runner.block_tokens))
    prompt = PREFILL_TILE + 37
    runner.prefill(tokens, table, 0, prompt)
    expected = dense_logits(loaded.config, loaded.tensors, tokens).float().numpy()
    for position in range(prompt, len(tokens)):
        logits = runner.decode([DecodeItem(tokens[position], position, table)])[0]
        np.testing.assert_allclose(logits, expected[position], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_chunks_and_prefix_hits_change_no_bit(dtype: str, kv_dtype: str | None, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 3 * PREFILL_TILE), label="length")
    cuts = sorted(data.draw(st.sets(st.integers(0, length), max_size=5), label="cuts") | {0, length})
    tokens = some_tokens(length, length + 1)
    caches, logits = [], []
    for borders in ([0, length], cuts):
        runner = create("reference", model="tiny", dtype=dtype, kv_dtype=kv_dtype, num_blocks=20)
        table = list(range(runner.num_blocks))
        for start, end in pairwise(borders):
            runner.prefill(tokens, table, start, end)
        caches.append(runner.regions()[0])
        logits.append(runner.decode([DecodeItem(tokens[length], length, table)]))
    assert torch.equal(*caches)
    assert np.array_equal(*logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(2 * DECODE_TILE + 3)), cut=st.integers(0, 2 * DECODE_TILE + 3))
def test_company_in_a_batch_changes_no_bit(dtype: str, order: list[int], cut: int) -> None:
    runner = create("reference", model="tiny", dtype=dtype, num_blocks=320, block_tokens=4)
    items = []
    for i in range(len(order)):
        tokens, table = some_tokens(i, 2 + 3 * i), list(range(16 * i, 16 * i + 16))
        runner.prefill(tokens, table, 0, len(tokens) - 1)
        items.append(DecodeItem(tokens[-1], len(tokens) - 1, table))
    alone = np.concatenate([runner.decode([item]) for item in items])
    together = [runner.decode([items[i] for i in part]) for part in (order[:cut], order[cut:])]
    assert np.array_equal(np.concatenate(together), alone[list(order)])


def test_generation_with_prefix_hits_chunks_and_another_instance() -> None:
    """A disaggregated run without its network: the pages of the first n-1 tokens are copied, and decoded elsewhere."""
    system = some_tokens(5, 100)
    prompts = [system + some_tokens(10 + i, 3 + 29 * i) for i in range(5)]
    single, prefiller, decoder = (create("reference", model="tiny", num_blocks=128, block_tokens=8) for _ in range(3))
    expected = [generate(single, BlockPool(128, 8, prefix_cache=False), prompt, 24) for prompt in prompts]
    pool = BlockPool(128, 8)
    hits = []
    assert [
        generate(prefiller, pool, prompt, 24, chunk=50, on_layer=lambda *_: hits.append(1)) for prompt in prompts
    ] == expected
    assert pool.num_free == 128
    pool.check()

    sequences = []
    free = scattered(decoder, 128)
    for prompt in prompts:
        hit = pool.lookup(prompt, limit=len(prompt) - 1)
        assert hit.tokens >= 96, "the common preamble was not found"
        source = hit.blocks + pool.allocate(pool.blocks_for(len(prompt) - 1) - len(hit.blocks))
        prefiller.prefill(prompt, source, hit.tokens, len(prompt) - 1)
        table = [free.pop() for _ in range(pool.blocks_for(len(prompt) + 24))]
        for ours, theirs in zip(table, source, strict=False):
            decoder.regions()[0][:, :, ours] = prefiller.regions()[0][:, :, theirs]
        sequences.append((prompt[-1], len(prompt) - 1, table))
        pool.free(source)
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(24):
        batch = [
            DecodeItem(answer[-1] if answer else token, position + len(answer), table)
            for answer, (token, position, table) in zip(answers, sequences, strict=True)
        ]
        for answer, token in zip(answers, greedy(decoder.decode(batch)), strict=True):
            answer.append(token)
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == len(prompts)


def test_broken_kv_shows_in_the_answer() -> None:
    """The tests above compare tokens; that would be worth nothing if the answer did not depend on far tokens' KV."""
    runner = create("reference", model="tiny", num_blocks=32)
    tokens, table = some_tokens(3, 200), list(range(13))
    runner.prefill(tokens, table, 0, 199)
    item = DecodeItem(tokens[-1], 199, table)
    before = runner.decode([item])
    for layer in range(3):
        for part in range(2):
            page = runner.regions()[0][layer, part, table[2]]
            saved = page.clone()
            page[...] = page.flip(0)  # the heads of one page exchanged
            assert np.abs(runner.decode([item]) - before).max() > 1e-3, (layer, part)
            page[...] = saved
    assert np.array_equal(runner.decode([item]), before)


@pytest.mark.parametrize("kv_layout", ["HND", "NHD"])
def test_only_the_named_tokens_are_written_and_garbage_elsewhere_is_harmless(kv_layout: str) -> None:
    clean, dirty = (create("reference", model="tiny", num_blocks=16, kv_layout=kv_layout) for _ in range(2))
    tokens, table = some_tokens(4, 90), scattered(clean, 6)
    dirty.regions()[0].fill_(math.nan)
    for runner in (clean, dirty):
        runner.prefill(tokens, table, 0, 41)
        runner.prefill(tokens, table, 41, 85)
    logits = [runner.decode([DecodeItem(tokens[85], 85, table)]) for runner in (clean, dirty)]
    assert np.array_equal(*logits) and np.isfinite(logits[1]).all()
    held = ~dirty.regions()[0].isnan()
    expected = torch.zeros_like(held)
    for position in range(86):
        block, offset = table[position // 16], position % 16
        if kv_layout == "HND":
            expected[:, :, block, :, offset] = True
        else:
            expected[:, :, block, offset] = True
    assert torch.equal(held, expected)
    assert torch.equal(dirty.regions()[0][held], clean.regions()[0][held])


def test_on_layer_comes_when_the_layer_is_complete_and_before_its_attention() -> None:
    runner, reference = (create("reference", model="tiny", num_blocks=16) for _ in range(2))
    tokens, table = some_tokens(6, 100), list(range(7))
    reference.prefill(tokens, table, 0, 100)
    whole = reference.regions()[0]
    seen = []

    def on_layer(layer: int, end: int) -> None:
        seen.append((layer, end))
        now = runner.regions()[0]
        assert torch.equal(now[layer], whole[layer]), "called before the layer was complete"
        assert not now[layer + 1 :].any(), "called after a later layer was begun"

    runner.prefill(tokens, table, 0, 100, on_layer)
    assert seen == [(0, 100), (1, 100), (2, 100)]

    def spoil(layer: int, end: int) -> None:
        if layer == 0:
            spoiled.regions()[0][0] = 0

    spoiled = create("reference", model="tiny", num_blocks=16)
    spoiled.prefill(tokens, table, 0, 100, spoil)
    assert not torch.allclose(spoiled.regions()[0][1], whole[1]), "attention of layer 0 came before its on_layer"


def test_what_on_layer_raises_ends_the_prefill() -> None:
    runner = create("reference", model="tiny", num_blocks=16)

    def on_layer(layer: int, end: int) -> None:
        if layer == 1:
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        runner.prefill(some_tokens(6, 20), [0, 1], 0, 20, on_layer)
    assert not runner.regions()[0][2].any()


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "kv_layout"), [(1, 1, "HND"), (2, 1, "NHD"), (4, 3, "HND"), (8, 2, "NHD")]
)
def test_layout_says_where_every_byte_lies(tp_size: int, pp_size: int, kv_layout: str) -> None:
    """Read by hand through the layout, every rank's memory yields what one rank holds."""
    shape = {"model": "tiny", "num_blocks": 8, "q_heads": 8, "kv_heads": 4, "block_tokens": 4}
    whole = create("reference", **shape)
    runner = create("reference", **shape, tp_size=tp_size, pp_size=pp_size, kv_layout=kv_layout)
    tokens, table = some_tokens(8, 32), scattered(whole, 8)
    for each in (whole, runner):
        each.prefill(tokens, table, 0, 32)
    layout = runner.layout()
    assert len(layout.ranks) == tp_size * pp_size
    found = set()
    for rank, described in enumerate(layout.ranks):
        assert (described.model, described.block_tokens, described.num_blocks) == (runner.fingerprint, 4, 8)
        memory = [region.numpy().reshape(-1).view(np.uint8) for region in runner.regions(rank)]
        assert tuple(len(region) for region in memory) == described.region_bytes
        for held in described.layers:
            for part, (component, storage) in enumerate(zip(described.components, held.storages, strict=True)):
                assert (component.name, component.heads, component.dtype) == ("kv"[part], 4, "float32")
                for head in range(storage.first_head, storage.first_head + storage.heads):
                    for block in range(8):
                        for token in range(4):
                            at = (
                                storage.offset
                                + block * storage.page_stride
                                + token * storage.token_stride
                                + (head - storage.first_head) * storage.head_stride
                            )
                            row = memory[storage.region][at : at + component.head_bytes].view(np.float32)
                            expected = whole.regions()[0][held.layer, part, block, head, token].numpy()
                            np.testing.assert_allclose(row, expected, atol=1e-5)
                    found.add((held.layer, part, head))
    assert len(found) == 3 * 2 * 4


def test_fingerprint_tells_models_apart() -> None:
    one, same, seed, shape = (
        create("reference", model="tiny", **options).fingerprint
        for options in ({}, {"kv_layout": "NHD", "tp_size": 2, "num_blocks": 3}, {"seed": 1}, {"layers": 4})
    )
    assert one == same and len({one, seed, shape}) == 3


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda r: r.prefill([1, 2], [0], 0, 3), "of 2"),
        (lambda r: r.prefill([1, 2], [0], 2, 1), "of 2"),
        (lambda r: r.prefill([1, 2], [0], -1, 1), "of 2"),
        (lambda r: r.prefill([1] * 17, [0], 0, 17), "need 2 blocks"),
        (lambda r: r.prefill([1], [4], 0, 1), "no block 4"),
        (lambda r: r.prefill([1], [-1], 0, 1), "no block -1"),
        (lambda r: r.prefill([256], [0], 0, 1), "vocabulary of 256"),
        (lambda r: r.prefill([-1], [0], 0, 1), "vocabulary of 256"),
        (lambda r: r.prefill([1] * 65, [0, 1, 2, 3, 3], 0, 65), "context of 64"),
        (lambda r: r.decode([DecodeItem(256, 0, [0])]), "vocabulary of 256"),
        (lambda r: r.decode([DecodeItem(1, -1, [0])]), "no position -1"),
        (lambda r: r.decode([DecodeItem(1, 16, [0])]), "need 2 blocks"),
        (lambda r: r.decode([DecodeItem(1, 3, [0]), DecodeItem(2, 3, [0])]), "token 3 of block 0"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(use: Any, message: str) -> None:
    runner = create("reference", model="tiny", num_blocks=4, context=64)
    with pytest.raises(ValueError, match=message):
        use(runner)
    assert not runner.regions()[0].any()


def test_empty_work() -> None:
    runner = create("reference", model="tiny", num_blocks=4)
    runner.prefill([1, 2], [0], 1, 1, lambda *_: pytest.fail("nothing was computed"))
    assert runner.decode([]).shape == (0, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "float32, bfloat16 or auto, not 'int8'"),
        ({"kv_dtype": "fp8"}, "not 'fp8'"),
        ({"kv_layout": "DNH"}, "HND, NHD, not 'DNH'"),
        ({"tp_size": 3}, "cuts neither"),
        ({"pp_size": 4}, "the 3 layers"),
        ({"q_heads": 5}, "no multiple"),
        ({"head_dim": 7}, "even one"),
        ({"num_blocks": 0}, "0 blocks"),
        ({"model": "smollm2", "layers": 2}, "layers: only the model 'tiny'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("reference", **{"model": "tiny", **options})


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no runner 'vlm'; there are: reference"):
        create("vlm")
    with pytest.raises(FileNotFoundError, match="smollm2, tiny or the path"):
        create("reference", model="smollm3")


def test_greedy_refuses_nonsense() -> None:
    assert greedy(np.array([[1, 3, 3], [2, 1, 0]], dtype=np.float32)) == [1, 0]
    with pytest.raises(ValueError, match="not finite"):
        greedy(np.array([[1, np.nan]], dtype=np.float32))


def test_generate_gives_everything_back() -> None:
    runner = create("reference", model="tiny", num_blocks=4)
    pool = BlockPool(4, 16)
    answer = generate(runner, pool, [7], 40)
    assert len(answer) == 40 and generate(runner, pool, [7], 40, stop=[answer[5]]) == answer[: answer.index(answer[5])]
    with pytest.raises(RuntimeError):
        generate(runner, pool, [7], 40, on_token=lambda _: (_ for _ in ()).throw(RuntimeError()))
    for wrong in ({"prompt": []}, {"chunk": 0}, {"max_tokens": 4000}, {"max_tokens": -1}):
        with pytest.raises(ValueError):
            generate(runner, pool, **{"prompt": [7], "max_tokens": 2, **wrong})
    pool.check()
    assert pool.num_free == 4
