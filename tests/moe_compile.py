"""Compiles every kernel for sm_90 without a GPU, at DeepSeek-V3's sizes, and returns the PTX."""

from __future__ import annotations

from typing import Any


def compile_all() -> dict[str, str]:
    """PTX of each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from railwire.moe import Geometry, MoeConfig
    from railwire.moe.geometry import MAGIC
    from railwire.moe.kernels import triton_kernels as k

    config = MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=128, top_k=8, fp8=True)
    fp8, plain = Geometry(config), Geometry(MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=128, top_k=8))
    target = GPUTarget("cuda", 90, 32)

    def ptx(kernel: Any, types: dict[str, str], **constants: Any) -> str:
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        # What a launch finds out for itself: torch's memory is 16-byte aligned.
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
        source = ASTSource(kernel, signature, constants, aligned)
        return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]

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

    for name, text in compile_all().items():
        print("=" * 20, name)
        lines = [line.strip() for line in text.splitlines()]
        keep = [
            x for x in lines if any(w in x for w in ("ld.", "st.", "atom", "fence", "membar", "globaltimer", "bar."))
        ]
        print("\n".join(x for x in keep if "param" not in x))
        if name in sys.argv:
            print(text)
