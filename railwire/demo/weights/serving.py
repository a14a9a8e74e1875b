"""An inference process of the demo: `python -m railwire.demo.weights.serving`. Orders on stdin: ``generate``, ``compare
PATH`` (with a model loaded the ordinary way from a full state dict), ``quit``; answers on stdout in JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from railwire.demo.weights.model import Served
from railwire.engine import TransferEngine
from railwire.runner import weights
from railwire.weights import Destination, Receiver, Rendezvous, record, tcp_store


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    host, port, secret, model = (os.environ[f"RAILWIRE_DEMO_{name}"] for name in ("HOST", "PORT", "SECRET", "MODEL"))
    loaded = weights.load(model, torch.float32) if model != "tiny" else weights.tiny(torch.float32)
    served = Served(loaded.config, rank, dist.get_world_size())
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode("The capital of France is") if tokenizer is not None else [1, 2, 3, 4, 5]
    count = int(os.environ["RAILWIRE_DEMO_TOKENS"])
    engine = TransferEngine(
        nics=os.environ["RAILWIRE_DEMO_NICS"].split(","), secret=secret, name=f"inference {rank}", liveness=2.0
    )

    def describe(checkpoint: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Destination:
        return record(f"inference {rank}", served.load_weights, checkpoint, served.live)

    def published(version: int) -> None:
        say(event="published", rank=rank, version=version, time=time.time())

    rendezvous = Rendezvous(tcp_store(host, int(port)), secret=secret)
    receiver = Receiver(engine, rendezvous, f"inference {rank}", describe, on_publish=published)
    say(event="ready", rank=rank)
    for line in sys.stdin:
        order, *arguments = line.split()
        if order == "generate":
            with receiver.serving() as version:
                tokens = served.generate(prompt, count)
            text = tokenizer.decode(tokens) if tokenizer is not None else str(tokens)
            say(event="generated", rank=rank, version=version, tokens=tokens, text=text)
        elif order == "compare":
            reference = Served(loaded.config, rank, dist.get_world_size())
            reference.load_weights(torch.load(arguments[0], weights_only=True, mmap=True).items())
            wrong = [name for name, tensor in reference.live.items() if not torch.equal(tensor, served.live[name])]
            tokens = reference.generate(prompt, count)
            say(event="compared", rank=rank, version=receiver.version, tokens=tokens, different=wrong)
        else:
            break
    receiver.close()
    engine.close(1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
