"""From logits to a token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from railwire.kvcache.router.transport import Sampling
from railwire.runner import greedy


def choose(logits: npt.NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The next token of one sequence.

    Args:
        logits: float32 [vocab].
        position: of the token that the logits follow; with the seed it decides the random number, so that the same
            request gives the same answer wherever it is continued.

    Raises:
        ValueError: logits that are not finite: the KV is broken.
    """
    best = greedy(logits[None])[0]
    if sampling.temperature <= 0:
        return best
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    total = np.cumsum(weights[order])
    # As few of the likeliest as make up top_p, at least one.
    kept = int(np.searchsorted(total, sampling.top_p)) + 1
    kept = min(kept, len(order))
    generator = np.random.Generator(np.random.Philox(key=[sampling.seed % 2**64, position]))
    place = int(np.searchsorted(total[:kept], generator.random() * total[kept - 1], side="right"))
    return int(order[min(place, kept - 1)])
