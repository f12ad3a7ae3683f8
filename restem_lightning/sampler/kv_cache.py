"""The tensors of the block KV cache.

Shape legend: K key heads, D head size, S tokens in a block.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer in blocks of a fixed number of tokens."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_key_heads: int,
        block_size: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """Allocates the cache: for each layer two tensors [num_blocks, K, S, D]."""
        shape = (num_blocks, num_key_heads, block_size, head_size)
        self.block_size, self.head_shape = block_size, (num_key_heads, head_size)
        # Zeros, not garbage: a masked NaN would still spoil a product.
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
            for _ in range(2)
        )

    def per_head(self, blocks: Tensor) -> Tensor:
        """Returns [..., K, n] int64: for blocks [..., n] their places among all heads' blocks."""
        num_heads = self.head_shape[0]
        return (
            blocks[..., None, :] * num_heads
            + torch.arange(num_heads, device=blocks.device)[:, None]
        )

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [R, K, D] at slots [R * K]: place per head * S + offset."""
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached.view(-1, cached.shape[-1]).index_copy_(0, slots, new.flatten(0, 1))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [g, K, n * S, D] of the blocks [g, K, n], given per head."""
        return tuple(
            cached.flatten(0, 1)
            .index_select(0, blocks.flatten())
            .view(*blocks.shape[:2], -1, cached.shape[-1])
            for cached in (self.keys[layer], self.values[layer])
        )
