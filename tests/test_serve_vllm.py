"""What `railwire serve --runner vllm` does without vLLM: its command line, its tokenizer, its refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="the servers need aiohttp")
pytest.importorskip("tokenizers", reason="the router needs tokenizers")

from railwire.errors import ConfigurationError
from railwire.runner import create
from railwire.serve import vllm
from railwire.serve.config import WorkerConfig
from railwire.serve.text import load_tokenizer

CONFIG = WorkerConfig(
    membership="tcpstore://127.0.0.1:29600",
    runner="vllm",
    model="/models/small",
    nics=("shm",),
    secret="topsecret",
    options={"max_model_len": 2048, "enforce-eager": "true"},
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_command(installed: None, role: str, kv_role: str) -> None:
    words = vllm.command(CONFIG, role, 8100, "/tmp/drain")  # type: ignore[arg-type]
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_role"] == kv_role and transfer["kv_connector_module_path"] == "railwire.integrations.vllm"
    extra = transfer["kv_connector_extra_config"]
    assert extra["url"] == "http://127.0.0.1:8100" and extra["membership"] == CONFIG.membership
    assert extra["nics"] == ["shm"] and extra["drain_file"] == "/tmp/drain"
    assert not any("topsecret" in word for word in words)  # everybody on the host can read a command line
    assert words[words.index("--max-model-len") + 1] == "2048"
    assert words[-1] == "--enforce-eager"  # a flag without value
    assert words[words.index("--served-model-name") + 1] == "small"


def test_flags_that_are_ours_are_refused(installed: None) -> None:
    with pytest.raises(ConfigurationError, match="port"):
        vllm.command(WorkerConfig(membership="x", options={"port": 1}), "prefill", 1, "")


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"docs/vllm\.md"):
        vllm.command(CONFIG, "prefill", 1, "")


def test_the_folders_tokenizer_is_that_of_the_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the reference runner needs torch")
    from railwire.runner import gguf_file, weights

    try:
        path = weights.find("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config, text, _ = gguf_file.read(path, torch.bfloat16)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": list(config.stop_tokens)}))
    folder = load_tokenizer("vllm", str(tmp_path), {})
    ours = create("reference", model="smollm2", num_blocks=1).tokenizer
    assert ours is not None
    assert folder.stop_tokens == ours.stop_tokens
    for prompt in ("The capital of France is", "Grüße, 東京 🚄!\n\n  x", "", "<|im_end|>"):
        tokens = folder.encode(prompt)
        assert tokens == ours.encode(prompt)
        stream = folder.detokenizer()
        assert "".join([stream.push(token) for token in tokens]) + stream.finish() == folder.decode(tokens) == prompt
    with pytest.raises(ValueError, match="conversations"):
        folder.chat([("user", "hello")])


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_folders_without_a_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        load_tokenizer("vllm", str(tmp_path), {})
