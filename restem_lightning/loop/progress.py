"""Progress: what has come out of a stage so far, on the screen and on the clock."""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from restem_lightning.completions import Completion, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.loop.ranks import is_rank_zero
from restem_lightning.run_dir import read_json, write_json

MIN_VERDICTS_FOR_ALARM = 200
LINE_EVERY_S = 60.0
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt} completions, {remaining} left{postfix}"


@dataclass(kw_only=True)
class Progress:
    """What has come out of a sampling stage so far, on this rank."""

    num_completions: int = 0
    num_correct: int = 0
    num_tokens: int = 0
    verdicts: Counter = field(default_factory=Counter)

    def add(self, completion: Completion) -> None:
        """Counts one more completion."""
        self.num_completions += 1
        self.num_correct += completion.verdict.kind is VerdictKind.CORRECT
        self.num_tokens += len(completion.completion_ids)
        self.verdicts[completion.verdict.kind.value] += 1

    def summary(self, seconds: float) -> str:
        """Returns the rates so far in a few words."""
        return (
            f"{self.num_tokens / seconds:.0f} tokens/s, "
            f"correct {100 * self.num_correct / self.num_completions:.1f} %"
        )

    def check(self, max_error_rate: float, last: Completion) -> None:
        """Stops a run whose verifier is broken.

        Raises:
            UserError: too many verdicts are ERROR.
        """
        errors = self.verdicts[VerdictKind.ERROR.value]
        if (
            self.num_completions >= MIN_VERDICTS_FOR_ALARM
            and errors > max_error_rate * self.num_completions
        ):
            raise UserError(
                f"the verifier is broken: {errors} of {self.num_completions} verdicts are ERROR "
                f"(more than e_step.max_error_rate {max_error_rate}); the last one says: "
                f"{last.verdict.detail}"
            )


class Bar(tqdm):
    """Progress on rank 0: a bar on a terminal, else a plain line a minute."""

    def __init__(self, title: str, total: int):
        """Shows nothing yet.

        Args:
            title: of the stage.
            total: completions that it will have drawn; may be lowered as it goes on.
        """
        self._is_bar = sys.stderr.isatty()
        every_s = 0.1 if self._is_bar else LINE_EVERY_S
        super().__init__(
            desc=title,
            total=total,
            unit="completion",
            disable=not is_rank_zero(),
            mininterval=every_s,
            maxinterval=max(every_s, 10.0),
            delay=0.0 if self._is_bar else every_s,
            bar_format=None if self._is_bar else LINE_FORMAT,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Shows the current state; called by tqdm."""
        if self._is_bar:
            return super().display(msg, pos)
        print(str(self) if msg is None else msg, file=sys.stderr)
        return True


class Stopwatch:
    """Adds wall-clock seconds to a stage in seconds.json; a resumed stage goes on counting."""

    def __init__(self, path: Path, stage: str):
        """Starts the clock.

        Args:
            path: of seconds.json.
            stage: its key there.
        """
        self.path, self.stage, self.last = path, stage, time.monotonic()

    def lap(self) -> None:
        """Writes the time since the last lap down, so that a kill costs no more than a lap."""
        now = time.monotonic()
        if is_rank_zero():
            record = read_json(self.path) if self.path.exists() else {}
            record[self.stage] = round(record.get(self.stage, 0.0) + now - self.last, 3)
            write_json(self.path, record)
        self.last = now
