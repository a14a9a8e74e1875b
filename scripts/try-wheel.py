"""Tries an installed Railwire: a write between two processes over tcp, and one over shm, every byte compared."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection

import numpy as np

import railwire

NBYTES = 16_000_000
SECONDS = 30


def receive(nics: list[str], pipe: Connection) -> None:
    with railwire.TransferEngine(nics=nics) as engine:
        memory = np.zeros(NBYTES, np.uint8)
        region = engine.register(memory)
        imm = engine.new_imm()
        arrived = engine.counter(imm).expect(1, timeout=SECONDS)
        pipe.send((bytes(engine.address), bytes(region.descriptor), imm))
        arrived.wait(SECONDS)
        pipe.send(int((memory != pattern()).sum()))
        pipe.recv()  # the writer has closed


def pattern() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, NBYTES, np.uint8)


def main() -> int:
    context = multiprocessing.get_context("spawn")
    for nics in (["tcp://127.0.0.1"], ["shm"]):
        ours, theirs = context.Pipe()
        process = context.Process(target=receive, args=(nics, theirs))
        process.start()
        address, descriptor, imm = ours.recv()
        with railwire.TransferEngine(nics=nics) as engine:
            peer = engine.connect(railwire.EngineAddress.from_bytes(address))
            source = engine.register(pattern())
            engine.write(source, railwire.RemoteRegion.from_bytes(descriptor), imm=imm).wait(SECONDS)
            wrong = ours.recv()
            print(f"{nics[0]}: {NBYTES:,} B written, {wrong} wrong; {peer.path}")
        ours.send(None)
        process.join(SECONDS)
        if wrong or process.exitcode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
