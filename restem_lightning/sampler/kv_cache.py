"""The tensors of the block KV cache."""

from torch import Tensor, device, dtype, zeros


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
        device: device,
        dtype: dtype,
    ):
        """Allocates the cache; each layer holds two tensors [blocks, key heads, block size, head size]."""
        shape = (num_blocks, num_key_heads, block_size, head_size)
        self.block_size, self.num_blocks = block_size, num_blocks
        # Zeros, not garbage: a masked NaN would still spoil a product.
        self.keys = [zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]

    def write(
        self, layer: int, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Stores keys and values [T, key heads, head size] at block and offset [T] int64."""
        self.keys[layer][blocks, :, offsets] = keys
        self.values[layer][blocks, :, offsets] = values
