#!/usr/bin/env python3
"""On a machine with two GPUs: pages over NVLink with 4 to 32 multiprocessors, both directions at once, reads, the time
of 64 bytes, a 16 GB state dict beside NCCL's broadcast, words that kernels write, the effect on a decode step; and on
tcp. Every byte is checked. Needs railwire, torch and numpy; prints a short table last. With one GPU (``--peer cuda:0``)
both processes share it. ``--only pages,words`` runs some of the parts.

    python scripts/two-gpus.py [--device cuda:0] [--peer cuda:1] [--only PART,...]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from two_gpus.models import decode, llama_shapes, nccl, nccl_rank, weights
from two_gpus.pair import GIB, ROWS, Far, row, serve
from two_gpus.signals import words
from two_gpus.transfers import pages, small


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peer", default="cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
    parser.add_argument("--only", default="pages,small,tcp,words,weights,nccl,decode")
    parser.add_argument("--gigabytes", type=float, default=16.0)
    parser.add_argument("--serve")
    parser.add_argument("--nic", default="shm")
    parser.add_argument("--bytes", type=int, default=GIB)
    parser.add_argument("--sms", type=int, default=8)
    parser.add_argument("--nccl-rank", type=int)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.nic, args.bytes, args.sms)
        return 0
    if args.nccl_rank is not None:
        nccl_rank(args.nccl_rank, args.device, args.gigabytes)
        return 0
    here, there = args.device, args.peer
    tcp = "tcp://127.0.0.1"
    wanted = args.only.split(",")
    nbytes = sum(2 * int(np.prod(shape)) for shape in llama_shapes(args.gigabytes)) if "weights" in wanted else GIB
    fars: dict[str, Far] = {}

    def far(nic: str) -> Far:
        if nic not in fars:
            fars[nic] = Far(there, nic, nbytes if nic == "shm" else GIB)
        return fars[nic]

    def over_tcp() -> None:
        pages(here, far(tcp), tcp)
        small(here, far(tcp), tcp)

    parts: dict[str, Callable[[], None]] = {
        "pages": lambda: pages(here, far("shm")),
        "small": lambda: small(here, far("shm")),
        "tcp": over_tcp,
        "words": lambda: words(here),
        "weights": lambda: weights(here, far("shm"), args.gigabytes),
        "nccl": lambda: nccl(here, there, args.gigabytes),
        "decode": lambda: decode(here, far("shm")),
    }
    failed = False
    for name in wanted:
        begin = time.monotonic()
        try:
            parts[name]()
        except Exception as error:  # the other parts still tell something
            failed = True
            row(name, f"FAILED: {type(error).__name__}: {error}")
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
    for one in fars.values():
        one.close()
    card = torch.cuda.get_device_name(here)
    print(f"\n{card}, {here} to {there}, torch {torch.__version__}")
    for name, value in ROWS:
        print(f"  {name}: {value}")
    wrong = any("WRONG" in value for _, value in ROWS)
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
