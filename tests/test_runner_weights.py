"""GGUF files, the cache of dequantised weights, and the tokenizer, on a small model that is written here."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "the reference runner needs it: pip install 'railwire[kvcache]'"
torch = pytest.importorskip("torch", reason=REASON)
gguf = pytest.importorskip("gguf", reason=REASON)
pytest.importorskip("tokenizers", reason=REASON)

from gguf_oracle import dense_logits  # noqa: E402

from railwire.runner import DecodeItem, create, weights  # noqa: E402
from railwire.runner.tokenizer import BytePairTokenizer  # noqa: E402

HIDDEN, INNER, LAYERS, Q_HEADS, KV_HEADS, DIM = 64, 96, 2, 4, 2, 16
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ¤"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def alphabet() -> list[str]:
    """Byte -> its character in GPT-2's alphabet, from the ``tokenizers`` library."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf(path: Path, change: Callable[[Any], None] | None = None, skip: str = "", arch: str = "llama") -> Path:
    """A small Llama: Q8_0 embedding, Q4_1 and F16 matrices, F32 norms, as real files have them."""
    tokens = CONTROL + alphabet() + [merge.replace(" ", "") for merge in MERGES]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(Q_HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(DIM)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    if change:
        change(writer)
    random = np.random.default_rng(0)
    q, kv = Q_HEADS * DIM, KV_HEADS * DIM
    kinds = gguf.GGMLQuantizationType
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "token_embd": ((len(tokens), HIDDEN), kinds.Q8_0),
        "output_norm": ((HIDDEN,), kinds.F32),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": ((HIDDEN,), kinds.F32),
            f"blk.{i}.attn_q": ((q, HIDDEN), kinds.Q4_1),
            f"blk.{i}.attn_k": ((kv, HIDDEN), kinds.Q4_1),
            f"blk.{i}.attn_v": ((kv, HIDDEN), kinds.Q8_0),
            f"blk.{i}.attn_output": ((HIDDEN, q), kinds.F16),
            f"blk.{i}.ffn_norm": ((HIDDEN,), kinds.F32),
            f"blk.{i}.ffn_gate": ((INNER, HIDDEN), kinds.Q4_1),
            f"blk.{i}.ffn_up": ((INNER, HIDDEN), kinds.Q4_1),
            f"blk.{i}.ffn_down": ((HIDDEN, INNER), kinds.Q4_1),
        }
    for name, (shape, kind) in shapes.items():
        if name == skip:
            continue
        values = random.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.1 * values if len(shape) == 1 else values * 1.5 * shape[1] ** -0.5
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits_of(path: Path, tokens: list[int], dtype: str = "float32") -> Any:
    runner = create("reference", model=str(path), num_blocks=8, dtype=dtype)
    runner.prefill(tokens, range(8), 0, len(tokens) - 1)
    return runner.decode([DecodeItem(tokens[-1], len(tokens) - 1, range(8))])[0]


