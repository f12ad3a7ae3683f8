"""Generated problems with their own checkers: every task of the reasoning-gym library.

Some tasks iterate over sets, so their problems depend on Python's hash seed: problems are generated
in a process of their own with a fixed one, which the verifiers' processes have too.
"""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.problems.records import Problem

SEED_STRIDE = 1_000_000


class ReasoningGym:
    """Generated problems with their own checkers (the reasoning-gym library, arXiv 2505.24760)."""

    def __init__(
        self,
        task: str | None = None,
        *,
        seed: int,
        num: int,
        split: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        """Generates problems of one reasoning-gym task (needs the `reasoning-gym` library).

        Args:
            task: name of the task, e.g. chain_sum; null for that of `problems.task`.
            seed: another one for each split; problem i has the library's seed `seed * 1000000 + i`
                (the library itself shares all problems but one between neighbouring seeds).
            num: how many problems, at least 1.
            split: what the problems' `split` shall say.
            config: further settings of the task, by their names there.

        Raises:
            UserError: no task is named.
        """
        if task is None:
            raise UserError("task (null) must be a reasoning-gym task; set problems.task")
        self._task, self._seed, self._num, self._split = task, seed, num, split
        self._config = config or {}

    def load(self) -> list[Problem]:
        """Returns the problems with ids such as chain_sum/7/0 (task, seed, index).

        `metadata` says how to generate the entry again, and holds it if JSON keeps it unchanged.

        Raises:
            UserError: the library is missing, does not know the task or its settings, or fails.
        """
        # A user's mistake shows here, not as a process that failed.
        reasoning_gym_dataset(self._task, self._seed, 1, self._config)
        wanted = json.dumps([self._task, self._seed, self._num, self._split, self._config])
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        done = subprocess.run(
            [sys.executable, "-m", "restem_lightning.problems.procedural", wanted],
            env=dict(os.environ, PYTHONHASHSEED="0", PYTHONPATH=paths),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.splitlines() or ["killed"])[-1]
            raise UserError(f"no problems of reasoning-gym task {self._task!r}: {reason}")
        return [Problem(**fields) for fields in json.loads(done.stdout)]


def generate(
    task: str, seed: int, num: int, split: str, config: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the fields of problems as this process generates them."""
    data = reasoning_gym_dataset(task, seed, num, config)
    return [_fields(data[index], task, seed, num, index, split, config) for index in range(num)]


def reasoning_gym_dataset(task: str, seed: int, size: int, config: dict[str, Any]) -> Any:
    """Returns reasoning-gym's data set object: indexable, with `score_answer(answer, entry)`.

    Raises:
        UserError: the library is missing, or does not know the task or the settings.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"task {task!r} needs `pip install reasoning-gym` ({error})") from error
    try:
        return reasoning_gym.create_dataset(task, seed=seed * SEED_STRIDE, size=size, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"reasoning_gym task {task!r} with config {config}: {error}") from error


def _fields(
    entry: dict[str, Any],
    task: str,
    seed: int,
    num: int,
    index: int,
    split: str,
    config: dict[str, Any],
) -> dict[str, Any]:
    place = {"task": task, "seed": seed, "size": num, "index": index, "config": config}
    answer = entry["answer"]
    return {
        "problem_id": f"{task}/{seed}/{index}",
        "question": entry["question"],
        "reference_answer": None if answer is None else str(answer),
        "split": split,
        "source": "reasoning_gym",
        "metadata": place | ({"entry": entry} if _survives_json(entry) else {}),
    }


def _survives_json(value: Any) -> bool:
    try:
        return repr(json.loads(json.dumps(value))) == repr(value)
    except (TypeError, ValueError):
        return False


if __name__ == "__main__":
    try:
        with redirect_stdout(sys.stderr):  # some tasks print while they generate
            problems = generate(*json.loads(sys.argv[1]))
    except UserError as error:
        sys.exit(str(error))
    json.dump(problems, sys.stdout)
