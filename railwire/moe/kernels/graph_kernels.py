"""The kernels of a group whose layers are captured in CUDA graphs (:mod:`railwire.moe.graph`), besides those that it
shares with the other one (``triton_kernels.py``).

Nothing that changes from layer to layer is an argument: the generation, what came and what went wrong lie in memory of
the device, so that a captured graph may be replayed. ``status`` is one word of bits that only grow; once it is not 0
nothing is posted, planned or waited for any more, so a stream never hangs.

Places are counted in units of 16 bytes, so that the compiler stores 16 bytes at a time.

Memory that other processes write is passed as an address with ``RAW`` (Triton's interpreter writes whole tensors back
after a call), and as a pointer on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from railwire.moe.kernels.triton_kernels import _now, quantised_groups, store_release

LATE, BAD_HEADER, TOO_MANY, BAD_ID, NOT_SENT = 1, 2, 4, 8, 16


@triton.jit
def _as_words(memory, WORD: tl.constexpr, RAW: tl.constexpr):
    if RAW:
        if WORD == 8:
            return memory.to(tl.int64).to(tl.pointer_type(tl.int64))
        elif WORD == 4:
            return memory.to(tl.int64).to(tl.pointer_type(tl.int32))
        elif WORD == 2:
            return memory.to(tl.int64).to(tl.pointer_type(tl.int16))
        else:
            return memory.to(tl.int64).to(tl.pointer_type(tl.uint8))
    else:
        return memory


# ---- the clock of layers --------------------------------------------------------------------------------------------
@triton.jit
def begin_kernel(state):
    """The next generation."""
    tl.store(state, tl.load(state) + 1)


@triton.jit(do_not_specialize=["words", "limit", "code"])
def wait_all_kernel(
    words, state, behind_by, status, late, clock, limit, code, OWN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One block that waits until ``COUNT`` 64-bit words in a row, all but number ``OWN``, have reached the generation
    less ``behind_by``. It gives up after ``limit`` microseconds (in the interpreter: looks), or when a word says that
    its writer has failed (it is negative). Then ``status`` gets ``code``, and ``late[i]`` is 1 for those that are
    behind. The words are in pages that they have to themselves: ``BLOCK`` of them may be read. ``clock``: see
    ``wait_kernel``."""
    lane = tl.arange(0, BLOCK)
    mine = (lane < COUNT) & (lane != OWN)
    value = tl.load(state) - behind_by
    value = tl.where(tl.load(status) != 0, -(1 << 62), value)
    address = words.to(tl.int64) + lane.to(tl.int64) * 8
    looks = 0
    if ASM:
        seen = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        seen = tl.load(address.to(tl.pointer_type(tl.int64)), volatile=True)
    behind = tl.sum((mine & (seen < value)).to(tl.int32), axis=0)
    failed = tl.sum((mine & (seen < 0)).to(tl.int32), axis=0)
    if ASM:
        tl.atomic_xchg(clock, _now())
        begin = tl.atomic_xchg(clock, _now())
        elapsed = begin - begin
        while (behind > 0) & (failed == 0) & (elapsed < limit.to(tl.int64) * 1000):
            seen = tl.inline_asm_elementwise(
                "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
            )
            behind = tl.sum((mine & (seen < value)).to(tl.int32), axis=0)
            failed = tl.sum((mine & (seen < 0)).to(tl.int32), axis=0)
            looks += 1
            if looks % 16 == 0:
                elapsed = tl.atomic_xchg(clock, _now()) - begin
    else:
        while (behind > 0) & (failed == 0) & (looks < limit):
            seen = tl.load(address.to(tl.pointer_type(tl.int64)), volatile=True)
            behind = tl.sum((mine & (seen < value)).to(tl.int32), axis=0)
            failed = tl.sum((mine & (seen < 0)).to(tl.int32), axis=0)
            looks += 1
    if behind > 0:
        tl.atomic_or(status, code)
        tl.store(late + lane, 1, mask=mine & (seen < value))


