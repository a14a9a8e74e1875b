"""Text in, text out: tokenizers, and stop strings in a stream."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from railwire.errors import ConfigurationError
from railwire.runner import Detokenizer, Tokenizer
from railwire.serve.config import create_runner


class ByteTokenizer:
    """A :class:`railwire.runner.Tokenizer` for models without one (random weights): a token is a byte of UTF-8."""

    stop_tokens: tuple[int, ...] = ()
    longest = 1

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(_byte(token) for token in tokens).decode(errors="replace")

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        return self.encode("\n".join(f"{role}: {content}" for role, content in messages) + "\nassistant: ")

    def detokenizer(self) -> Detokenizer:
        return _ByteDetokenizer()


class _ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_byte(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte(token: int) -> bytes:
    return bytes([token]) if token < 256 else b"?"


def load_tokenizer(runner: str, model: str, options: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a model. Its runner is made for that, with the smallest cache there is, and let go; of a vLLM
    model, whose runner is a server of its own, the folder is read.

    Raises:
        ConfigurationError: no such model, or a folder without a tokenizer.
    """
    if runner == "vllm":
        from railwire.runner.tokenizer_file import FolderTokenizer

        try:
            return FolderTokenizer(Path(model))
        except (FileNotFoundError, ValueError) as error:
            raise ConfigurationError(str(error)) from error
    made = create_runner(runner, model, {**options, "num_blocks": 1})
    return made.tokenizer or ByteTokenizer()


class StopText:
    """Cuts a stream of text before the first of some strings, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What can be shown now. After a hit, nothing more."""
        if self.hit:
            return ""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.hit = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back: no stop string has come of it."""
        held, self._held = self._held, ""
        return "" if self.hit else held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that begins ``stop``."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
