"""All operations of the sampler as Triton kernels; each is defined in `reference`."""

from torch import Tensor

from restem_kernels.activation import gated_silu
from restem_kernels.attention import block_attention, tile_rows
from restem_kernels.kv_cache import rotate_and_write, write_kv
from restem_kernels.norm import add_rms_norm
from restem_kernels.sampling import sample_tokens
from restem_kernels.work import Work

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


def prepare(work: Work, key_cache: Tensor) -> Work:
    """Returns the work list itself: kernels read it on the device."""
    return work
