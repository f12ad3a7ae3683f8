"""What a rank holds of a parameter that FSDP2 may have sharded."""

import math

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor gathered from all ranks, which must all call, or as it is if not sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part, a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Returns the rows that this rank holds: FSDP2 cuts the first dimension as torch.chunk does."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    size = math.ceil(len(tensor) / tensor.device_mesh.size())
    first = min(len(tensor), tensor.device_mesh.get_local_rank() * size)
    return slice(first, min(len(tensor), first + size))
