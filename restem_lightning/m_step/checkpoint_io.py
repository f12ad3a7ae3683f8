"""How a checkpoint of one file gets to disk."""

from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from restem_lightning.run_dir import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it.

    Lightning 2.6 makes a copy in memory, writes that to TMPDIR and moves it, which between two file
    systems is a copy that a kill cuts off; where TMPDIR is full, no error says so.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: the file cannot be written.
        """
        with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch 2.13 hides the system's error behind its own
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
