"""What serving needs of a model runner, and the registry by which one is chosen by name.

A runner owns the weights and the paged KV cache of one instance. It knows nothing of requests, the network or the
block pool: callers say which blocks to use. It is not thread-safe; one thread drives it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from railwire.kvcache.geometry.layout import InstanceLayout

OnLayer = Callable[[int, int], None]


class DecodeItem(NamedTuple):
    """One sequence's next step: ``token`` stands at ``position`` (0-based); its K/V are written there, and it attends
    to positions 0..position through ``block_table``."""

    token: int
    position: int
    block_table: Sequence[int]


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a multi-byte character is unfinished."""

    def finish(self) -> str:
        """What is left: "" or replacement characters for an unfinished one."""


class Tokenizer(Protocol):
    stop_tokens: tuple[int, ...]
    longest: int
    """Characters that one token stands for, at most: a text of n characters has at least n / longest tokens."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; other threads run meanwhile. Control tokens written out in the text count as such only with
        ``special``."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these tokens; control tokens yield none."""

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation of (role, content), ready for the assistant's answer."""

    def detokenizer(self) -> Detokenizer: ...


class Runner(Protocol):
    """Computes K/V into paged memory, and logits out of it."""

    @property
    def fingerprint(self) -> str:
        """Config and weights; equal on two instances whose KV can be exchanged."""

    @property
    def num_layers(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def context(self) -> int:
        """The most tokens a sequence may have."""

    @property
    def vocab(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model with random weights."""

    def layout(self) -> InstanceLayout:
        """Where every byte of KV lies, rank by rank."""

    def regions(self, rank: int = 0) -> list[Any]:
        """The buffers of one rank to register with an engine, in the order that ``layout()`` counts them."""

    def prefill(
        self, tokens: Sequence[int], block_table: Sequence[int], start: int, end: int, on_layer: OnLayer | None = None
    ) -> None:
        """Computes K/V of ``tokens[start:end]``; those of ``tokens[:start]`` must be in the blocks already.

        ``on_layer(layer, end)`` is called as soon as K/V of that layer and these tokens are in the cache, before
        anything else of the layer is computed. What it raises ends the prefill.

        Raises:
            ValueError: a range, token or block id that cannot be; nothing was computed.
        """

    def decode(self, batch: Sequence[DecodeItem]) -> npt.NDArray[np.float32]:
        """Runs one token of each sequence. Returns logits, float32 [len(batch), vocab].

        Raises:
            ValueError: a position, token or block id that cannot be; nothing was computed.
        """


def greedy(logits: npt.NDArray[np.float32]) -> list[int]:
    """The likeliest token of each row; of equals the one with the lowest id.

    Raises:
        ValueError: a row that is not finite: the KV it was computed from is broken.
    """
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite: the KV cache holds values that no prefill wrote")
    return [int(token) for token in logits.argmax(axis=-1)]


_REGISTRY: dict[str, str | Callable[..., Runner]] = {"reference": "railwire.runner.reference:create"}


def register(name: str, factory: str | Callable[..., Runner]) -> None:
    """Makes a runner known: a callable, or "module:callable", which is imported when it is first wanted."""
    _REGISTRY[name] = factory


def names() -> list[str]:
    return sorted(_REGISTRY)


def create(name: str, **options: Any) -> Runner:
    """A runner by name; ``options`` are its own.

    Raises:
        ValueError: no such runner.
        ModuleNotFoundError: what it needs is not installed; the message says what to install.
    """
    factory = _REGISTRY.get(name)
    if factory is None:
        raise ValueError(f"there is no runner {name!r}; there are: {', '.join(names())}")
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        try:
            factory = cast("Callable[..., Runner]", getattr(importlib.import_module(module), attribute))
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in ("torch", "gguf", "tokenizers"):
                raise ModuleNotFoundError(
                    f"the runner {name!r} needs {error.name}: pip install 'railwire[kvcache]'", name=error.name
                ) from error
            raise
    return factory(**options)
