"""A verifier whose process ends at the first completion of an E-step, once."""

import os
import signal
from pathlib import Path

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.verifiers.composed import ITERATION


class DyingVerifier:
    """CORRECT for every other length of a completion.

    Args:
        died: path of the file that keeps it from a second time.
    """

    name, version = "dying", "1"

    def __init__(self, died: str):
        self.died = Path(died)

    def verify(self, problem, completion_text):
        if ITERATION in problem.metadata and not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        kinds = (VerdictKind.CORRECT, VerdictKind.WRONG)
        return Verdict(kind=kinds[len(completion_text) % 2])

    def reference_completion(self, problem):
        return None
