"""Copies of a run folder as a kill would leave it, taken at given moments of an M-step."""

import shutil
from pathlib import Path

from lightning.pytorch import Callback


class Snapshots(Callback):
    """Copies the run folder at moments of each M-step; goes by class path into `trainer.callbacks`.

    It stands before the loop's own callbacks, so `train_end` lies before the export and `fit_end`
    before the evaluation of the new policy.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_fit_start(self, trainer, pl_module):
        self.take(trainer, "fit_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            self.take(trainer, "optimizer_step_3")

    def on_train_end(self, trainer, pl_module):
        self.take(trainer, "train_end")

    def on_fit_end(self, trainer, pl_module):
        self.take(trainer, "fit_end")

    def take(self, trainer, moment):
        iteration = Path(trainer.default_root_dir).parent
        target = self.folder / f"{iteration.name}_{moment}"
        if not target.exists():
            shutil.copytree(iteration.parent, target)
