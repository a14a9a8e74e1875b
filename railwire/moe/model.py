"""How long dispatch and combine take, by formula: the bytes that must leave a rank over its NIC, and a fixed part
that was measured. Beside it what pplx-garden and DeepEP publish.

The bytes. A dispatched row has ``hidden`` bytes of fp8, a scale of 4 bytes for 128 channels and 16 bytes for a
header; a returned one ``2 * hidden``. Each token goes to ``top_k`` experts; what stays on the node (``node`` ranks)
does not use the NIC. *flat*: one copy per (token, expert), as pplx-garden, DeepEP's low-latency kernels and
:class:`ExpertGroup` send it. *per node*: one copy per (token, node), as :mod:`railwire.moe.nodes` does. Uniform
routing; the busiest rank gets ``skew`` times the mean.

The fixed part. See ``FIXED``: each line says where it was measured. What has not been measured is not in it, so
predictions are lower than what a real run will show by that much: the wire and switch latency of the NIC (the published
figures contain it), and kernels that do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from pathlib import Path


@dataclass(frozen=True)
class Nic:
    """What carries one rank's bytes.

    Attributes:
        gigabytes: a second, of all the NIC's ports of one rank together.
        source: of that figure.
    """

    name: str
    gigabytes: float
    source: str


NICS = {
    "cx7": Nic("ConnectX-7, 400 Gb/s", 50.0, "line rate"),
    "efa": Nic("EFA, 2 x 200 Gb/s", 50.0, "line rate"),
    "nvlink": Nic("NVLink 4, one way", 396.0, "one large copy between two H200, measured"),
}


@dataclass(frozen=True)
class Part:
    """A piece of the fixed part, in microseconds."""

    name: str
    dispatch: float
    combine: float
    source: str


def fixed(proxy_us: float, pack_us: float, unpack_us: float, gather_us: float, reduce_us: float) -> tuple[Part, ...]:
    """The fixed part from measured pieces (``railwire bench moe --proxy``, ``scripts/moe-gpu.py``)."""
    return (
        Part("GPU raises a word, CPU sees it", 1.0, 1.0, "half of a round trip of 1.9 us, H200, measured"),
        Part("flag to last write posted", proxy_us, proxy_us, "null NIC, measured"),
        Part("CPU raises a word, GPU sees it", 1.0, 1.0, "half of a round trip of 1.9 us, H200, measured"),
        Part("pack / gather", pack_us, gather_us, "scripts/moe-gpu.py"),
        Part("unpack / reduce", unpack_us, reduce_us, "scripts/moe-gpu.py"),
    )


# (dispatch, combine) in us; H = 7168, top-8, E = 256 (DeepEP's own: E not stated), fp8 dispatch, bf16 combine, p50.
PUBLISHED: dict[str, dict[int, dict[int, tuple[float, float]]]] = {
    "pplx-garden, CX7": {
        128: {8: (50.5, 65.3), 16: (110.2, 185.5), 32: (153.9, 266.3), 64: (187.5, 309.1)},
        4096: {32: (4011.8, 7526.8), 64: (4665.2, 8771.1)},
    },
    "pplx-garden, EFA": {
        128: {8: (49.7, 64.2), 16: (214.8, 241.5), 32: (229.1, 335.0), 64: (266.7, 391.2)},
        4096: {8: (1052.4, 1396.7), 16: (3196.7, 5379.1), 32: (4619.0, 8271.5), 64: (5334.3, 9779.3)},
    },
    "DeepEP, CX7 (by pplx)": {
        128: {8: (42.6, 72.0), 16: (123.9, 203.0), 32: (159.1, 285.0), 64: (177.9, 325.0)},
        4096: {8: (1810.3, 962.9), 16: (2481.9, 1863.9), 32: (3680.2, 3565.4), 64: (5071.6, 5922.7)},
    },
}


def bytes_out(
    *, tokens: int, ranks: int, hidden: int = 7168, top_k: int = 8, experts: int = 256, node: int = 8, per_node: bool,
) -> tuple[float, float]:  # fmt: skip
    """(dispatch, combine) bytes that leave a rank over its NIC, uniform routing."""
    dispatch_row = hidden + -(-hidden // 128) * 4 + 16
    nodes = max(1, ranks // node)
    if per_node:
        elsewhere = experts - experts // nodes
        copies = (nodes - 1) * (1 - comb(elsewhere, top_k) / comb(experts, top_k)) if nodes > 1 else 0.0
    else:
        copies = top_k * (1 - min(node, ranks) / ranks)
    return tokens * copies * dispatch_row, tokens * copies * 2 * hidden


def skew_of(tokens: int, ranks: int, top_k: int = 8) -> float:
    """The busiest rank over the mean, for uniform routing: the mean plus two and a half standard deviations of what a
    rank gets (the expected maximum of some tens of normal variables)."""
    mean = tokens * top_k
    return 1 + 2.5 / sqrt(mean) if ranks > 1 else 1.0


@dataclass(frozen=True)
class Prediction:
    """Microseconds: (dispatch, combine) each."""

    ranks: int
    bound: tuple[float, float]
    flat: tuple[float, float]
    per_node: tuple[float, float]
    published: dict[str, tuple[float, float]]


def predict(
    tokens: int, ranks: Sequence[int], nic: Nic, parts: Sequence[Part], node: int = 8, local_rate: float = 396.0
) -> list[Prediction]:
    """Lower bound (bytes per node alone), ours flat and per node, and what is published, for each number of ranks."""
    result = []
    extra = (sum(part.dispatch for part in parts), sum(part.combine for part in parts))
    for number in ranks:
        skew = skew_of(tokens, number)
        times = []
        for per_node in (False, True):
            off = bytes_out(tokens=tokens, ranks=number, node=node, per_node=per_node)
            # What stays on the node goes over NVLink at the same time; the slower of the two counts.
            stays = bytes_out(tokens=tokens, ranks=min(node, number), node=1, per_node=False)
            share = min(node, number) / number
            times.append(
                tuple(
                    max(o * skew / nic.gigabytes, s * share * skew / local_rate) / 1e3
                    for o, s in zip(off, stays, strict=True)
                )
            )
        flat, dedup = times
        known = {name: table.get(tokens, {}) for name, table in PUBLISHED.items()}
        published = {name: table[number] for name, table in known.items() if number in table}
        result.append(
            Prediction(
                number,
                (dedup[0], dedup[1]),
                (flat[0] + extra[0], flat[1] + extra[1]),
                (dedup[0] + extra[0], dedup[1] + extra[1]),
                published,
            )
        )
    return result


def plot(predictions: Sequence[Prediction], tokens: int, nic: Nic, path: Path) -> None:
    """Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), sharex=True)
    ranks = [p.ranks for p in predictions]
    for which, (axis, name) in enumerate(zip(axes, ("dispatch", "combine"), strict=True)):
        axis.plot(ranks, [p.bound[which] for p in predictions], "k--", label="lower bound (per node)")
        axis.plot(ranks, [p.flat[which] for p in predictions], "b-o", label="ours, flat (predicted)")
        axis.plot(ranks, [p.per_node[which] for p in predictions], "g-o", label="ours, per node (predicted)")
        for label in PUBLISHED:
            points = [(p.ranks, p.published[label][which]) for p in predictions if label in p.published]
            if points:
                axis.plot(*zip(*points, strict=True), "x", label=f"{label} (published)")
        axis.set(xlabel="ranks", ylabel="us", title=f"{name}, T = {tokens}, {nic.name}", xscale="log")
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