@triton.jit(do_not_specialize=["table", "word"])
def post_kernel(
    rows, firsts, state, status, imms, table, word, OWN: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr,
    STRIDE: tl.constexpr, FIRST_BYTES: tl.constexpr, HEADER: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Fills the slot of a prepared scatter's table that belongs to this generation, and raises the word that posts it.
    Rank r gets ``HEADER + rows[r] * ROW`` bytes from ``r * STRIDE``, to ``firsts[r] * FIRST_BYTES`` of its window.
    After a failure nobody gets anything."""
    rank = tl.arange(0, BLOCK)
    mine = (rank < RANKS) & (rank != OWN)
    generation = tl.load(state)
    good = tl.load(status) == 0
    number = tl.load(rows + rank, mask=mine, other=0).to(tl.int64)
    first = tl.load(firsts + rank, mask=mine, other=0).to(tl.int64)
    target = rank - (rank > OWN).to(tl.int32)
    entry = (((generation - 1) % DEPTH) * (RANKS - 1) + target.to(tl.int64)) * 4
    at = table.to(tl.int64).to(tl.pointer_type(tl.int64)) + entry
    imm = tl.load(imms + rank, mask=mine, other=-1)
    tl.store(at, rank.to(tl.int64) * STRIDE, mask=mine)
    tl.store(at + 1, first * FIRST_BYTES, mask=mine)
    tl.store(at + 2, tl.where(good, HEADER + number * ROW, 0), mask=mine)
    tl.store(at + 3, tl.where(good, imm, -1), mask=mine)
    store_release(word, generation, ASM)


# ---- dispatch -------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["pairs"])
def bins_kernel(ids, bins, status, pairs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Ids as int32; those that name no expert are left out, and noted."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    number = tl.load(ids + at, mask=inside, other=-1)
    wrong = inside & ((number < -1) | (number >= EXPERTS))
    tl.store(bins + at, tl.where(wrong, -1, number).to(tl.int32), mask=inside)
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_or(status, 8)


@triton.jit(do_not_specialize=["send"])
def pack_slots_kernel(
    x, bins, slots, starts, places, send, TOP_K: tl.constexpr, PER_RANK: tl.constexpr, WORDS: tl.constexpr,
    ROW: tl.constexpr, HEADER: tl.constexpr, AT: tl.constexpr, MOST: tl.constexpr, WORD: tl.constexpr,
    RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one block of one token to the row of each of its pairs. The slot of a rank begins ``places[rank]`` times
    16 bytes from ``send``, wherever that is; sizes in words of ``WORD`` bytes. ``AT``: words into the row."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WORDS
    into = _as_words(send, WORD, RAW)
    value = tl.load(x + token * WORDS + at, mask=inside)
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots + token * TOP_K + j)
        if slot >= 0:
            rank = tl.load(bins + token * TOP_K + j) // PER_RANK
            row = (slot - tl.load(starts + rank * PER_RANK)).to(tl.int64)
            if row < MOST:
                begin = tl.load(places + rank) * (16 // WORD) + HEADER + row * ROW + AT
                tl.store(into + begin + at, value, mask=inside)


@triton.jit(do_not_specialize=["send", "send_scales"])
def pack_slots_fp8_kernel(
    x, bins, slots, starts, places, send, send_scales, TOP_K: tl.constexpr, PER_RANK: tl.constexpr,
    HIDDEN: tl.constexpr, ROW: tl.constexpr, HEADER: tl.constexpr, SCALE_AT: tl.constexpr, SCALES: tl.constexpr,
    MOST: tl.constexpr, GROUPS: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """As ``pack_fp8_kernel``, into the slots of ``pack_slots_kernel``; sizes in bytes."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    scaled, scale, at = quantised_groups(x, token, group, HIDDEN, GROUPS)
    inside = at < HIDDEN
    into = _as_words(send, 1, RAW)
    if RAW:  # compiled away on a GPU, so no ternary  # noqa: SIM108
        into_scales = send_scales.to(tl.int64).to(tl.pointer_type(tl.float32))
    else:
        into_scales = send_scales
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots + token * TOP_K + j)
        if slot >= 0:
            rank = tl.load(bins + token * TOP_K + j) // PER_RANK
            row = (slot - tl.load(starts + rank * PER_RANK)).to(tl.int64)
            if row < MOST:
                begin = tl.load(places + rank) * 16 + HEADER + row * ROW
                tl.store(into + begin + at, scaled, mask=inside)
                tl.store(into_scales + (begin + SCALE_AT) // 4 + group, scale, mask=group < SCALES)


@triton.jit(do_not_specialize=["send"])
def slot_header_kernel(
    counts, starts, state, places, send, sent, status, BINS: tl.constexpr, FIRST: tl.constexpr, WORDS: tl.constexpr,
    MOST: tl.constexpr, MOST_OF_EXPERT: tl.constexpr, MAGIC: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the header of one rank to the beginning of its slot (``geometry.py`` has the format), and ``sent[rank]``,
    the rows that follow it. Notes what does not fit."""
    rank = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    number = at - FIRST
    is_count = (number >= 0) & (number < BINS)
    count = tl.load(counts + rank * BINS + number, mask=is_count, other=0)
    rows = tl.sum(count, axis=0)
    if (rows > MOST) | (tl.max(count, axis=0) > MOST_OF_EXPERT):
        tl.atomic_or(status, 4)
    generation = tl.load(state)
    value = tl.where(at == 0, MAGIC, count)
    value = tl.where(at == 1, (generation & 0x7FFFFFFF).to(tl.int32), value)
    value = tl.where(at == 2, (generation >> 31).to(tl.int32), value)
    value = tl.where(at == 3, rows, value)
    value = tl.where(at == 4, tl.load(starts + rank * BINS), value)
    into = _as_words(send, 4, RAW)
    tl.store(into + tl.load(places + rank) * 4 + at, value, mask=at < WORDS)
    tl.store(sent + rank, rows)


@triton.jit(do_not_specialize=["recv"])
def read_headers_kernel(
    recv, state, counts, came, segments, status, late, BINS: tl.constexpr, HERE: tl.constexpr, FIRST: tl.constexpr,
    STRIDE: tl.constexpr, WORDS: tl.constexpr, MOST: tl.constexpr, MOST_OF_EXPERT: tl.constexpr,
    MAX_ROWS: tl.constexpr, MAGIC: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads and checks what one source says: ``counts[source, :]``, ``came[source]`` rows, from ``segments[source]`` of
    its own on. What no honest source sends counts as nothing, and is noted. ``STRIDE``: of slots, in words."""
    source = tl.program_id(0)
    begin = _as_words(recv, 4, RAW) + source.to(tl.int64) * STRIDE
    at = tl.arange(0, BLOCK)
    number = at - FIRST
    is_count = (number >= 0) & (number < BINS)
    count = tl.load(begin + FIRST + number, mask=is_count, other=0)
    wrong = tl.sum((is_count & ((count < 0) | (count > MOST_OF_EXPERT))).to(tl.int32), axis=0)
    wrong += tl.sum((is_count & (number >= HERE) & (count != 0)).to(tl.int32), axis=0)
    generation = tl.load(state)
    rows = tl.load(begin + 3)
    segment = tl.load(begin + 4)
    wrong += (tl.load(begin) != MAGIC).to(tl.int32)
    wrong += (tl.load(begin + 1) != (generation & 0x7FFFFFFF).to(tl.int32)).to(tl.int32)
    wrong += (tl.load(begin + 2) != (generation >> 31).to(tl.int32)).to(tl.int32)
    total = tl.sum(count.to(tl.int64), axis=0)
    wrong += ((rows < 0) | (rows > MOST) | (segment < 0) | (segment > MAX_ROWS)).to(tl.int32)
    wrong += ((total != rows) | (rows + segment > MAX_ROWS)).to(tl.int32)
    over = tl.load(status) != 0
    if (wrong > 0) & (over == 0):
        tl.atomic_or(status, 2)
        tl.store(late + source, 2)
    good = (wrong == 0) & (over == 0)
    tl.store(counts + source * BINS + number, tl.where(good, count, 0), mask=is_count)
    tl.store(came + source, tl.where(good, rows, 0))
    tl.store(segments + source, tl.where(good, segment, 0))


# ---- combine --------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["send"])
def gather_slots_kernel(
    y, rows, segments, places, straight, send, SLOT_ROWS: tl.constexpr, WORDS: tl.constexpr, ROW: tl.constexpr,
    WORD: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one block of the result of row i of source g to row i of its slot, ``16 * places[g]`` bytes from ``send``;
    with ``straight[g]`` that is the combine region of g itself, and its segment begins there where it says."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    if row >= 0:
        source = number // SLOT_ROWS
        index = number % SLOT_ROWS
        if tl.load(straight + source) != 0:
            index += tl.load(segments + source).to(tl.int64)
        begin = tl.load(places + source) * (16 // WORD) + index * ROW
        into = _as_words(send, WORD, RAW) + begin
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < WORDS
        tl.store(into + at, tl.load(y + row * WORDS + at, mask=inside), mask=inside)
