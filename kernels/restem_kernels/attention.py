"""Attention of each row over its shared and its own keys: one launch for all pieces, one to merge.

Meets `reference.block_attention`, which defines it. Lengths, counts and positions are read on the
device, and the launches depend on capacities alone: nothing waits for the device, and a captured
CUDA graph stays right when the lists change. Tile sizes depend on head counts, head size and dtype
alone, and keys are taken in blocks counted from the start of a range, so the bits of a row do not
depend on what else is in the batch.

Shape legend: T rows, H query heads, K key heads, G = H // K, D head size, n cache blocks, S tokens
in a block, M rows of a matrix product: one query head of one row each, N keys at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from restem_kernels import work as columns
from restem_kernels.work import Work

_SHARED_M = 64  # the least that the tensor cores of Hopper take from one warp group
_OWN_M = 16  # the least that any tensor core takes
_MERGED = 8  # pieces that the merge takes at a time

_FIRST_MEMBER = tl.constexpr(columns.FIRST_MEMBER)
_NUM_MEMBERS = tl.constexpr(columns.NUM_MEMBERS)
_TABLE = tl.constexpr(columns.TABLE)
_START = tl.constexpr(columns.START)
_FIRST_KEY = tl.constexpr(columns.FIRST_KEY)
_LAST_KEY = tl.constexpr(columns.LAST_KEY)
_PIECE = tl.constexpr(columns.PIECE)
_NUM_COLUMNS = tl.constexpr(columns.PIECE + 1)

# Finite, so that the difference of two of them is not NaN; every score is above it.
_LOWEST = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


def tile_rows(group: int) -> int:
    """Returns how many rows a tile over a shared segment may have, for H // K = group."""
    return max(1, _SHARED_M // group)


def block_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    work: Work,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Returns what `reference.block_attention` returns.

    Args:
        queries: [T, H, D], D contiguous; bfloat16, float16 or float32.
        key_cache: [n, K, S, D], D contiguous.
        value_cache: [n, K, S, D], with the strides of key_cache.
        work: tiles have at most `tile_rows(H // K)` rows.
        scaling: factor of the scores.
        window: positions that a row sees, its own included; None for all before it.
        softcap: c of c * tanh(score / c) (Gemma 2), None for none.
    """
    num_rows, num_heads, head_size = queries.shape
    num_key_heads, size = key_cache.shape[1:3]
    assert key_cache.stride() == value_cache.stride()
    assert queries.stride(2) == key_cache.stride(3) == work.tables.stride(1) == 1
    # The interpreter of Triton 3.6 to 3.9 multiplies the bits of bfloat16 as if they were integers.
    assert queries.is_cuda or queries.dtype != torch.bfloat16
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if num_rows == 0:
        return output
    shape = (num_rows, work.num_pieces, num_heads, head_size)
    mixed = torch.empty(shape, dtype=torch.float32, device=queries.device)
    normalizers = torch.empty(shape[:3], dtype=torch.float32, device=queries.device)
    assert mixed.numel() < 2**31  # what its indices can hold
    num_shared_programs, num_own_programs = _num_programs(work, num_rows, num_key_heads, size)
    num_programs = num_shared_programs + num_rows * num_own_programs
    group, padded_size = num_heads // num_key_heads, triton.next_power_of_2(max(head_size, 16))
    if num_programs > 0:
        _pieces_kernel[(num_key_heads, num_programs)](
            queries, key_cache, value_cache, mixed, normalizers,
            work.tiles, work.num_tiles, work.members, work.tables, work.positions,
            work.own_tables, work.own_starts, work.num_shared,
            scaling, num_shared_programs, num_own_programs, num_rows, work.num_pieces,
            work.tables.stride(0), *queries.stride()[:2], *key_cache.stride()[:3],
            K=num_key_heads, G=group, D=head_size, PADDED=padded_size, S=size, SPLIT=work.split,
            WINDOW=window or 0, SOFTCAP=softcap or 0.0,
            SHARED_M=max(_SHARED_M, triton.next_power_of_2(group)),
            OWN_M=max(_OWN_M, triton.next_power_of_2(group)),
            enable_fp_fusion=True, **_launch_options(padded_size, queries.dtype),
        )  # fmt: skip
    _merge_kernel[(num_rows * num_heads,)](
        mixed, normalizers, output, work.positions, work.own_starts, work.num_shared,
        work.num_pieces, H=num_heads, D=head_size, PADDED=padded_size,
        SPLIT=work.split if work.attend_own else 0, N=_MERGED, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return output


def _launch_options(padded_size: int, dtype: torch.dtype) -> dict[str, int | None]:
    """Returns how many keys a program takes at a time, and what it may use of a processor.

    Read off the code that Triton 3.6 and 3.9 make for Hopper: three programs fit on a processor
    with up to 128 values of 16 bits in a head, two with up to 256, and the loops over keys spill no
    register. Five stages keep two steps of keys on their way, 16 KiB each, as looking up blocks
    takes stages too.
    """
    if dtype == torch.float32:  # no tensor cores: products of 32 bits take many registers
        return {"N": 16, "num_warps": 8, "num_stages": 2, "maxnreg": None}
    num_keys = max(16, min(64, 4096 // padded_size))
    registers = 168 if padded_size <= 128 else None
    return {"N": num_keys, "num_warps": 4, "num_stages": 5, "maxnreg": registers}


def _num_programs(work: Work, num_rows: int, num_key_heads: int, size: int) -> tuple[int, int]:
    """Returns how many programs, for each key head, share all tiles, and each row's own ranges.

    Two for tiles and eight for own ranges per processor, if there can be enough to do. More would
    find nothing to do, most of the time, and cost a microsecond each; what a row gets does not
    depend on it.
    """
    device = work.tiles.device
    num_processors = 1  # the interpreter
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    num_shared = min(work.tiles.shape[0], triton.cdiv(2 * num_processors, num_key_heads))
    num_ranges = min(triton.cdiv(work.tables.shape[1] * size, work.split), work.num_pieces)
    num_own = min(num_ranges, triton.cdiv(8 * num_processors, num_rows * num_key_heads))
    return num_shared, num_own if work.attend_own else 0


# The lists may be views of one buffer at any offset: their alignment is no reason to compile again.
@triton.jit(
    do_not_specialize=[
        "tiles", "num_tiles", "members", "tables", "positions", "own_tables", "own_starts",
        "num_shared", "num_shared_programs", "num_own_programs", "num_rows", "num_pieces",
        "table_stride",
    ]
)  # fmt: skip
def _pieces_kernel(
    queries, key_cache, value_cache, mixed, normalizers,
    tiles, num_tiles, members, tables, positions, own_tables, own_starts, num_shared,
    scaling, num_shared_programs, num_own_programs, num_rows, num_pieces,
    table_stride, query_row_stride, query_head_stride, block_stride, key_head_stride, slot_stride,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SHARED_M: tl.constexpr, OWN_M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Writes all pieces: the first programs those of the tiles, the others those of own keys.

    Of these, program p of a row takes ranges p, p + num_own_programs and so on, and the programs
    that few rows have keys for come last.
    """
    key_head = tl.program_id(0)
    program = tl.program_id(1)
    keys = key_cache + key_head * key_head_stride
    values = value_cache + key_head * key_head_stride
    queries += key_head * G * query_head_stride
    if program < num_shared_programs:
        m = tl.arange(0, SHARED_M)
        # What is the same for all tiles is made again for each, and the rows are read twice: kept,
        # they would take registers that the loop over keys needs.
        for index in tl.range(program, tl.load(num_tiles), num_shared_programs, disable_licm=True):
            tile = tiles + index * _NUM_COLUMNS
            used = m // G < tl.load(tile + _NUM_MEMBERS)
            member = members + tl.load(tile + _FIRST_MEMBER) + m // G
            rows = tl.load(member, mask=used, other=0)
            result, normalizer = _attend(
                queries + rows * query_row_stride + m % G * query_head_stride,
                tl.load(positions + rows, mask=used, other=-1), used,
                keys, values, tables + tl.load(tile + _TABLE) * table_stride,
                tl.load(tile + _START), tl.load(tile + _FIRST_KEY), tl.load(tile + _LAST_KEY),
                scaling, block_stride, slot_stride, D, PADDED, S, WINDOW, SOFTCAP, N,
            )  # fmt: skip
            rows = tl.load(member, mask=used, other=0, volatile=True)
            slots = (rows * num_pieces + tl.load(tile + _PIECE)) * K + key_head
            _store(mixed, normalizers, slots * G + m % G, used, result, normalizer, D, PADDED)
    else:
        g = tl.arange(0, OWN_M)
        number = program - num_shared_programs
        row = number % num_rows
        start = tl.load(own_starts + row)
        num_keys = tl.load(positions + row) - start + 1
        for first in range(number // num_rows * SPLIT, num_keys, num_own_programs * SPLIT):
            result, normalizer = _attend(
                queries + row * query_row_stride + g * query_head_stride,
                tl.where(g < G, start + num_keys - 1, -1), g < G,
                keys, values, tables + tl.load(own_tables + row) * table_stride,
                start, first, tl.minimum(first + SPLIT, num_keys),
                scaling, block_stride, slot_stride, D, PADDED, S, WINDOW, SOFTCAP, N,
            )  # fmt: skip
            piece = tl.load(num_shared + row) + first // SPLIT
            slots = (row * num_pieces + piece) * K + key_head
            _store(mixed, normalizers, slots * G + g, g < G, result, normalizer, D, PADDED)


@triton.jit
def _store(
    mixed, normalizers, slots, used, result, normalizer, D: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Writes result [M, D] and normalizer [M] to slots [M], where used [M]."""
    d = tl.arange(0, PADDED)
    tl.store(mixed + slots[:, None] * D + d, result, mask=used[:, None] & (d < D))
    tl.store(normalizers + slots, normalizer, mask=used)


@triton.jit
def _attend(
    queries, positions, used, keys, values, table, start, first, last,
    scaling, block_stride, slot_stride,
    D: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Returns the attention of M query heads over keys first .. last-1 of one segment.

    These are [M, PADDED] and the log-sum-exp [M] of the scores, both float32. queries [M] point at
    the first element of each query head, keys and values at the key head in cache block 0, table at
    the blocks of the segment, whose first key has position start. Where used [M] is false,
    positions [M] is -1.
    """
    M: tl.constexpr = positions.shape[0]
    d = tl.arange(0, PADDED)
    q = tl.load(queries[:, None] + d, mask=used[:, None] & (d < D), other=0.0)
    # Row m sees the keys since[m] .. until[m]-1, and none sees any outside lowest .. end-1: what
    # lies there may be anything.
    until = tl.minimum(positions - start + 1, last)
    end = tl.max(until, 0)
    lowest = first
    if WINDOW > 0:
        since = positions - start + 1 - WINDOW
        lowest = tl.maximum(first, tl.min(tl.where(used, since, last), 0))
    best = tl.full([M], _LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, PADDED], tl.float32)
    for base in range(first + (lowest - first) // N * N, end, N):
        index = base + tl.arange(0, N)
        seen = index < end
        if WINDOW > 0:
            seen &= index >= lowest
        block = tl.load(table + index // S, mask=seen, other=0).to(tl.int64)
        offsets = (block * block_stride + index % S * slot_stride)[:, None] + d
        k = tl.load(keys + offsets, mask=seen[:, None] & (d < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if SOFTCAP > 0.0:
            scores = SOFTCAP * _tanh(scores / SOFTCAP)
        visible = index < until[:, None]
        if WINDOW > 0:
            visible &= index >= since[:, None]
        scores = tl.where(visible, scores * _LOG2_E, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - better[:, None])
        shrink = tl.exp2(best - better)
        best = better
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + offsets, mask=seen[:, None] & (d < D), other=0.0)
        result = tl.dot(
            weights.to(v.dtype), v, acc=result * shrink[:, None], input_precision="ieee"
        )
    divisor = tl.where(total > 0.0, total, 1.0)
    normalizer = tl.where(total > 0.0, (best + tl.log2(divisor)) * _LN_2, float("-inf"))
    return result / divisor[:, None], normalizer


@triton.jit
def _tanh(x):
    """Returns tanh(x) in float32: a quotient of polynomials near 0, where exp would lose digits."""
    x = tl.clamp(x, -10.0, 10.0)  # tanh(10) is 1 in float32
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    return tl.where(square < 1.0, near, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit(do_not_specialize=["positions", "own_starts", "num_shared", "num_pieces"])
def _merge_kernel(
    mixed, normalizers, output, positions, own_starts, num_shared, num_pieces,
    H: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Writes one head of one row of the output, N pieces at a time; SPLIT is 0 without own keys."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    d = tl.arange(0, PADDED)
    count = tl.load(num_shared + row)
    if SPLIT > 0:
        num_keys = tl.load(positions + row) - tl.load(own_starts + row) + 1
        count += (tl.maximum(num_keys, 0) + SPLIT - 1) // SPLIT
    best = tl.full([1], _LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([PADDED], tl.float32)
    for base in range(0, count, N):
        piece = base + tl.arange(0, N)
        slots = (row * num_pieces + piece) * H + head
        normalizer = tl.load(normalizers + slots, mask=piece < count, other=float("-inf"))
        mask = (piece < count)[:, None] & (d < D)
        part = tl.load(mixed + slots[:, None] * D + d, mask=mask, other=0.0)
        better = tl.maximum(best, tl.max(normalizer, 0))
        weights = tl.exp(normalizer - better)
        shrink = tl.exp(best - better)
        best = better
        total = total * shrink + tl.sum(weights, 0)
        result = result * shrink + tl.sum(weights[:, None] * part, 0)
    result /= tl.where(total > 0.0, total, 1.0)
    tl.store(output + (row * H + head) * D + d, result.to(output.dtype.element_ty), mask=d < D)
