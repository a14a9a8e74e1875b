"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import importlib.util
import os
import re

import numpy as np
import pytest
from moe_compile import compile_all, compile_graph
from processes import Child, State

# Not imported here: the child must say how it is to run before it is.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compare_in_interpreter(state: State, seed: int, number: int) -> list[str]:
    """In a child: what differs from the torch kernels."""
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    from railwire.moe import MoeConfig
    from railwire.moe.kernels.check import compare

    rng = np.random.default_rng(seed)
    wrong = []
    for turn in range(number):
        dtype, fp8 = [("bfloat16", False), ("bfloat16", True), ("float32", False), ("float16", False)][turn % 4]
        config = MoeConfig(
            ranks=int(rng.integers(1, 5)), experts=int(rng.integers(1, 9)), top_k=int(rng.integers(1, 4)),
            hidden=int(rng.choice([4, 40, 136, 300])), max_tokens=int(rng.choice([1, 8])), dtype=dtype, fp8=fp8,
            layout=["grouped", "batched", "standard"][turn % 3], expert_alignment=int(rng.choice([1, 4])),
        )  # fmt: skip
        different = compare(config, rng, "cpu")
        if different:
            wrong.append(f"{config}: {different}")
    return wrong


def flags_in_interpreter(state: State) -> list[int]:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from railwire.moe.kernels.triton_backend import raise_flag, wait_for

    word = np.zeros(1, np.int64)
    status, clock = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    raise_flag(word.ctypes.data, (5 << 33) + 1)
    found = [int(word[0])]
    for value in ((5 << 33) + 1, (5 << 33) + 2):  # there already; never
        wait_for(word.ctypes.data, value, status, clock, 5)
        found.append(int(status[0]))
    return found


def test_bit_for_bit_in_the_interpreter(child: Child, seed: int) -> None:
    assert child.call(compare_in_interpreter, seed, 12, timeout=90) == []
    assert child.call(flags_in_interpreter) == [(5 << 33) + 1, 0, 1]


def test_compiled_for_sm_90() -> None:
    """16 bytes a thread, no fused multiply-add where the order of rounding counts, and the ordering instructions."""
    ptx = compile_all()
    for name in ("pack", "unpack", "gather"):
        assert re.search(r"ld\.global\.v4\.b32", ptx[name]) and re.search(r"st\.global\.v4\.b32", ptx[name]), name
    assert re.search(r"ld\.global\.v4", ptx["reduce"]) and re.search(r"st\.global\.v4\.b32", ptx["pack_fp8"])
    for name in ("reduce", "pack_fp8"):
        assert "fma.rn" not in ptx[name], name
    assert "div.rn.f32" in ptx["pack_fp8"]
    release = ptx["flag"].index("fence.acq_rel.sys")
    assert ptx["flag"].index("bar.sync") < release < ptx["flag"].index("st.release.sys.global.b64")
    assert re.search(r"ld\.(global\.)?sys\.acquire|ld\.acquire\.sys", ptx["wait"]) and "%globaltimer" in ptx["wait"]
    assert ".nc" not in ptx["unpack"]  # what the NIC has written meanwhile must not come from the read-only cache


def test_the_graph_kernels_compiled_for_sm_90() -> None:
    ptx = compile_graph()
    for name in ("pack_slots", "pack_slots_fp8", "gather_slots"):
        assert re.search(r"ld\.global\.v4\.b32", ptx[name]) and re.search(r"st\.global\.v4\.b32", ptx[name]), name
    assert "fma.rn" not in ptx["pack_slots_fp8"] and "div.rn.f32" in ptx["pack_slots_fp8"]
    release = ptx["post"].index("fence.acq_rel.sys")  # behind the table's rows
    assert ptx["post"].rindex("st.global") < release < ptx["post"].index("st.release.sys.global.b64")
    for name in ("wait_all", "wait_one"):
        assert "ld.acquire.sys.global.b64" in ptx[name] and "%globaltimer" in ptx[name]
    assert ".nc" not in ptx["read_headers"]
