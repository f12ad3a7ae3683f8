"""Residual sum and RMSNorm of each row in one launch; meets `reference.add_rms_norm`.

Shape legend: T rows, E hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the normalized sum of x and residual, and the sum itself.

    One program per row holds the whole row, so a row's bits depend on that row alone. It moves
    4 T E elements, 2 T E without a residual: the sum is then x itself, not a copy.

    Args:
        x: [T, E] float32, float16 or bfloat16; rows may lie apart, elements of a row may not.
        weight: [E], of the same dtype.
        eps: added to the mean square.
        residual: [T, E], like x; None for zero.

    Returns:
        [T, E] and [T, E], of the dtype of x.
    """
    num_rows, size = x.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert weight.shape == (size,)
    assert weight.dtype == x.dtype
    normalized = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    total = x
    if residual is not None:
        assert residual.shape == x.shape
        assert residual.dtype == x.dtype
        assert residual.stride(1) == 1
        total = torch.empty_like(normalized)
    if num_rows == 0:
        return normalized, total
    block = triton.next_power_of_2(size)
    _add_rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        normalized,
        None if residual is None else total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),  # 16 elements a thread, two loads of 16 bytes
        enable_fp_fusion=False,
    )
    return normalized, total


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normalized_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes one row of both results; without a residual only the first."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    total = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(weight.dtype)
        tl.store(total_ptr + row * SIZE + columns, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) * (1.0 / SIZE) + eps)
    normalized = (wide * scale).to(weight.dtype).to(tl.float32)
    normalized = (weight.to(tl.float32) * normalized).to(weight.dtype)
    tl.store(normalized_ptr + row * SIZE + columns, normalized, mask=inside)
