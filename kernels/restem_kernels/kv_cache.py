"""New keys and values into the cache; meets `reference.write_kv` and `reference.rotate_and_write`.

Shape legend: T rows of a forward pass, H query heads, K key heads, D head size, n cache blocks,
S tokens in a block, P positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from restem_kernels.work import Work

_HEADS = 8  # of a row, that one program takes
# The lists may be views of one buffer at any offset: their alignment is no reason to compile again.
_LISTS = ["positions_ptr", "own_tables_ptr", "own_starts_ptr", "tables_ptr", "table_stride"]


def write_kv(
    keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, work: Work
) -> None:
    """Writes the key and value of each row to its place in the cache.

    Row r goes to block tables[own_tables[r], i // S], offset i % S, where i = positions[r] -
    own_starts[r]; the device reads all of these. Rows that share a place (unused rows do) leave a
    value of which each element is that of any one of them. It moves 4 T K D elements.

    Args:
        keys: [T, K, D]; rows and heads may lie apart, elements of a head may not.
        values: [T, K, D], likewise, of the same dtype.
        key_cache: [n, K, S, D], changed in place; of the dtype of keys, D contiguous.
        value_cache: [n, K, S, D], changed in place; laid out like key_cache.
        work: where each row goes.
    """
    num_rows, num_heads, size = keys.shape
    assert values.shape == keys.shape
    _check_caches(keys, key_cache, value_cache, work)
    assert keys.stride(2) == values.stride(2) == 1
    assert key_cache.shape[1] == num_heads
    if num_rows == 0:
        return
    _write_kv_kernel[(num_rows, triton.cdiv(num_heads, _HEADS))](
        keys,
        values,
        key_cache,
        value_cache,
        *_places(work),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        work.tables.stride(0),
        *key_cache.stride()[:3],
        num_heads,
        SLOTS=key_cache.shape[2],
        SIZE=size,
        HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(size),
        num_warps=_num_warps(size),
        enable_fp_fusion=False,
    )


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    work: Work,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns the rotated queries [T, H, D]; writes the rotated keys and the values to the cache.

    One launch for all three; a program takes a few heads of one row, so a row's bits depend on that
    row alone. It moves 2 T (H + 2 K) D elements and 2 T D of cos and sin.

    Args:
        qkv: [T, (H + 2 K) * D], queries, keys and values of each row side by side; rows may lie
            apart, elements of a row may not.
        cos: [P, D] contiguous, of the dtype of qkv; row p belongs to position p.
        sin: [P, D], likewise.
        key_cache: [n, K, S, D], changed in place; of the dtype of qkv, D contiguous.
        value_cache: [n, K, S, D], changed in place; laid out like key_cache.
        work: the position of each row, and where its key and value go, see `write_kv`.
        q_norm: [D], weight of an RMSNorm of each query head before it is rotated, None for none.
        k_norm: [D], the same for key heads.
        eps: of these norms.
    """
    num_rows, num_key_heads, size = qkv.shape[0], key_cache.shape[1], key_cache.shape[3]
    num_heads = qkv.shape[1] // size - 2 * num_key_heads
    _check_caches(qkv, key_cache, value_cache, work)
    assert qkv.stride(1) == 1
    assert qkv.shape[1] == (num_heads + 2 * num_key_heads) * size
    for table in (cos, sin, *(norm for norm in (q_norm, k_norm) if norm is not None)):
        assert table.is_contiguous()
        assert table.shape[-1] == size
        assert table.dtype == qkv.dtype
    queries = torch.empty(num_rows, num_heads, size, dtype=qkv.dtype, device=qkv.device)
    if num_rows == 0:
        return queries
    _rotate_and_write_kernel[(num_rows, triton.cdiv(num_heads + 2 * num_key_heads, _HEADS))](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        queries,
        key_cache,
        value_cache,
        *_places(work),
        qkv.stride(0),
        work.tables.stride(0),
        *key_cache.stride()[:3],
        num_heads,
        num_key_heads,
        eps,
        SLOTS=key_cache.shape[2],
        SIZE=size,
        HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(size // 2),
        num_warps=_num_warps(size // 2),
        enable_fp_fusion=False,
    )
    return queries


def _places(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what says where each row goes."""
    return work.positions, work.own_tables, work.own_starts, work.tables


def _num_warps(size: int) -> int:
    """Returns how many warps load HEADS vectors of this size with 16 bytes a thread in bfloat16."""
    return max(_HEADS * triton.next_power_of_2(size) // 256, 1)


def _check_caches(new: Tensor, key_cache: Tensor, value_cache: Tensor, work: Work) -> None:
    """Asserts what both kernels take for granted."""
    assert key_cache.shape == value_cache.shape
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride(3) == work.tables.stride(1) == 1
    assert key_cache.dtype == value_cache.dtype == new.dtype
    for rows in (work.positions, work.own_tables, work.own_starts):
        assert rows.is_contiguous()
        assert rows.shape[0] >= new.shape[0]


@triton.jit
def _place(
    row,
    positions_ptr,
    own_tables_ptr,
    own_starts_ptr,
    tables_ptr,
    table_stride,
    block_stride,
    slot_stride,
    SLOTS: tl.constexpr,
):
    """Returns the offset in the cache of head 0 of a row's key, int64."""
    index = tl.load(positions_ptr + row) - tl.load(own_starts_ptr + row)
    table = tl.load(own_tables_ptr + row).to(tl.int64)
    block = tl.load(tables_ptr + table * table_stride + index // SLOTS).to(tl.int64)
    return block * block_stride + (index % SLOTS) * slot_stride


@triton.jit(do_not_specialize=_LISTS)
def _write_kv_kernel(
    keys_ptr,
    values_ptr,
    key_cache_ptr,
    value_cache_ptr,
    positions_ptr,
    own_tables_ptr,
    own_starts_ptr,
    tables_ptr,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    num_heads,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes HEADS heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (columns < SIZE)
    key = tl.load(keys_ptr + row * key_row_stride + heads * key_head_stride + columns, mask=inside)
    value = tl.load(
        values_ptr + row * value_row_stride + heads * value_head_stride + columns, mask=inside
    )
    place = _place(
        row,
        positions_ptr,
        own_tables_ptr,
        own_starts_ptr,
        tables_ptr,
        table_stride,
        block_stride,
        slot_stride,
        SLOTS,
    )
    target = place + heads.to(tl.int64) * head_stride + columns
    tl.store(key_cache_ptr + target, key, mask=inside)
    tl.store(value_cache_ptr + target, value, mask=inside)


@triton.jit
def _normed(low, high, of_these, weight_ptr, columns, eps, SIZE: tl.constexpr):
    """Returns both halves [HEADS, BLOCK] with an RMSNorm of the heads in of_these [HEADS, 1]."""
    half: tl.constexpr = SIZE // 2
    inside = columns < half
    low_weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    high_weight = tl.load(weight_ptr + half + columns, mask=inside, other=0.0).to(tl.float32)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    squares = tl.sum(wide_low * wide_low + wide_high * wide_high, 1, keep_dims=True)
    scale = tl.rsqrt(squares * (1.0 / SIZE) + eps)
    new_low = low_weight * (wide_low * scale).to(low.dtype).to(tl.float32)
    new_high = high_weight * (wide_high * scale).to(low.dtype).to(tl.float32)
    low = tl.where(of_these, new_low.to(low.dtype), low)
    high = tl.where(of_these, new_high.to(low.dtype), high)
    return low, high


@triton.jit
def _turned(x, other, cos, sin, SIGN: tl.constexpr):
    """Returns x * cos + SIGN * other * sin, both products and the sum rounded to the dtype of x."""
    first = (x.to(tl.float32) * cos.to(tl.float32)).to(x.dtype).to(tl.float32)
    second = (other.to(tl.float32) * sin.to(tl.float32)).to(x.dtype).to(tl.float32)
    return (first + SIGN * second).to(x.dtype)


@triton.jit(do_not_specialize=_LISTS)
def _rotate_and_write_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    queries_ptr,
    key_cache_ptr,
    value_cache_ptr,
    positions_ptr,
    own_tables_ptr,
    own_starts_ptr,
    tables_ptr,
    row_stride,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    num_heads,
    num_key_heads,
    eps,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes HEADS heads of one row, counted over queries, keys and values."""
    half: tl.constexpr = SIZE // 2
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    source = qkv_ptr + row * row_stride + heads * SIZE + columns
    inside = (heads < num_heads + 2 * num_key_heads) & (columns < half)
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + half, mask=inside, other=0.0)
    place = _place(
        row,
        positions_ptr,
        own_tables_ptr,
        own_starts_ptr,
        tables_ptr,
        table_stride,
        block_stride,
        slot_stride,
        SLOTS,
    )

    is_query = heads < num_heads
    is_value = heads >= num_heads + num_key_heads
    is_key = (heads >= num_heads) & (heads < num_heads + num_key_heads)
    value_head = (heads - num_heads - num_key_heads).to(tl.int64)
    target = value_cache_ptr + place + value_head * head_stride + columns
    tl.store(target, low, mask=inside & is_value)
    tl.store(target + half, high, mask=inside & is_value)

    if q_norm_ptr is not None:
        low, high = _normed(low, high, is_query, q_norm_ptr, columns, eps, SIZE)
    if k_norm_ptr is not None:
        low, high = _normed(low, high, is_key, k_norm_ptr, columns, eps, SIZE)
    angles = tl.load(positions_ptr + row).to(tl.int64) * SIZE + columns
    known = columns < half
    low_cos = tl.load(cos_ptr + angles, mask=known, other=0.0)
    low_sin = tl.load(sin_ptr + angles, mask=known, other=0.0)
    high_cos = tl.load(cos_ptr + angles + half, mask=known, other=0.0)
    high_sin = tl.load(sin_ptr + angles + half, mask=known, other=0.0)
    new_low = _turned(low, high, low_cos, low_sin, -1.0)
    new_high = _turned(high, low, high_cos, high_sin, 1.0)

    target = queries_ptr + (row * num_heads + heads) * SIZE + columns
    tl.store(target, new_low, mask=inside & is_query)
    tl.store(target + half, new_high, mask=inside & is_query)
    target = key_cache_ptr + place + (heads - num_heads).to(tl.int64) * head_stride + columns
    tl.store(target, new_low, mask=inside & is_key)
    tl.store(target + half, new_high, mask=inside & is_key)
