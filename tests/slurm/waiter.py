"""Uses up an allocation, so that no test needs work of just the right length."""

import os
import time

from lightning.pytorch import Callback


class WaitForTheReserve(Callback):
    """Waits in the third optimizer step until the reserve begins, in a job's first start only.

    Goes by class path into `trainer.callbacks`.
    """

    def __init__(self, reserve_s: float):
        self.reserve_s = reserve_s

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            end = float(os.environ["SLURM_JOB_END_TIME"]) - self.reserve_s
            time.sleep(max(0.0, end - time.time()) + 0.1)
