"""Arms: what each is, as a command line of `restem fit`, and running them all, resumably."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.run_dir import RunDir, read_json, sha256_of, write_json

POLL_EVERY_S = 0.1
_OWN = ("--run_dir", "--seed_everything", "--e_step.pool_cache")  # settings that compare gives


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, or one choice of settings.

    Args:
        configs: YAML files of `restem fit`, behind those of all arms.
        settings: dotted key -> value, behind all configs and behind the settings of all arms.
    """

    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm with one seed.

    Args:
        arm: its name.
        seed: its seed.
        folder: its run folder; log, lock and the note of what finished lie beside it.
        words: of `restem fit`, the run folder among them.
    """

    arm: str
    seed: int
    folder: Path
    words: tuple[str, ...]

    def is_finished(self) -> bool:
        """Returns whether the very same command, with the same configs, has run to its end."""
        done = self._beside(".done.json")
        is_there = done.exists() and RunDir(self.folder).run_json.exists()
        return is_there and read_json(done) == self._record()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts or goes on with the run in a process and session of its own.

        Raises:
            UserError: an earlier process is still at it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "restem_lightning", *self.words]
        with open(self._beside(".lock"), "w") as lock, open(self.log, "ab") as log:
            try:  # the child inherits the lock, so it outlives a killed `restem compare`
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} is being worked on by another process") from None
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C comes once, from us
            )

    def finish(self) -> None:
        """Notes that the run needs no more work."""
        write_json(self._beside(".done.json"), self._record())

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self._beside(".log")

    def last_words(self) -> str:
        """Returns the last line of the log: what went wrong, if something has."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return next(
            (line.strip() for line in reversed(lines) if line.strip()), "it printed nothing"
        )

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def _record(self) -> dict[str, Any]:
        configs = [b for a, b in zip(self.words, self.words[1:], strict=False) if a == "--config"]
        return {
            "words": list(self.words),
            "configs": {path: sha256_of(path) for path in configs if Path(path).is_file()},
        }


def plan_runs(
    arms: dict[str, Arm],
    *,
    seeds: Sequence[int],
    configs: Sequence[str],
    settings: dict[str, Any],
    output: Path,
) -> list[ArmRun]:
    """Returns the runs of all arms, seed by seed, so that an early stop leaves whole seeds.

    Args:
        arms: by name.
        seeds: each arm runs with each.
        configs: YAML files before those of every arm.
        settings: dotted key -> value, behind the configs of every arm.
        output: folder of the comparison.

    Raises:
        UserError: an arm sets what the comparison sets itself.
    """
    runs = []
    for seed in seeds:
        for name, arm in arms.items():
            folder = output / name / f"seed_{seed}"
            words = ["fit"]
            for config in (*configs, *arm.configs):
                words += ["--config", config]
            words += _words({**settings, **arm.settings})
            for key in _OWN:
                if any(word.partition("=")[0] == key for word in words):
                    raise UserError(f"arms.{name} sets {key[2:]}, which compare sets; remove it")
            own = (str(folder), str(seed), str(output / "pools"))
            words += [f"{key}={value}" for key, value in zip(_OWN, own, strict=True)]
            runs.append(ArmRun(arm=name, seed=seed, folder=folder, words=tuple(words)))
    return runs


def run_all(runs: Sequence[ArmRun], *, jobs: int, say: Callable[[str], None]) -> dict[ArmRun, str]:
    """Runs what is not finished, at most `jobs` at a time; returns the reasons of those that fail.

    However this ends, the processes that it started are asked to save and stop, and waited for.

    Args:
        runs: in the order to start them.
        jobs: processes at a time.
        say: takes a line of progress.
    """
    waiting = deque(run for run in runs if not run.is_finished())
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    running: dict[ArmRun, subprocess.Popen[bytes]] = {}
    failed: dict[ArmRun, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                try:
                    running[run] = run.start()
                except UserError as error:
                    failed[run] = str(error)
            for run, status in _ended(running):
                if status == 0:
                    run.finish()
                else:
                    failed[run] = f"exit status {status}: {run.last_words()}"
                num_left = len(waiting) + len(running)
                say(f"{run.arm}, seed {run.seed}: {failed.get(run, 'done')} ({num_left} runs left)")
            time.sleep(POLL_EVERY_S)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def limit_threads(jobs: int) -> None:
    """Shares the cores among `jobs` processes started from here, unless the user has said how."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


def _ended(running: dict[ArmRun, subprocess.Popen[bytes]]) -> Iterator[tuple[ArmRun, int]]:
    """Yields the processes that have ended with their exit status, and forgets them."""
    for run, process in list(running.items()):
        if process.poll() is not None:
            del running[run]
            yield run, process.returncode


def _words(settings: dict[str, Any]) -> list[str]:
    """Returns settings as words of a command line; what is no text is JSON."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]
