"""Block tables: which blocks hold a range of tokens of a sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def check_range(first_token: int, end_token: int, unit_tokens: int) -> None:
    """Raises ValueError unless [first_token, end_token) is a range that begins at a multiple of ``unit_tokens``."""
    if first_token % unit_tokens or not 0 <= first_token <= end_token:
        raise ValueError(
            f"tokens [{first_token}, {end_token}): the first must be a multiple of {unit_tokens}, the unit of "
            "transfer, and not behind the end"
        )


def covering(
    block_table: npt.ArrayLike,
    first_token: int,
    end_token: int,
    *,
    block_tokens: int,
    num_blocks: int,
    first_block: int = 0,
) -> npt.NDArray[np.int64]:
    """The blocks, as a new array, that hold the tokens [first_token, end_token).

    Args:
        block_table: block ids by position; ``block_table[0]`` holds the tokens from ``first_block * block_tokens`` on.

    Raises:
        IndexError: the table does not reach so far, or names a block that does not exist.
        TypeError: block ids that are no integers.
    """
    if first_token == end_token:
        return np.empty(0, dtype=np.int64)
    table = np.asarray(block_table)
    if table.ndim != 1:
        raise TypeError(f"a block table has one dimension, not {table.ndim}")
    begin = first_token // block_tokens - first_block
    end = -(-end_token // block_tokens) - first_block
    if begin < 0 or end > len(table):
        raise IndexError(
            f"tokens [{first_token}, {end_token}) lie in blocks {begin + first_block}..{end + first_block - 1} of the "
            f"sequence, the table has {first_block}..{first_block + len(table) - 1}"
        )
    if table.dtype.kind not in "iu":
        raise TypeError(f"block ids must be integers, not {table.dtype}")
    blocks = table[begin:end].astype(np.int64)
    # One look for both ends: negative ids are huge when unsigned.
    if int(blocks.view(np.uint64).max()) >= num_blocks:
        raise IndexError(f"block ids {int(blocks.min())}..{int(blocks.max())}: there are {num_blocks} blocks")
    return blocks
