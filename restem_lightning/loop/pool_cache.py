"""Pools that runs share: what one of them has drawn, the others with the same pool key link."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.ranks import barrier, is_distributed, is_rank_zero
from restem_lightning.run_dir import TEMP_SUFFIX, atomic_path, settings_hash, write_json

SHARED_JSON = "shared.json"  # in a pool that was linked: from where


@contextmanager
def shared_pool(
    cache: str | None,
    store: CompletionStore,
    key: dict[str, Any],
    *,
    num_parts: int,
    is_leaving: Callable[[], bool] = bool,
) -> Iterator[None]:
    """Links a store's parts from the cache if they are there; else the block draws them for it.

    Runs that want the same pool at the same time do not draw it twice: one draws, the others wait
    for it. If it is killed, its lock is gone with it and the next one draws. (Several ranks do not
    wait: the others of the process group would run into its timeout.)

    Args:
        cache: folder of the cache, made if missing; None for none, then only the block runs.
        store: of this run, bound to its key already; what it holds itself is never replaced.
        key: all that determines the pool.
        num_parts: of the whole pool; a store that has fewer afterwards is not given to others.
        is_leaving: asked where ranks wait for each other, see `any_rank`.
    """
    if cache is None:
        yield
        return
    pool = Path(cache) / settings_hash(key)
    with _locked(pool):
        if is_rank_zero() and pool.exists() and not store.parts():
            _link_parts(pool, store.folder)
            write_json(store.folder / SHARED_JSON, {"from": str(pool)})
        barrier(is_leaving)
        yield
        if len(store.parts()) == num_parts and not pool.exists():  # the last rank sees them all
            _publish(store.folder, pool)


def is_shared(store: CompletionStore) -> bool:
    """Returns whether another run has drawn this pool."""
    return (store.folder / SHARED_JSON).exists()


@contextmanager
def _locked(pool: Path) -> Iterator[None]:
    """Holds the lock of a pool; the system releases it when this process ends, however it does."""
    if is_distributed():
        yield
        return
    pool.parent.mkdir(parents=True, exist_ok=True)
    with open(pool.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(folder: Path, pool: Path) -> None:
    """Puts a finished pool into the cache, whole or not at all."""
    temporary = pool.with_name(f".{pool.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
    _link_parts(folder, temporary)
    try:
        temporary.rename(pool)
    except OSError:  # another run was faster; the two are equal
        shutil.rmtree(temporary)


def _link_parts(source: Path, target: Path) -> None:
    """Gives a folder all parts of another; files are only ever replaced, so links are safe."""
    target.mkdir(parents=True, exist_ok=True)
    entries = sorted(source.glob("part-*.json"))
    for path in (*(entry.with_suffix(".parquet") for entry in entries), *entries):  # entries last
        try:
            os.link(path, target / path.name)
        except OSError:  # another disk, one without links, or a file that a killed run left
            with atomic_path(target / path.name) as temporary:
                shutil.copyfile(path, temporary)