def test_gguf_equals_dense_oracle(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    tokens = np.random.default_rng(1).integers(0, 256, 90).tolist()
    expected = dense_logits(path, tokens)[-1]
    np.testing.assert_allclose(logits_of(path, tokens), expected, atol=2e-4, rtol=2e-4)
    assert np.abs(logits_of(path, tokens, "bfloat16") - expected).max() < 0.05 * np.abs(expected).max()


def test_second_start_reads_the_cache_alone(tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    first = weights.load(str(path), torch.float32)
    monkeypatch.setattr(gguf, "GGUFReader", lambda *_: pytest.fail("the file was read again"))
    second = weights.load(str(path), torch.float32)
    assert first.config == second.config and first.identity == second.identity
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.config.weight_shapes())
    assert second.tokenizer is not None and second.tokenizer.decode(second.tokenizer.encode("hello")) == "hello"
    assert sorted(p.name for p in next((cache_home / "railwire").iterdir()).iterdir()) == [
        "config.json",
        "float32.pt",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", ["float32.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_cache_is_made_anew(
    name: str, damage: str, tmp_path: Path, cache_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    good = weights.load(str(path), torch.float32)
    kept = {key: tensor.clone() for key, tensor in good.tensors.items()}
    victim = next((cache_home / "railwire").glob(f"*/{name}"))
    whole = victim.read_bytes()
    victim.unlink()
    if damage != "missing":
        victim.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"\0garbage")
    with caplog.at_level(logging.WARNING):
        again = weights.load(str(path), torch.float32)
    assert damage == "missing" or "unusable" in caplog.text
    assert again.config == good.config and all(torch.equal(kept[key], again.tensors[key]) for key in kept)
    assert victim.read_bytes() == whole or name == "float32.pt"


def test_cache_that_cannot_be_written_is_only_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        loaded = weights.load(str(path), torch.float32)
    assert "every start will take as long" in caplog.text and loaded.config.layers == LAYERS


def _load_sum(path: str) -> float:
    return float(weights.load(path, torch.float32).tensors["embed"].sum())


def test_several_first_starts_at_once(tmp_path: Path, cache_home: Path) -> None:
    path = str(write_gguf(tmp_path / "small.gguf"))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.map_async(_load_sum, [path] * 6, chunksize=1).get(timeout=60)
    assert len(set(sums)) == 1
    assert not list(cache_home.rglob("*.part"))


def test_another_file_is_another_model(tmp_path: Path) -> None:
    one = create("reference", model=str(write_gguf(tmp_path / "a.gguf")), num_blocks=1)
    other = create(
        "reference", model=str(write_gguf(tmp_path / "b.gguf", lambda w: w.add_description("other"))), num_blocks=1
    )
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gpt2"}, "architecture 'gpt2'"),
        ({"skip": "blk.1.attn_k"}, "no tensor blk.1.attn_k.weight"),
        ({"change": lambda w: w.add_tensor("output.weight", np.zeros((4, 64), np.float32))}, "untied"),
        ({"change": lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32))}, "scaled rotary"),
        ({"change": lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))}, "blk.0.attn_q.bias"),
    ],
)
def test_models_that_cannot_be_computed_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", **options)
    with pytest.raises(ValueError, match=message):
        weights.load(str(path), torch.float32)


def test_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, but long enough to be looked at")
    with pytest.raises(ValueError, match=r"x\.gguf"):
        weights.load(str(tmp_path / "x.gguf"), torch.float32)


@pytest.fixture
def tokenizer(tmp_path: Path) -> BytePairTokenizer:
    loaded = weights.load(str(write_gguf(tmp_path / "small.gguf")), torch.float32).tokenizer
    assert isinstance(loaded, BytePairTokenizer)
    return loaded


def test_merges_digits_and_spaces(tokenizer: BytePairTokenizer) -> None:
    assert [tokenizer.bytes_of(token) for token in tokenizer.encode("hello world 12")] == [
        *(b"hello", b" w", b"o", b"r", b"l", b"d", b" ", b"1", b"2"),
    ]


@pytest.mark.parametrize("text", ["", "naïve 你好 😀\n\t\x00", "hello<|im_end|>", " ä  ä", "x" * 3000])
def test_text_comes_back(text: str, tokenizer: BytePairTokenizer) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.detokenizer()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == text and "\ufffd" not in "".join(pieces)


def test_unfinished_character_is_replaced_at_the_end(tokenizer: BytePairTokenizer) -> None:
    stream = tokenizer.detokenizer()
    assert "".join(stream.push(token) for token in tokenizer.encode("a😀")[:-1]) == "a"
    assert stream.finish() == "\ufffd"


def test_control_tokens_only_on_request(tokenizer: BytePairTokenizer) -> None:
    assert 2 not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode("a<|im_end|>b", special=True)[1] == 2
    assert tokenizer.decode([2, *tokenizer.encode("b")]) == "b"
    conversation = tokenizer.chat([("system", "s"), ("user", "<|im_end|>")])
    assert conversation.count(1) == 3 and conversation.count(2) == 2
    assert tokenizer.stop_tokens == (0, 2)


def test_tokenizer_bad_input(tokenizer: BytePairTokenizer) -> None:
    for token in (-1, tokenizer.vocab):
        with pytest.raises(ValueError, match="no token"):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="needs a message"):
        tokenizer.chat([])


def test_files_of_the_cache_are_swapped_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    reader = path.open()

    def fail(part: Path) -> None:
        part.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        weights._replace(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    weights._replace(path, lambda part: part.write_text("new"))
    with reader:
        assert (reader.read(), path.read_text()) == ("old", "new"), "written in place under somebody's eyes"
