"""When an M-step stops, and which of its checkpoints becomes the policy."""

from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from restem_lightning.errors import UserError
from restem_lightning.m_step.checkpoints import is_whole, remove_checkpoints

StopRule = Literal["first_drop", "best", "none"]


class _StopAtFirstDrop(EarlyStopping):
    """EarlyStopping whose decision outlives a kill: Lightning restores the count, not the stop."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops at once if the checkpoint was written at the check that ended the M-step."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class _Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that leaves it to `_Last` to remove what a newer checkpoint replaces."""

    @property
    def state_key(self) -> str:
        """That of Lightning's own, so that a checkpoint of before is still understood."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Removes nothing: after a kill, what is resumed from may still name it as the best."""


class _Last(_Checkpoint):
    """Writes what to resume from, then removes all else but the best; what was resumed from too."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves and removes."""
        super().on_validation_end(trainer, pl_module)
        if trainer.is_global_zero:
            ours = [one for one in trainer.checkpoint_callbacks if isinstance(one, _Checkpoint)]
            needed = {Path(one.best_model_path).name for one in ours}
            if newest := resume_checkpoint(self.dirpath):
                needed.add(newest.name)
            remove_checkpoints(Path(self.dirpath), but=needed)


def stop_callbacks(
    rule: StopRule,
    *,
    patience: int = 1,
    folder: str | Path,
    monitor: str = "val_reward",
) -> list[Callback]:
    """Returns Lightning's callbacks for a stop rule; all act at the end of each validation.

    The `ModelCheckpoint` with a monitor keeps the best weights (`best_model_path`, a file
    best-<step>.ckpt); the other keeps last-<step>.ckpt to resume from (see `resume_checkpoint`).
    File names carry the step so that a new checkpoint is complete before the old one goes, and the
    old best one goes last: a checkpoint to resume from never names weights that are not there.

    Args:
        rule: "first_drop" stops at the check that makes `patience` checks in a row without
            improvement (arXiv 2312.06585, algorithm 1) and "best" runs to the end; both use the
            best weights. "none" runs to the end and uses the last weights.
        patience: checks, at least 1; for "first_drop" only.
        folder: where the checkpoints go; one for each M-step.
        monitor: metric to maximise, logged at the end of validation.

    Raises:
        UserError: if rule or patience is not allowed.
    """
    if rule not in ("first_drop", "best", "none"):
        raise UserError(f"stop rule ({rule}) must be first_drop, best or none; choose one")
    if patience < 1:
        raise UserError(f"patience ({patience}) must be at least 1 check; raise it")
    last = _Last(
        dirpath=folder,
        filename="last-{step}",
        auto_insert_metric_name=False,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    if rule == "none":
        return [last]
    best = _Checkpoint(
        dirpath=folder,
        filename="best-{step}",
        monitor=monitor,
        mode="max",
        save_weights_only=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    # The last checkpoint is written last, so that it holds the others' state after this check.
    if rule == "best":
        return [best, last]
    stop = _StopAtFirstDrop(monitor, mode="max", patience=patience, check_on_train_epoch_end=False)
    return [stop, best, last]


def best_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """Returns the callback of `stop_callbacks` that keeps the best weights, None for rule "none".

    A user's own ModelCheckpoint is none of ours, whatever it monitors.
    """
    ours = (one for one in trainer.checkpoint_callbacks if isinstance(one, _Checkpoint))
    return next((one for one in ours if one.monitor), None)


def resume_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete last-<step>.ckpt of a killed M-step, None if there is none."""
    complete = [
        path
        for path in Path(folder).glob("last-*.ckpt")
        if is_whole(path) and (path.is_file() or (path / "meta.pt").is_file())
    ]
    return max(complete, key=lambda path: int(path.stem.removeprefix("last-")), default=None)
