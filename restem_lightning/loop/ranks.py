"""Which rank this is; all of it holds without a process group too."""

import torch.distributed as dist


def is_distributed() -> bool:
    """Returns whether several ranks are connected."""
    return dist.is_available() and dist.is_initialized()


def rank_and_count() -> tuple[int, int]:
    """Returns this rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_rank_zero() -> bool:
    """Returns whether this is the rank that writes."""
    return rank_and_count()[0] == 0


def barrier() -> None:
    """Waits for the other ranks, if there are any."""
    if is_distributed():
        dist.barrier()
