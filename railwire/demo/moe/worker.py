"""One rank of the demo: ``python -m railwire.demo.moe.worker '{json}'``. Reports a line of JSON per step on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch

from railwire.demo.moe import model as demo_model
from railwire.engine import TransferEngine
from railwire.integrations.transformers_moe import MaskedExperts, expert_parallel
from railwire.moe import ExpertGroup, MoeConfig, StoreExchange
from railwire.moe.rendezvous import file_store


def masked_reference(kind: str, seed: int) -> tuple[Any, list[MaskedExperts]]:
    """The unchanged model in this one process, and the switches that take experts out."""
    model = demo_model.build(kind, seed)
    switches = []
    for layer in model.model.layers:
        layer.mlp.experts = MaskedExperts(layer.mlp.experts, demo_model.EXPERTS)
        switches.append(layer.mlp.experts)
    return model, switches


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank, ranks, seed = order["rank"], order["ranks"], order["seed"]
    tokens = demo_model.prompts(rank, seed)
    reference, switches = masked_reference(order["model"], seed)
    model = demo_model.build(order["model"], seed)
    config = MoeConfig(
        ranks=ranks, experts=demo_model.EXPERTS, hidden=demo_model.HIDDEN, top_k=demo_model.TOP_K,
        max_tokens=demo_model.PROMPTS * demo_model.PROMPT_TOKENS, dtype="float32",
    )  # fmt: skip
    store = file_store(order["store"], -1)
    with TransferEngine(nics=order["nics"] or "auto") as engine:
        exchange = StoreExchange(store, rank, ranks)
        group = ExpertGroup(engine, config, rank, exchange, timeout=20.0, shrink=True)
        layers = expert_parallel(model, group)
        parallel, single = demo_model.Decoder(model, tokens), demo_model.Decoder(reference, tokens)
        say({"rank": rank, "layers": layers, "prompts": len(tokens), "pid": os.getpid()})
        for step in range(order["steps"]):
            if (rank, step) == (order["victim"], order["kill_at"]):
                say({"rank": rank, "step": step, "dies": True})
                os.kill(os.getpid(), signal.SIGKILL)
            began = time.monotonic()
            logits = parallel.step()
            took = time.monotonic() - began
            masked = sorted(group.masked)
            gone = frozenset(expert for dead in masked for expert in config.experts_of(dead))
            for switch in switches:
                switch.gone = gone
            want = single.step()
            say(
                {
                    "rank": rank,
                    "step": step,
                    "seconds": took,
                    "equal": bool(torch.equal(logits.view(torch.int32), want.view(torch.int32))),
                    "masked": masked,
                    "why": {str(dead): group.reasons.get(dead, "") for dead in masked},
                    "sent_to": list(group.stats["sent_to"]),
                    "rows": group.stats["received_rows"],
                    "token": logits.argmax(dim=-1).tolist(),
                }
            )
        group.close()


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
