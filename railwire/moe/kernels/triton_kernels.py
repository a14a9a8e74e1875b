"""The kernels in Triton. The same source runs on a GPU, is compiled without one (``tests/moe_compile.py``), and runs in
Triton's interpreter.

Every kernel ends where a kernel ends: none waits for another block, so none needs a grid barrier. The only one that
waits is :func:`wait_kernel`, one block that watches one word and gives up after a time.

Rows and regions are addressed in *words* of 1, 2 or 4 bytes (what divides a token), so that a block moves 16 bytes per
thread whatever the dtype. Offsets are 64-bit: a region may be larger than 2 GiB.
"""

from __future__ import annotations

import triton
import triton.language as tl


# ---- rounding: to nearest even, in integers, so that interpreter and every GPU give the same bits -------------------
@triton.jit
def bfloat16_bits(value):
    """float32 to the bits of bfloat16, as int16."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value != value, 0x7FC0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def float8_bits(value):
    """float32 of at most 448 to the bits of float8_e4m3fn, as uint8."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 an addition of 2**14, whose last place is float8's smallest number, rounds.
    shifted = (tl.abs(value) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    small = size < (121 << 23)
    return (tl.where(small, shifted, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantised_groups(x, token, group, HIDDEN: tl.constexpr, GROUPS: tl.constexpr):
    """``GROUPS`` times 128 channels of one token as float8_e4m3fn bits ``[GROUPS, 128]``, their scales ``[GROUPS]``,
    and the channels' numbers."""
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + token * HIDDEN + at, mask=at < HIDDEN, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-4)
    factor = tl.div_rn(tl.full([GROUPS], 448.0, tl.float32), amax)
    bits = float8_bits(tl.minimum(tl.maximum(value * factor[:, None], -448.0), 448.0))
    return bits, amax * (1.0 / 448.0), at


# ---- route: (token, expert) pairs sorted by bin, in token order within a bin ----------------------------------------
@triton.jit(do_not_specialize=["pairs", "number"])
def rank_kernel(bins, ranks, histogram, pairs, number, BLOCK: tl.constexpr):
    """For each pair: how many pairs of its block go to the same bin before it. ``histogram[block, bin]`` (zeroed
    before): how many there are in the block."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    mine = tl.load(bins + at, mask=inside, other=-1)
    others = tl.load(bins + block * BLOCK + tl.arange(0, BLOCK), mask=inside, other=-1)
    equal = (mine[:, None] == others[None, :]).to(tl.int32)
    index = tl.arange(0, BLOCK)
    before = tl.sum(equal * (index[None, :] < index[:, None]).to(tl.int32), axis=1)
    total = tl.sum(equal, axis=1)
    tl.store(ranks + at, before, mask=inside)
    last = inside & (mine >= 0) & (before == total - 1)
    tl.store(histogram + block * number + mine, total, mask=last)


@triton.jit(do_not_specialize=["blocks", "number"])
def scan_kernel(histogram, counts, starts, blocks, number, BINS: tl.constexpr):
    """One block. ``histogram`` becomes the first slot of each (block, bin); ``counts`` and ``starts`` those of each
    bin."""
    bin_ = tl.arange(0, BINS)
    inside = bin_ < number
    total = tl.zeros([BINS], tl.int32)
    for block in range(blocks):
        total += tl.load(histogram + block * number + bin_, mask=inside, other=0)
    start = tl.cumsum(total, axis=0) - total
    tl.store(counts + bin_, total, mask=inside)
    tl.store(starts + bin_, start, mask=inside)
    running = start
    for block in range(blocks):
        here = tl.load(histogram + block * number + bin_, mask=inside, other=0)
        tl.store(histogram + block * number + bin_, running, mask=inside)
        running += here


@triton.jit(do_not_specialize=["pairs", "number"])
def slot_kernel(bins, ranks, histogram, slots, pairs, number, BLOCK: tl.constexpr):
    """``slots[pair]``: its place among all pairs sorted by bin; -1 for pairs without a bin."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    bin_ = tl.load(bins + at, mask=inside, other=-1)
    first = tl.load(histogram + block * number + bin_, mask=inside & (bin_ >= 0), other=0)
    rank = tl.load(ranks + at, mask=inside, other=0)
    tl.store(slots + at, tl.where(bin_ >= 0, first + rank, -1), mask=inside)


# ---- pack -----------------------------------------------------------------------------------------------------------
@triton.jit
def pack_kernel(
    x, bins, slots, send, TOP_K: tl.constexpr, PER_RANK: tl.constexpr, WORDS: tl.constexpr, ROW: tl.constexpr,
    HEADER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one block of one token to the row of each of its pairs; sizes in words."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WORDS
    value = tl.load(x + token * WORDS + at, mask=inside)
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots + token * TOP_K + j).to(tl.int64)
        if slot >= 0:
            rank = (tl.load(bins + token * TOP_K + j) // PER_RANK).to(tl.int64)
            tl.store(send + (slot * ROW + (rank + 1) * HEADER) + at, value, mask=inside)


@triton.jit
def pack_fp8_kernel(
    x, bins, slots, send, send_scales, TOP_K: tl.constexpr, PER_RANK: tl.constexpr, HIDDEN: tl.constexpr,
    ROW: tl.constexpr, HEADER: tl.constexpr, SCALE_AT: tl.constexpr, SCALES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Quantises ``GROUPS`` times 128 channels of one token and stores them to the row of each of its pairs. ``send`` is
    seen as bytes, ``send_scales`` the same memory as float32; ``ROW``, ``HEADER``, ``SCALE_AT`` in bytes."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    scaled, scale, at = quantised_groups(x, token, group, HIDDEN, GROUPS)
    inside = at < HIDDEN
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots + token * TOP_K + j).to(tl.int64)
        if slot >= 0:
            rank = (tl.load(bins + token * TOP_K + j) // PER_RANK).to(tl.int64)
            begin = slot * ROW + (rank + 1) * HEADER
            tl.store(send + begin + at, scaled, mask=inside)
            tl.store(send_scales + (begin + SCALE_AT) // 4 + group, scale, mask=group < SCALES)


@triton.jit
def header_kernel(
    counts, starts, control, send, WORDS: tl.constexpr, ROW: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr, FIXED: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """Writes the header of one rank: magic, generation, rows, segment, next slot rows, mask, counts (``geometry.py``).
    ``control`` in device memory: generation (2 words), next slot rows, mask words. Sizes in 4-byte words."""
    rank = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    number = at - FIRST
    is_count = (number >= 0) & (number < BINS)
    count = tl.load(counts + rank * BINS + number, mask=is_count, other=0)
    rows = tl.sum(count, axis=0)
    segment = tl.load(starts + rank * BINS)
    value = tl.where(at == 0, MAGIC, count)
    value = tl.where((at == 1) | (at == 2), tl.load(control + at - 1, mask=(at == 1) | (at == 2), other=0), value)
    value = tl.where(at == 3, rows, value)
    value = tl.where(at == 4, segment, value)
    value = tl.where(at == 5, tl.load(control + 2), value)
    is_mask = (at >= FIXED) & (at < FIRST)
    value = tl.where(is_mask, tl.load(control + 3 + at - FIXED, mask=is_mask, other=0), value)
    tl.store(send + rank * WORDS + segment.to(tl.int64) * ROW + at, value, mask=at < WORDS)


# ---- plan and unpack ------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["ranks", "slot_rows", "align", "batched_stride"])
def plan_kernel(
    counts, rows, expert_rows, status, ranks, slot_rows, align, batched_stride, BINS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block per source: ``rows[source, i]``, the output row of its i-th row, -1 beyond its count. ``counts`` is
    ``[ranks, BINS]``; experts begin at multiples of ``batched_stride``, or, if that is 0, of ``align``. After a wait
    that has given up (``status``) nothing is planned: what lies in the slots may be anything."""
    source = tl.program_id(0)
    bin_ = tl.arange(0, WIDE)
    inside = bin_ < BINS
    total = tl.zeros([WIDE], tl.int32)
    earlier = tl.zeros([WIDE], tl.int32)
    for other in range(ranks):
        here = tl.load(counts + other * BINS + bin_, mask=inside, other=0)
        earlier += tl.where(other < source, here, 0)
        total += here
    padded = (total + align - 1) // align * align
    base = tl.where(batched_stride > 0, bin_ * batched_stride, tl.cumsum(padded, axis=0) - padded)
    mine = tl.load(counts + source * BINS + bin_, mask=inside, other=0)
    ends = tl.cumsum(mine, axis=0)
    shift = base + earlier - (ends - mine)
    if source == 0:
        tl.store(expert_rows + bin_, total, mask=inside)
    number = tl.where(tl.load(status) == 0, tl.sum(mine, axis=0), 0)
    for first in range(0, slot_rows, BLOCK):
        at = first + tl.arange(0, BLOCK)
        # The bin of row i is the number of bins that end at or before i.
        which = tl.sum((at[:, None] >= ends[None, :]).to(tl.int32) * inside[None, :].to(tl.int32), axis=1)
        here = (which[:, None] == bin_[None, :]).to(tl.int32)
        row = tl.sum(here * shift[None, :], axis=1) + at
        tl.store(rows + source * slot_rows + at, tl.where(at < number, row, -1), mask=at < slot_rows)


@triton.jit(do_not_specialize=["slot_rows"])
def unpack_kernel(
    recv, recv_scales, rows, x, scales, slot_rows, WORDS: tl.constexpr, ROW: tl.constexpr, HEADER: tl.constexpr,
    SCALE_AT: tl.constexpr, SCALES: tl.constexpr, WORD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one block of row i of source g to output row ``rows[g, i]``; sources lie ``HEADER + slot_rows * ROW``
    words apart. The first block of a row takes its scales along (``SCALES`` floats, ``SCALE_AT`` bytes into the
    row)."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    if row >= 0:
        source = number // slot_rows
        begin = source * HEADER + number * ROW + HEADER
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < WORDS
        tl.store(x + row * WORDS + at, tl.load(recv + begin + at, mask=inside), mask=inside)
        if SCALES > 0:  # known when it is compiled, unlike the next  # noqa: SIM102
            if tl.program_id(1) == 0:
                scale = tl.arange(0, WIDE)
                have = scale < SCALES
                from_ = begin * WORD // 4 + SCALE_AT // 4
                tl.store(scales + row * SCALES + scale, tl.load(recv_scales + from_ + scale, mask=have), mask=have)


# ---- combine --------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["first"])
def gather_kernel(y, rows, send, first, WORDS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Copies one block of result row ``rows[i]`` to row ``first + i`` of the combine send region."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    if row >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < WORDS
        tl.store(send + (first + number) * ROW + at, tl.load(y + row * WORDS + at, mask=inside), mask=inside)


@triton.jit
def reduce_kernel(
    received, slots, weights, out, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, HIDDEN: tl.constexpr, ROW: tl.constexpr,
    BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one token: the weighted sum of its rows in float32, in the order of top-k. ``ROW`` in elements;
    ``out`` as int16 with ``BFLOAT16``."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots + token * TOP_K + j).to(tl.int64)
        if slot >= 0:
            value = tl.load(received + slot * ROW + at, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                value = value * tl.load(weights + token * TOP_K + j)
            total += value
    if BFLOAT16:
        tl.store(out + token * HIDDEN + at, bfloat16_bits(total), mask=inside)
    else:
        tl.store(out + token * HIDDEN + at, total.to(out.dtype.element_ty), mask=inside)


# ---- words between GPU and CPU --------------------------------------------------------------------------------------
@triton.jit
def store_release(word, value, ASM: tl.constexpr):
    """Stores to a 64-bit word that the CPU polls, after everything that this block has stored before."""
    tl.debug_barrier()
    if ASM:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.release.sys.global.b64 [$1], $2; mov.u32 $0, 0;",
            "=r,l,l", [word.to(tl.int64), value.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(word.to(tl.int64).to(tl.pointer_type(tl.int64)), value.to(tl.int64))


@triton.jit(do_not_specialize=["word", "value"])
def flag_kernel(word, value, ASM: tl.constexpr):
    """Raises a 64-bit word, after everything that this stream has done before. ``word`` and ``value`` are 64-bit
    integers: an address that the CPU polls, and a generation that only grows."""
    store_release(word, value, ASM)


@triton.jit
def _now():
    """Nanoseconds; each thread reads its own."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["word", "value", "limit"])
def wait_kernel(word, value, status, clock, limit, ASM: tl.constexpr):
    """One block that waits until a 64-bit word has reached ``value``. ``status[0]`` becomes 1 when it has not after
    ``limit`` nanoseconds (in the interpreter: looks), and stays as it is otherwise. ``word`` is an address; ``clock``
    one 64-bit number of scratch: through it all threads see one time, so that they leave the loop together."""
    pointer = word.to(tl.int64).to(tl.pointer_type(tl.int64))
    looks = 0
    if ASM:
        tl.atomic_xchg(clock, _now())
        begin = tl.atomic_xchg(clock, _now())
        elapsed = begin - begin
        seen = tl.atomic_add(pointer, 0, sem="acquire", scope="sys")
        while (seen < value) & (elapsed < limit):
            seen = tl.atomic_add(pointer, 0, sem="acquire", scope="sys")
            looks += 1
            if looks % 16 == 0:
                elapsed = tl.atomic_xchg(clock, _now()) - begin
    else:
        seen = tl.load(pointer, volatile=True)
        while (seen < value) & (looks < limit):
            seen = tl.load(pointer, volatile=True)
            looks += 1
    if seen < value:
        tl.store(status, 1)
