"""What lets a training be stopped and gone on with; the M-step's and the learned verifier's."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from restem_lightning.loop.stop_request import Stopped, StopRequest


class StoppableTraining(Callback):
    """Stops behind an optimizer step, with a checkpoint there; beside `stop_callbacks`'s own."""

    def __init__(self, stop: StopRequest, folder: Path):
        """Stops nothing yet.

        Args:
            stop: asked behind each optimizer step.
            folder: of the checkpoints.
        """
        self.stop, self.folder = stop, folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops before anything is loaded."""
        stop_if_asked(trainer, self.stop)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes signals back: Lightning has wrapped our handlers by now."""
        self.stop.install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and stops behind an optimizer step if that was asked for.

        Not where a look at D_val or the end of the epoch is due: a checkpoint from before it
        would make the resumed run leave it out. It writes one itself.
        """
        if is_amid_epoch(trainer, batch_idx) and _is_agreed(trainer, self.stop):
            name = f"last-{trainer.global_step}.ckpt"  # what `resume_checkpoint` looks for
            trainer.save_checkpoint(self.folder / name)
            raise Stopped

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a run folder be moved: Lightning forgets the best weights of another folder."""
        here = self.folder.resolve()
        for state in checkpoint["callbacks"].values():
            if Path(state.get("dirpath", "")).parts[-2:] == here.parts[-2:]:
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = _moved(state[key], here)
                scores = state["best_k_models"].items()
                state["best_k_models"] = {_moved(path, here): score for path, score in scores}
                state["dirpath"] = str(here)


def stop_if_asked(trainer: Trainer, stop: StopRequest) -> None:
    """Stops all ranks if one of them wants to; every rank must call it.

    Raises:
        Stopped: one of them does.
    """
    if _is_agreed(trainer, stop):
        raise Stopped


def is_amid_epoch(trainer: Trainer, batch_idx: int) -> bool:
    """Returns whether neither a look at D_val nor the end of the epoch follows a batch."""
    if trainer.val_check_batch is None:  # looks by the clock: any may be the next
        return False
    num_done = batch_idx + 1 if trainer.check_val_every_n_epoch else trainer.global_step
    is_look_due = num_done % trainer.val_check_batch == 0
    return not is_look_due and batch_idx + 1 < trainer.num_training_batches


def _is_agreed(trainer: Trainer, stop: StopRequest) -> bool:
    """Returns on every rank whether one of them wants to stop."""
    return trainer.strategy.reduce_boolean_decision(stop.is_here(), all=False)


def _moved(path: str, folder: Path) -> str:
    """Returns where a file is now that its folder is this one; an empty path stays empty."""
    return path and str(folder / Path(path).name)
