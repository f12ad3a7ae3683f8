"""Which rank this is, and how ranks wait for each other; all of it holds for one process too."""

import time

import torch.distributed as dist

LOOK_EVERY_S = 0.02


def is_distributed() -> bool:
    """Returns whether several ranks are connected."""
    return dist.is_available() and dist.is_initialized()


def rank_and_count() -> tuple[int, int]:
    """Returns this rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_rank_zero() -> bool:
    """Returns whether this is the rank that writes."""
    return rank_and_count()[0] == 0


def group_store() -> dist.Store | None:
    """Returns the process group's own key-value store, None without a group."""
    # torch has no public name for it.
    return dist.distributed_c10d._get_default_store() if is_distributed() else None


def leave_together() -> None:
    """Waits for the others before this process ends: rank 0's end is the end of the store."""
    barrier()
    if is_distributed():
        dist.barrier()


def barrier() -> None:
    """Waits for the other ranks, if there are any, for as long as they take.

    A collective would end in a time-out (10 minutes with NCCL) while one rank still draws its last
    part or selects. A rank that has died is the launcher's business: torchrun and srun end the
    others, see scripts/launch.sbatch.
    """
    store = group_store()
    if store is None:
        return
    num_ranks = dist.get_world_size()
    arrival = store.add("restem/barrier", 1)
    all_are_here = -(-arrival // num_ranks) * num_ranks
    while store.add("restem/barrier", 0) < all_are_here:
        time.sleep(LOOK_EVERY_S)
