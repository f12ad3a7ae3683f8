"""Checkpoints on disk: whether one is whole, what a failed write raises, their removal."""

import pickle
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException


def is_whole(path: Path) -> bool:
    """Returns whether nothing of a checkpoint is missing at the end of a file.

    Args:
        path: a .ckpt file, or the folder that ModelParallelStrategy writes.
    """
    if path.is_file():
        return zipfile.is_zipfile(path)  # its index is at the end, so a truncated one has none
    # Weights alone have no meta.pt; where there is one, Lightning writes it last.
    meta = path / "meta.pt"
    if not (path / ".metadata").is_file() or (meta.exists() and not zipfile.is_zipfile(meta)):
        return False
    try:
        pieces = FileSystemReader(path).read_metadata().storage_data.values()
    except (EOFError, pickle.UnpicklingError):
        return False
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return all(sizes.get(one.relative_path, 0) >= one.offset + one.length for one in pieces)


def write_error(error: BaseException) -> str | None:
    """Returns what torch says of a checkpoint that it could not write; None for other errors.

    torch 2.11 to 2.13 lose the system's error: a full disk is a failed check of theirs.
    """
    is_of_folder = isinstance(error, CheckpointException)
    causes = [cause for cause, _ in error.failures.values()] if is_of_folder else [error]
    for cause in causes:
        is_of_writer = "inline_container" in str(cause) or "PytorchStreamWriter" in str(cause)
        if (is_of_folder and isinstance(cause, OSError)) or is_of_writer:
            return str(cause).splitlines()[0]
    return None


def remove_checkpoints(folder: Path, *, but: Collection[str] = ()) -> None:
    """Deletes what only a resumed training needs: it is several times the size of the policy.

    Args:
        folder: of the training.
        but: names of those to keep.
    """
    for path in folder.glob("*.ckpt"):
        if path.name in but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
