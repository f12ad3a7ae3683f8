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

    def save(self, blocks: list[int]) -> Tensor:
        """Returns a copy of blocks in host memory, [2 * num_layers, blocks, K, S, D]."""
        layers = [*self.keys, *self.values]
        index = torch.tensor(blocks, dtype=torch.int64, device=layers[0].device)
        return torch.stack([layer[index] for layer in layers]).cpu()

    def restore(self, saved: Tensor, blocks: list[int]) -> None:
        """Writes saved blocks to new places."""
        layers = [*self.keys, *self.values]
        index = torch.tensor(blocks, dtype=torch.int64, device=layers[0].device)
        for layer, kept in zip(layers, saved.to(index.device), strict=True):
            layer[index] = kept
