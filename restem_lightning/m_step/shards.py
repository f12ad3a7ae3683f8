"""What a rank holds of a parameter that FSDP2 and tensor parallelism may have cut."""

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


def local_index(tensor: Tensor) -> tuple[slice, ...]:
    """Returns where this rank's part is in the whole tensor.

    The last dimension of the mesh (tensor parallelism) cuts first and FSDP2 cuts what that leaves,
    each as torch.chunk does.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for axis, placement in reversed(list(enumerate(tensor.placements))):
            if placement.is_replicate():
                continue
            start, stop = bounds[placement.dim]
            size = math.ceil((stop - start) / mesh.size(axis))
            first = min(stop, start + mesh.get_local_rank(axis) * size)
            bounds[placement.dim] = (first, min(stop, first + size))
    return tuple(slice(*each) for each in bounds)
