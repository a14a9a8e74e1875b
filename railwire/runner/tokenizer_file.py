"""Tokenizers of a Hugging Face model folder: tokenizer.json, and what config.json says of ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream


class FolderTokenizer:
    """A :class:`railwire.runner.base.Tokenizer`, of any kind that ``tokenizers`` reads.

    Raises:
        FileNotFoundError: no tokenizer.json in the folder.
        ValueError: one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: the router needs the tokenizer of the model it serves")
        text = path.read_text(encoding="utf-8")
        try:
            self._special = tokenizers.Tokenizer.from_str(text)
            # Two of them, for the switch is the tokenizer's state and requests come from several threads.
            self._plain = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path}: {error}") from error
        self._plain.encode_special_tokens = True
        self.longest = max(map(len, self._plain.get_vocab(with_added_tokens=True)), default=1)
        self.stop_tokens = _stop_tokens(folder)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        # A batch of one: encode() holds the GIL, and the process with it, for a second per 700 KB of text.
        return list((self._special if special else self._plain).encode_batch_fast([text])[0].ids)

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._special.decode(list(tokens), skip_special_tokens=True))

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Raises ValueError: a folder's chat template is not interpreted here."""
        raise ValueError("conversations are not served for this model: send a prompt to /v1/completions")

    def detokenizer(self) -> FolderDetokenizer:
        return FolderDetokenizer(self._special)


class FolderDetokenizer:
    """A :class:`railwire.runner.base.Detokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._given += piece
        return piece

    def finish(self) -> str:
        whole = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        return whole[len(self._given) :] if whole.startswith(self._given) else ""


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        ends = content.get("eos_token_id")
        if isinstance(ends, int):
            return (ends,)
        if isinstance(ends, list) and all(isinstance(end, int) for end in ends):
            return tuple(ends)
    return ()
