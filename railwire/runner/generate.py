"""Greedy generation in one process: what every disaggregated answer is compared with, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from railwire.runner.base import DecodeItem, OnLayer, Runner, greedy
from railwire.runner.blocks import BlockPool


def generate(
    runner: Runner,
    pool: BlockPool,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    stop: Sequence[int] = (),
    chunk: int | None = None,
    on_layer: OnLayer | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Prefills all prompt tokens but the last, decodes that one and then up to ``max_tokens`` greedy tokens.

    A prefix known to ``pool`` is not computed again, and the prompt's full blocks are remembered; all blocks are given
    back at the end, whatever happens.

    Args:
        stop: tokens that end the answer; they are not part of it.
        chunk: prefill at most so many tokens at once; None: all.

    Raises:
        ValueError: an empty prompt, or more tokens than the model's context.
        OutOfBlocks: the sequence does not fit into the free blocks.
    """
    if not prompt or max_tokens < 0:
        raise ValueError("a prompt of at least one token and max_tokens >= 0 are needed")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens cannot be")
    if len(prompt) + max_tokens > runner.context:
        raise ValueError(f"{len(prompt)} + {max_tokens} tokens exceed the context of {runner.context}")
    if max_tokens == 0:
        return []
    prefilled = len(prompt) - 1
    blocks, covered = pool.lookup(prompt, limit=prefilled)
    try:
        # The last token that is generated is never run, so it needs no place.
        blocks += pool.allocate(pool.blocks_for(prefilled + max_tokens) - len(blocks))
        step = chunk or max(1, prefilled)
        for start in range(covered, prefilled, step):
            runner.prefill(prompt, blocks, start, min(prefilled, start + step), on_layer)
        pool.commit(prompt[:prefilled], blocks)
        token, answer = prompt[-1], list[int]()
        while len(answer) < max_tokens:
            position = prefilled + len(answer)
            token = greedy(runner.decode([DecodeItem(token, position, blocks)]))[0]
            if token in stop:
                break
            answer.append(token)
            if on_token is not None:
                on_token(token)
        return answer
    finally:
        pool.free(blocks)
