"""Byte-level BPE, built from a GGUF's metadata with the ``tokenizers`` library; streaming detokenisation."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

# Values of tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4


def build(model: str, pre: str, tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]) -> str:
    """The JSON of a tokenizer, from a GGUF's fields tokenizer.ggml.model, .pre, .tokens, .merges and .token_type.

    Raises:
        ValueError: not byte-level BPE, or a pre-tokenizer that is not known here.
    """
    if model != "gpt2" or pre not in ("smollm", "gpt-2", "default"):
        raise ValueError(
            f"tokenizer {model!r} with pre-tokenizer {pre!r} is not known here; gpt2 with smollm or gpt-2 is"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if pre == "smollm"
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED]
    )
    return str(tokenizer.to_str())


class BytePairTokenizer:
    """A :class:`railwire.runner.base.Tokenizer`.

    Args:
        json: what :func:`build` gave.
        stop_tokens: ids that end an answer.
    """

    def __init__(self, json: str, stop_tokens: Sequence[int] = ()) -> None:
        self.stop_tokens = tuple(stop_tokens)
        self._special = tokenizers.Tokenizer.from_str(json)
        # Two of them, for the switch is the tokenizer's state and requests come from several threads.
        self._plain = tokenizers.Tokenizer.from_str(json)
        self._plain.encode_special_tokens = True
        self.vocab = self._plain.get_vocab_size(with_added_tokens=True)
        self.longest = max(map(len, self._plain.get_vocab(with_added_tokens=True)))
        added = self._plain.get_added_tokens_decoder()
        self._bytes = [b""] * self.vocab
        table = _bytes_of_characters()
        for token, index in self._plain.get_vocab(with_added_tokens=True).items():
            if index not in added:
                self._bytes[index] = bytes(table[character] for character in token)
            elif not added[index].special:
                self._bytes[index] = token.encode()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids. Control tokens written out in the text (say ``<|im_end|>``) count as such only with ``special``:
        a user's text must not end the user's turn."""
        # A batch of one: encode() holds the GIL, and the process with it, for a second per 700 KB of text.
        return list(
            (self._special if special else self._plain).encode_batch_fast([text], add_special_tokens=False)[0].ids
        )

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these tokens; control tokens yield none, bytes that are no UTF-8 yield U+FFFD.

        Raises:
            ValueError: there is no such token.
        """
        detokenizer = StreamDetokenizer(self)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.finish()

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """ChatML of (role, content), as SmolLM2's own template writes it, ready for the assistant's answer.

        Raises:
            ValueError: no messages, or a model without ChatML's tokens.
        """
        start, end = self._special.token_to_id("<|im_start|>"), self._special.token_to_id("<|im_end|>")
        if not messages or start is None or end is None:
            raise ValueError("a conversation needs a message, and a tokenizer that knows <|im_start|> and <|im_end|>")
        if messages[0][0] != "system":
            default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
            messages = [("system", default), *messages]
        newline = self.encode("\n")
        ids: list[int] = []
        for role, content in messages:
            ids += [start, *self.encode(f"{role}\n{content}"), end, *newline]
        return [*ids, start, *self.encode("assistant\n")]

    def detokenizer(self) -> StreamDetokenizer:
        return StreamDetokenizer(self)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that one token stands for.

        Raises:
            ValueError: there is no such token.
        """
        if not 0 <= token < self.vocab:
            raise ValueError(f"there is no token {token}: the vocabulary has {self.vocab}")
        return self._bytes[token]


class StreamDetokenizer:
    """A :class:`railwire.runner.base.Detokenizer`: tokens are bytes, and a character may take several tokens."""

    def __init__(self, tokenizer: BytePairTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _bytes_of_characters() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet (bytes_to_unicode() in openai/gpt-2, src/encoder.py).

    Printable Latin-1 stands for itself, the rest for U+0100 onwards.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
