"""All operations of the sampler for the CPU, in torch; each is defined in `reference`.

Attention and cache writes take a `Pass`, which `prepare` makes of a work list once for all layers.
"""

import torch
from torch import Tensor

from restem_kernels.cpu_attention import Pass, block_attention, prepare, tile_rows, write_kv
from restem_kernels.cpu_sampling import sample_tokens
from restem_kernels.reference import gated_silu

__all__ = [
    "add_rms_norm",
    "block_attention",
    "gated_silu",
    "prepare",
    "rotate_and_write",
    "sample_tokens",
    "tile_rows",
    "write_kv",
]


def add_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Does what `reference.add_rms_norm` does."""
    total = x if residual is None else x + residual
    wide = total.float()
    # A norm over the last dimension has fewer passes than a square and a mean.
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]
    normed = (wide * mean_square.add_(eps).rsqrt_()).to(x.dtype)
    return normed.mul_(weight), total


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    ready: Pass,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Does what `reference.rotate_and_write` does; queries and keys are rotated together."""
    num_key_heads, size = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, size))
    num_heads = heads.shape[1] - 2 * num_key_heads
    turned, values = heads[:, :-num_key_heads], heads[:, -num_key_heads:]
    if q_norm is not None and k_norm is not None:
        weight = torch.cat(
            [q_norm.expand(num_heads, -1), k_norm.expand(num_key_heads, -1)]
        )  # [H + K, D]
        turned, _ = add_rms_norm(turned, weight, eps=eps)
    half = size // 2
    if ready.rotation is None:  # the same in all layers; both halves of a row are equal
        positions = ready.work.positions
        ready.rotation = tuple(
            table[:, :half].index_select(0, positions)[:, None] for table in (cos, sin)
        )
    cos, sin = ready.rotation
    low, high = turned.split(half, -1)
    rotated = torch.empty(turned.shape, dtype=turned.dtype)
    torch.mul(low, cos, out=rotated[..., :half]).sub_(high * sin)
    torch.mul(high, cos, out=rotated[..., half:]).add_(low * sin)
    write_kv(rotated[:, num_heads:], values, key_cache, value_cache, ready)
    return rotated[:, :num_heads]
