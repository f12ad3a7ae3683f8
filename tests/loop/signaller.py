"""Sends this process a signal at a given moment of an iteration, once."""

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class Signaller(Callback):
    """Goes by class path into `trainer.callbacks`; the file `sent` keeps it from a second time.

    Args:
        sent: path of that file.
        moment: a hook's name.
        optimizer_step: with on_train_batch_start or on_train_batch_end, the step.
        signum: the signal.
    """

    def __init__(
        self, sent: str, moment: str, optimizer_step: int | None = None, signum: str = "SIGUSR1"
    ):
        self.sent, self.moment, self.optimizer_step = Path(sent), moment, optimizer_step
        self.signum = signal.Signals[signum]

    def on_train_batch_start(self, trainer, *_):
        self.send("on_train_batch_start", trainer.global_step)

    def on_train_batch_end(self, trainer, *_):
        self.send("on_train_batch_end", trainer.global_step)

    def on_validation_start(self, trainer, *_):
        self.send("on_validation_start")

    def on_train_end(self, *_):
        self.send("on_train_end")

    def on_fit_end(self, *_):
        self.send("on_fit_end")

    def send(self, moment, step=None):
        if moment == self.moment and step == self.optimizer_step and not self.sent.exists():
            self.sent.touch()
            os.kill(os.getpid(), self.signum)
