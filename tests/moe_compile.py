"""Compiles every kernel for sm_90 without a GPU, at DeepSeek-V3's sizes, and returns the PTX."""

from __future__ import annotations

from typing import Any


def ptx(kernel: Any, types: dict[str, str], **constants: Any) -> str:
    """PTX of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # What a launch finds out for itself: torch's memory is 16-byte aligned.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def compile_graph() -> dict[str, str]:
    """PTX of the kernels that only the group for CUDA graphs has."""
    from railwire.moe import MoeConfig
    from railwire.moe.geometry import MAGIC
    from railwire.moe.graph_sizes import GraphSizes
    from railwire.moe.kernels import graph_kernels as k

    sizes = GraphSizes.of(MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=128, top_k=8, fp8=True))
    g = sizes.geometry
    i32, i64 = "i32", "i64"
    slots = {"bins": "*i32", "slots": "*i32", "starts": "*i32", "places": "*i64"}
    headers = {"state": "*i64", "counts": "*i32", "status": "*i32"}
    wait = {"words": i64, "state": "*i64", "behind_by": i32, "status": "*i32", "late": "*i32", "clock": "*i64",
            "limit": i64, "code": i32}  # fmt: skip
    return {
        "begin": ptx(k.begin_kernel, {"state": "*i64"}),
        "wait_all": ptx(k.wait_all_kernel, wait, OWN=3, COUNT=64, BLOCK=64, ASM=True),
        "wait_one": ptx(k.wait_all_kernel, wait, OWN=-1, COUNT=1, BLOCK=2, ASM=True),
        "post": ptx(
            k.post_kernel, {"rows": "*i32", "firsts": "*i32", "state": "*i64", "status": "*i32", "imms": "*i64",
                            "table": i64, "word": i64}, OWN=3, RANKS=64, DEPTH=2, STRIDE=sizes.slot, FIRST_BYTES=0,
            HEADER=g.header, ROW=g.row, BLOCK=64, ASM=True,
        ),
        "bins": ptx(
            k.bins_kernel, {"ids": "*i64", "bins": "*i32", "status": "*i32", "pairs": i32}, EXPERTS=256, BLOCK=256
        ),
        "pack_slots": ptx(
            k.pack_slots_kernel, {"x": "*i32", **slots, "send": "*i32"}, TOP_K=8, PER_RANK=4, WORDS=3584,
            ROW=3584, HEADER=g.header // 4, AT=0, MOST=sizes.slot_rows, WORD=4, RAW=False, BLOCK=1024,
        ),
        "pack_slots_fp8": ptx(
            k.pack_slots_fp8_kernel, {"x": "*bf16", **slots, "send": "*u8", "send_scales": "*fp32"}, TOP_K=8,
            PER_RANK=4, HIDDEN=7168, ROW=g.row, HEADER=g.header, SCALE_AT=g.scale_offset, SCALES=56,
            MOST=sizes.slot_rows, GROUPS=16, RAW=False,
        ),
        "slot_header": ptx(
            k.slot_header_kernel, {**headers, "starts": "*i32", "places": "*i64", "send": "*i32", "sent": "*i32"},
            BINS=4, FIRST=10, WORDS=g.header // 4, MOST=sizes.slot_rows, MOST_OF_EXPERT=sizes.most_of_expert,
            MAGIC=MAGIC, RAW=False, BLOCK=16,
        ),
        "read_headers": ptx(
            k.read_headers_kernel, {**headers, "recv": "*i32", "came": "*i32", "segments": "*i32", "late": "*i32"},
            BINS=4, HERE=4, FIRST=10, STRIDE=sizes.slot // 4, WORDS=g.header // 4, MOST=sizes.slot_rows,
            MOST_OF_EXPERT=sizes.most_of_expert, MAX_ROWS=1024, MAGIC=MAGIC, RAW=False, BLOCK=16,
        ),
        "gather_slots": ptx(
            k.gather_slots_kernel, {"y": "*i32", "rows": "*i32", "segments": "*i32", "places": "*i64",
                                    "straight": "*i32", "send": "*i32"}, SLOT_ROWS=sizes.slot_rows, WORDS=3584,
            ROW=3584, WORD=4, RAW=False, BLOCK=1024,
        ),
    }  # fmt: skip


def compile_all() -> dict[str, str]:
    """PTX of the other kernels."""
    from railwire.moe import Geometry, MoeConfig
    from railwire.moe.geometry import MAGIC
    from railwire.moe.kernels import triton_kernels as k

    config = MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=128, top_k=8, fp8=True)
    fp8, plain = Geometry(config), Geometry(MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=128, top_k=8))
    i32, i64 = "i32", "i64"
    route = {"bins": "*i32", "ranks": "*i32", "histogram": "*i32", "slots": "*i32", "pairs": i32, "number": i32}
    pick = {key: route[key] for key in ("bins", "ranks", "histogram", "pairs", "number")}
    return {
        "rank": ptx(k.rank_kernel, pick, BLOCK=64),
        "scan": ptx(
            k.scan_kernel, {"histogram": "*i32", "counts": "*i32", "starts": "*i32", "blocks": i32, "number": i32},
            BINS=256
        ),
        "slot": ptx(k.slot_kernel, route, BLOCK=64),
        "pack": ptx(
            k.pack_kernel, {"x": "*i32", "bins": "*i32", "slots": "*i32", "send": "*i32"}, TOP_K=8, PER_RANK=4,
            WORDS=3584, ROW=plain.row // 4, HEADER=plain.header // 4, BLOCK=1024,
        ),
        "pack_fp8": ptx(
            k.pack_fp8_kernel, {"x": "*bf16", "bins": "*i32", "slots": "*i32", "send": "*u8", "send_scales": "*fp32"},
            TOP_K=8, PER_RANK=4, HIDDEN=7168, ROW=fp8.row, HEADER=fp8.header, SCALE_AT=fp8.scale_offset, SCALES=56,
            GROUPS=16,
        ),
        "header": ptx(
            k.header_kernel, {"counts": "*i32", "starts": "*i32", "control": "*i32", "send": "*i32"},
            WORDS=fp8.header // 4, ROW=fp8.row // 4, BINS=4, FIRST=10, BLOCK=16, FIXED=8, MAGIC=MAGIC,
        ),
        "plan": ptx(
            k.plan_kernel, {"counts": "*i32", "rows": "*i32", "expert_rows": "*i32", "status": "*i32", "ranks": i32,
                            "slot_rows": i32, "align": i32, "batched_stride": i32}, BINS=4, WIDE=4, BLOCK=64,
        ),
        "unpack": ptx(
            k.unpack_kernel, {"recv": "*i32", "recv_scales": "*fp32", "rows": "*i32", "x": "*i32", "scales": "*fp32",
                              "slot_rows": i32},
            WORDS=1792, ROW=fp8.row // 4, HEADER=fp8.header // 4, SCALE_AT=fp8.scale_offset, SCALES=56, WORD=4, WIDE=64,
            BLOCK=1024,
        ),
        "gather": ptx(
            k.gather_kernel, {"y": "*i32", "rows": "*i32", "send": "*i32", "first": i32}, WORDS=3584, ROW=3584,
            BLOCK=1024
        ),
        "reduce": ptx(
            k.reduce_kernel, {"received": "*bf16", "slots": "*i32", "weights": "*fp32", "out": "*i16"}, TOP_K=8,
            WEIGHTED=True, HIDDEN=7168, ROW=7168, BFLOAT16=True, BLOCK=1024,
        ),
        "flag": ptx(k.flag_kernel, {"word": i64, "value": i64}, ASM=True),
        "wait": ptx(
            k.wait_kernel, {"word": i64, "value": i64, "status": "*i32", "clock": "*i64", "limit": i64}, ASM=True
        ),
    }  # fmt: skip


if __name__ == "__main__":
    import sys

    for name, text in {**compile_all(), **compile_graph()}.items():
        print("=" * 20, name)
        lines = [line.strip() for line in text.splitlines()]
        keep = [
            x for x in lines if any(w in x for w in ("ld.", "st.", "atom", "fence", "membar", "globaltimer", "bar."))
        ]
        print("\n".join(x for x in keep if "param" not in x))
        if name in sys.argv:
            print(text)
