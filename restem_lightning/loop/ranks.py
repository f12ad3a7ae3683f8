"""Which rank this is, and how ranks wait for each other; all of it holds for one process too."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from restem_lightning.errors import UserError

LOOK_EVERY_S = 0.02
LOST_AFTER_S = 10.0  # torchrun and srun kill 30 s after SIGTERM
ROLL_CALL_S = 2.0
# NFS looks for another node's files anew after 60 s (acdirmax) unless its mount says otherwise.
SEEN_WITHIN_S = 120.0


class LostRank(Exception):
    """Another rank does not come to where this one waits for it."""


def is_of_lost_rank(error: BaseException) -> bool:
    """Returns whether an error says that another rank is gone."""
    # Of gloo a plain RuntimeError comes, which names a source file of it.
    return isinstance(error, (LostRank, dist.DistError)) or "/gloo/" in str(error)


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


def roll_call() -> tuple[int, str]:
    """Returns the lowest rank that answers, and who does not, with their nodes; may be empty.

    For ranks that have found out that one is lost; all must come within ROLL_CALL_S, or have come
    to `any_rank` since they are leaving.
    """
    store = group_store()
    if store is None:
        return 0, ""
    rank, num_ranks = rank_and_count()
    try:
        store.set(f"restem/answer/{rank}", "")
        time.sleep(ROLL_CALL_S)
        answers = [store.check([f"restem/answer/{other}"]) for other in range(num_ranks)]
        lost = [other for other in range(num_ranks) if not answers[other]]
        named = [_named(store, other) for other in lost]
    except dist.DistError:  # the store is gone, and with it rank 0, where it was
        return 1, f"rank 0 (node {os.environ.get('MASTER_ADDR')})"
    return answers.index(True), " and ".join(named)


def _named(store: dist.Store, rank: int) -> str:
    """Returns a rank with its node, if it has ever said that."""
    key = f"restem/node/{rank}"
    return f"rank {rank}" + (f" (node {store.get(key).decode()})" if store.check([key]) else "")


def wait_for_files(folder: Path, names: set[str]) -> None:
    """Waits until this node lists what other ranks have written before the last barrier.

    Raises:
        UserError: it does not within SEEN_WITHIN_S; mostly the ranks' disks are not one.
    """
    end = time.monotonic() + SEEN_WITHIN_S
    while missing := names - {path.name for path in folder.glob("*")}:
        if time.monotonic() > end:
            raise UserError(
                f"{folder / min(missing)} was written by another rank, and {_node()} has not seen "
                f"it for {SEEN_WITHIN_S:g} s; give a --run_dir on a disk that all nodes share"
            )
        time.sleep(LOOK_EVERY_S)


def _node() -> str:
    """Returns this node's name, as SLURM calls it if it is there."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def leave_together(is_leaving: Callable[[], bool]) -> None:
    """Waits for the others before this process ends: rank 0's end is the end of the store.

    Args:
        is_leaving: as for `any_rank`.

    Raises:
        LostRank: as `any_rank`.
    """
    barrier(is_leaving)
    if is_distributed():
        dist.barrier()


def barrier(is_leaving: Callable[[], bool], written: Path | None = None) -> None:
    """Waits for the other ranks, if there are any.

    Args:
        is_leaving: as for `any_rank`.
        written: a file of another rank's that must be seen here too, see `wait_for_files`.

    Raises:
        LostRank: as `any_rank`.
        UserError: as `wait_for_files`.
    """
    any_rank(False, is_leaving)
    if written is not None:
        wait_for_files(written.parent, {written.name})


def is_missing(path: Path, is_leaving: Callable[[], bool]) -> bool:
    """Returns on every rank whether rank 0 misses a file: nodes may see it at other times.

    Args:
        path: of the file.
        is_leaving: as for `any_rank`.

    Raises:
        LostRank: as `any_rank`.
    """
    return any_rank(is_rank_zero() and not path.exists(), is_leaving)


def any_rank(is_so: bool, is_leaving: Callable[[], bool]) -> bool:
    """Returns on every rank whether it is so on one of them; each waits for the others.

    A collective would end in a time-out (10 minutes with NCCL) while one rank still draws its last
    part or selects. A rank that has died is the launcher's business: torchrun and srun send the
    others SIGTERM, see scripts/launch.sbatch.

    Args:
        is_so: this rank's answer.
        is_leaving: whether this process will soon be killed (`StopRequest.is_leaving`); then it
            does not wait for long.

    Raises:
        LostRank: it is leaving, and another rank has not come in LOST_AFTER_S.
    """
    store = group_store()
    if store is None:
        return is_so
    rank, num_ranks = rank_and_count()
    store.set(f"restem/node/{rank}", _node())
    meeting = (store.add("restem/arrivals", 1) - 1) // num_ranks
    store.add(f"restem/votes/{meeting}", int(is_so))
    here = f"restem/here/{meeting}"
    num_here = store.add(here, 1)
    if is_leaving():  # in time for the roll call of those that have waited for longer
        store.set(f"restem/answer/{rank}", "")
    last_patient = time.monotonic()
    while num_here < num_ranks:
        time.sleep(LOOK_EVERY_S)
        if not is_leaving():
            last_patient = time.monotonic()
        elif time.monotonic() - last_patient > LOST_AFTER_S:
            raise LostRank(f"{num_ranks - num_here} of {num_ranks} ranks did not come")
        num_here = store.add(here, 0)
    return store.add(f"restem/votes/{meeting}", 0) > 0
