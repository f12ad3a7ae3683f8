"""Generated problems: the verdict is that of the reasoning-gym task's own checker."""

import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.problems.procedural import reasoning_gym_dataset
from restem_lightning.verifiers.math import (
    STOP_MARKS,
    check_answer_format,
    extract_answer,
    render_answer,
)


class ProceduralVerifier:
    """Judges answers to problems of `restem_lightning.problems.ReasoningGym`."""

    name = "procedural"

    def __init__(
        self,
        answer_format: str = "answer_tag",
        stop_marks: Sequence[str] = STOP_MARKS,
        partial_credit: bool = False,
    ) -> None:
        r"""Judges answers to problems of `restem_lightning.problems.ReasoningGym`.

        Args:
            answer_format: where the answer stands; the last one counts. answer_tag:
                `<answer>x</answer>`; gsm8k: `#### x`; boxed: `\boxed{x}`; final_answer: `The final
                answer is $x$. I hope it is correct.`; answer_is: `The answer is x.`; answer_line:
                `Answer: x` at the start of a line; auto: any of these, answer_is and answer_line
                only if there is no other.
            stop_marks: the completion is cut before the first of these.
            partial_credit: whether the reward is the task's own score, from 0 to 1, instead of 1
                for a full score only; CORRECT is a full score either way.

        Raises:
            UserError: an unknown answer_format, or reasoning-gym is not installed.
        """
        check_answer_format(answer_format)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("ProceduralVerifier needs `pip install reasoning-gym`")
        self._answer_format, self._stop_marks = answer_format, tuple(stop_marks)
        self._partial_credit = partial_credit
        self._datasets: dict[str, Any] = {}
        credit = "-partial" if partial_credit else ""
        self.version = f"1{credit}+reasoning-gym-{importlib.metadata.version('reasoning-gym')}"

    def warm_up(self) -> None:
        """Imports reasoning-gym."""
        importlib.import_module("reasoning_gym")

    def cache_key(self, problem: Problem, completion_text: str) -> tuple[Any, ...]:
        """Returns the problem's id and the extracted answer."""
        return problem.problem_id, self._extract(completion_text)

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns CORRECT if the task's own checker gives the answer its full score, 1.

        Raises:
            UserError: the problem's metadata does not lead back to its reasoning-gym entry.
        """
        answer = self._extract(completion_text)
        if answer is None:
            return Verdict(kind=VerdictKind.NO_ANSWER, detail=f"no {self._answer_format} answer")
        data, entry = self._entry(problem)
        score = float(data.score_answer(answer, entry))
        kind = VerdictKind.CORRECT if score >= 1.0 else VerdictKind.WRONG
        reward = score if self._partial_credit else None
        return Verdict(kind=kind, reward=reward, extracted=answer, detail=f"score {score:g}")

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns the reference answer in the declared format; some tasks have none."""
        if problem.reference_answer is None:
            return None
        return render_answer(problem.reference_answer, self._answer_format)

    def _entry(self, problem: Problem) -> tuple[Any, dict[str, Any]]:
        """Returns reasoning-gym's data set object and the problem's entry in it."""
        metadata = problem.metadata
        names = ("task", "seed", "size", "index", "config")
        if missing := [name for name in names if name not in metadata]:
            raise UserError(
                f"metadata of {problem.problem_id!r} lacks {', '.join(missing)}; "
                "load it with restem_lightning.problems.ReasoningGym"
            )
        task, seed, size, index, config = (metadata[name] for name in names)
        key = json.dumps([task, seed, size, config], sort_keys=True)
        if key not in self._datasets:
            self._datasets[key] = reasoning_gym_dataset(task, seed, size, config)
        data = self._datasets[key]
        entry = metadata["entry"] if "entry" in metadata else data[index]
        if entry["question"] != problem.question:
            raise UserError(
                f"{problem.problem_id!r} is not what this reasoning-gym version generates; "
                "generate the problems again"
            )
        return data, entry

    def _extract(self, text: str) -> str | None:
        return extract_answer(text, self._answer_format, self._stop_marks)
