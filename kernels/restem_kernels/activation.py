"""The gated activation of the feed-forward layers; meets `reference.gated_silu`.

Shape legend: T rows, I intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up [T, I] for gate and up side by side in [T, 2 I].

    Each element depends on its own gate and up alone. It moves 3 T I elements.

    Args:
        gate_up: [T, 2 I] float32, float16 or bfloat16; rows may lie apart, elements of a row may
            not.

    Returns:
        [T, I], of the same dtype.
    """
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * size
    assert gate_up.stride(1) == 1
    product = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if product.numel():
        grid = (num_rows, triton.cdiv(size, _BLOCK))
        _gated_silu_kernel[grid](
            gate_up, product, gate_up.stride(0), size, BLOCK=_BLOCK, enable_fp_fusion=False
        )
    return product


@triton.jit
def _gated_silu_kernel(gate_up_ptr, product_ptr, row_stride, size, BLOCK: tl.constexpr):
    """Writes BLOCK elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_ptr = gate_up_ptr + row * row_stride + columns
    gate = tl.load(gate_ptr, mask=inside, other=0.0)
    up = tl.load(gate_ptr + size, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded before the product, as the two operations of torch do.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    product = (silu * up.to(tl.float32)).to(gate.dtype)
    tl.store(product_ptr + row * size + columns, product, mask=inside)
