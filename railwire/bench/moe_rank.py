"""One rank of `railwire bench moe`: dispatch and combine of :class:`ExpertGroup`, and the same with torch's
``all_to_all_single``, in turns, on the same ranks and routes. ``python -m railwire.bench.moe_rank '{json}'``."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from railwire.engine import TransferEngine
from railwire.moe import ExpertGroup, GroupExchange, MoeConfig
from railwire.moe.rendezvous import file_store

Tensor = torch.Tensor


class AllToAll:
    """What one writes with torch alone: counts, rows and expert numbers by ``all_to_all_single``, sorted by expert
    there, and back the same way."""

    def __init__(self, config: MoeConfig, rank: int) -> None:
        self.config = config
        self.rank = rank

    def dispatch(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(rows sorted by local expert, rows of each)."""
        c = self.config
        flat = ids.flatten()
        self.order = torch.argsort(flat, stable=True)
        sorted_ids = flat[self.order]
        per_expert = torch.bincount(flat, minlength=c.ranks * c.local_experts)
        send = per_expert.view(c.ranks, -1).sum(1)
        received = torch.empty_like(per_expert)
        dist.all_to_all_single(received, per_expert)
        counts = received.view(c.ranks, -1)
        self.sent, self.got = send.tolist(), counts.sum(1).tolist()
        rows = x[self.order // c.top_k]
        arrived = torch.empty((sum(self.got), c.hidden), dtype=x.dtype)
        dist.all_to_all_single(arrived, rows, self.got, self.sent)
        assert sorted_ids.numel() == rows.shape[0]
        # Rows come grouped by source, each sorted by expert: bring those of one expert together.
        experts = torch.arange(c.local_experts).repeat(c.ranks).repeat_interleave(counts.flatten())
        self.by_expert = torch.argsort(experts, stable=True)
        return arrived[self.by_expert], counts.sum(0)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        c = self.config
        back = torch.empty_like(y)
        back[self.by_expert] = y
        returned = torch.empty((sum(self.sent), c.hidden), dtype=y.dtype)
        dist.all_to_all_single(returned, back, self.sent, self.got)
        pairs = torch.empty_like(returned)
        pairs[self.order] = returned
        wide = pairs.view(-1, c.top_k, c.hidden).to(torch.float32)
        return (wide * weights.unsqueeze(2)).sum(1).to(y.dtype)


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank, ranks = order["rank"], order["ranks"]
    store = file_store(order["store"], ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    config = MoeConfig(
        ranks=ranks, experts=order["experts"], hidden=order["hidden"], max_tokens=order["tokens"], top_k=order["top_k"]
    )
    generator = torch.Generator().manual_seed(order["seed"] * 1000 + rank)
    x = torch.randn((order["tokens"], order["hidden"]), generator=generator).to(torch.bfloat16)
    ids = (
        torch.rand((order["tokens"], order["experts"]), generator=generator)
        .argsort(1)[:, : order["top_k"]]
        .contiguous()
    )
    weights = torch.rand(ids.shape, generator=generator)
    theirs = AllToAll(config, rank)
    seconds: dict[str, list[list[float]]] = {"railwire": [[], []], "all_to_all": [[], []]}
    engine = TransferEngine(nics=order["nics"] or "auto")
    group = ExpertGroup(engine, config, rank, GroupExchange(), timeout=60.0)
    equal = True
    for turn in range(order["warmup"] + order["rounds"]):
        outs = {}
        names = list(seconds) if turn % 2 else list(reversed(seconds))
        for name in names:
            if name == "all_to_all" and not order["against"]:
                continue
            dist.barrier()
            begin = time.perf_counter()
            if name == "railwire":
                rows = group.dispatch(x, ids, weights).x
            else:
                rows, _ = theirs.dispatch(x, ids)
            middle = time.perf_counter()
            dist.barrier()
            again = time.perf_counter()
            outs[name] = (rows.clone(), group.combine(rows) if name == "railwire" else theirs.combine(rows, weights))
            end = time.perf_counter()
            if turn >= order["warmup"]:
                seconds[name][0].append(middle - begin)
                seconds[name][1].append(end - again)
        if order["against"]:
            equal &= torch.equal(outs["railwire"][0], outs["all_to_all"][0])
    dist.barrier()
    print(json.dumps({"rank": rank, "seconds": seconds, "equal": equal, "sent": group.stats["sent_bytes"],
                      "registered": group.registered_bytes}), flush=True)  # fmt: skip
    group.close()
    dist.barrier()
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
