"""Stopping a run from outside: a signal or the clock sets a flag, ranks agree where it is safe."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.loop.ranks import group_store, rank_and_count

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: all is saved and the same command goes on; launch.sbatch requeues.
STOPPED_STATUS = 75
# Of a rank that only follows another one. srun reports the highest status, so this one never hides
# why the other has ended; above all it does not have the job requeued.
LEFT_STATUS = 1
STORE_KEY = "restem/stop"
ASK_EVERY_S = 1.0


class Stopped(Exception):
    """All ranks have agreed to stop, and what they had is saved."""


class StopRequest:
    """Whether the run shall stop. Signal handlers do nothing but set a flag here."""

    def __init__(self, *, reserve_s: float) -> None:
        """Reads when the allocation ends.

        Args:
            reserve_s: seconds before the end of the SLURM allocation at which the run shall stop.

        Raises:
            UserError: reserve_s is below 0, or leaves nothing of the allocation.
        """
        if reserve_s < 0:
            raise UserError(f"walltime_reserve_s ({reserve_s}) must be at least 0")
        # Of the allocation, not from our start on: what ran before us has used up some of it.
        end = os.environ.get("SLURM_JOB_END_TIME")
        self.deadline = float(end) - reserve_s if end else None
        if self.deadline is not None and self.deadline <= time.time():
            raise UserError(
                f"walltime_reserve_s ({reserve_s:g}) must be less than what is left of the "
                f"allocation ({float(end) - time.time():.0f} s); lower it or ask for more time"
            )
        self.signum: int | None = None
        self.is_patient = False
        self._is_asked, self._asked_at = False, 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over.

        Again in the M-step: there Lightning wraps a handler around ours that calls a collective
        (lightning 2.6.6: `_sigterm_notifier_fn`).
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def uninstall(self) -> None:
        """Gives the signals back; a rank among several ends now, deaf to what launchers send.

        srun sends SIGTERM to the others when the first has ended, and a rank that dies of it would
        hide the status of a stopped run.
        """
        _, num_ranks = rank_and_count()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if num_ranks > 1 else handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        """Sets the flag; raises before the first boundary, or when Ctrl-C is pressed twice."""
        is_second = signum == signal.SIGINT and self.signum == signal.SIGINT
        self.signum = signum
        if is_second or not self.is_patient:
            raise KeyboardInterrupt

    def is_here(self) -> bool:
        """Returns whether this rank was told to stop, or the time is up."""
        is_late = self.deadline is not None and time.time() >= self.deadline
        return self.signum is not None or is_late

    def is_leaving(self) -> bool:
        """Returns whether a launcher may kill this process soon: torchrun does 30 s after these.

        After SIGUSR1, or when the time is nearly up, there is time to wait for a slow rank.
        """
        return self.signum in (signal.SIGINT, signal.SIGTERM)

    def is_asked(self) -> bool:
        """Returns whether any rank wants to stop, as soon as this one can know; no rank waits."""
        store = group_store()
        if store is None or self._is_asked:
            return self._is_asked or self.is_here()
        if self.is_here():
            self._is_asked = True
            store.set(STORE_KEY, "1")
        elif time.monotonic() - self._asked_at > ASK_EVERY_S:
            self._asked_at = time.monotonic()
            self._is_asked = store.check([STORE_KEY])
        return self._is_asked

    @property
    def status(self) -> int:
        """Exit status of a stopped run: 130 after Ctrl-C, else STOPPED_STATUS."""
        return 128 + signal.SIGINT if self.signum == signal.SIGINT else STOPPED_STATUS

    @property
    def reason(self) -> str:
        """What asked for it, in a word or two."""
        if self.signum is not None:
            return signal.Signals(self.signum).name
        return "the end of the allocation" if self.is_here() else "another rank"
