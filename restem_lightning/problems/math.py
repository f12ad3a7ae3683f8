"""Math data sets in their published layouts: GSM8K and MATH."""

import logging
import random
import re
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.problems.records import Problem, rows_of, take_slice, text_field

logger = logging.getLogger(__name__)

MAX_LINKED = 16
# From the end of a box to the beginning of the next one.
_LINK = re.compile(
    r"\}(?:[\s$]|\\[)\]])*,?\s*(?:\\text\s*\{\s*)?(?P<word>and|or|(?<=,))(?:\s*\})?"
    r"(?:[\s$]|\\[(\[])*(?:[A-Za-z](?:\([a-z]\))?\s*=\s*)?\Z"
)


class GSM8K:
    """Grade-school word problems with integer answers (arXiv 2110.14168)."""

    def __init__(self, path: str, split: str, num: int | None = None, offset: int = 0) -> None:
        """Reads GSM8K in its original format (`question`, `answer` ending in `#### number`).

        Args:
            path: a folder with train/test .jsonl or .jsonl.gz, one such file, or else the id of a
                Hugging Face data set such as openai/gsm8k (needs the `datasets` library).
            split: train or test.
            num: how many problems to take; null takes all that are left.
            offset: how many to pass over first, so that slices of one split can be disjoint.
        """
        self._path, self._split, self._num, self._offset = path, split, num, offset

    def load(self) -> list[Problem]:
        """Returns the problems in file order, with ids such as gsm8k/train/17 (row 17, from 0)."""
        problems = []
        for index, row in enumerate(rows_of(self._path, self._split, "main")):
            where = f"{self._path} {self._split} row {index}"
            question, answer = text_field(row, "question", where), text_field(row, "answer", where)
            _, mark, number = answer.rpartition("####")
            if not mark:
                raise UserError(f"{where} has no '#### number' in its answer; is this GSM8K?")
            problems.append(
                Problem(
                    problem_id=f"gsm8k/{self._split}/{index}",
                    question=question,
                    reference_answer=number.strip().replace(",", ""),
                    reference_solution=answer,
                    split=self._split,
                    source="gsm8k",
                )
            )
        return take_slice(problems, self._offset, self._num, self._path)


class MATH:
    """Competition problems with answers in LaTeX (arXiv 2103.03874)."""

    def __init__(
        self,
        path: str,
        split: str,
        num: int | None = None,
        offset: int = 0,
        subject: str | None = None,
        level: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        r"""Reads MATH in its original format; the answer is the last \boxed{...} of the solution.

        So it is in published results, but where "and" joins it to other boxes all of them are the
        answer: a policy that gives half of it must not be right.

        Args:
            path: a folder with train/test .jsonl or .jsonl.gz, one such file, or else the id of a
                Hugging Face data set (needs the `datasets` library).
            split: train or test.
            num: how many problems to take, after the filters; null takes all that are left.
            offset: how many to pass over first, after the filters.
            subject: keep only this subject, e.g. Algebra; null keeps all.
            level: keep only this difficulty, 1 to 5; null keeps all.
            shuffle_seed: of a shuffle before offset and num, so that a slice is not of one subject:
                files of MATH are sorted by it. Slices that shall be disjoint need the same seed.
                null keeps the order of the file.
        """
        self._path, self._split, self._num, self._offset = path, split, num, offset
        self._subject, self._level, self._shuffle_seed = subject, level, shuffle_seed

    def load(self) -> list[Problem]:
        """Returns the problems, with ids such as math/train/17 (row 17 of the file, from 0).

        Rows whose box is missing or empty have no answer: dropped, and counted in a warning.
        """
        problems, dropped = [], []
        for index, row in enumerate(rows_of(self._path, self._split, None)):
            problem = self._problem(index, row)
            (problems if problem.reference_answer else dropped).append(problem)
        if dropped:
            names = ", ".join(problem.problem_id for problem in dropped[:5])
            logger.warning(f"{self._path}: dropped {len(dropped)} without an answer: {names}")
        problems = self._filter(problems, "subject", self._subject)
        problems = self._filter(problems, "level", self._level)
        if self._shuffle_seed is not None:
            random.Random(self._shuffle_seed).shuffle(problems)
        return take_slice(problems, self._offset, self._num, self._path)

    def _problem(self, index: int, row: dict[str, Any]) -> Problem:
        where = f"{self._path} {self._split} row {index}"
        solution = text_field(row, "solution", where)
        level = re.search(r"\d+", str(row.get("level")))
        subject, unique_id = row.get("subject", row.get("type")), row.get("unique_id")
        return Problem(
            problem_id=f"math/{self._split}/{index}",
            question=text_field(row, "problem", where),
            reference_answer=_boxed_reference(solution),
            reference_solution=solution,
            split=self._split,
            source="math",
            metadata={"subject": subject, "level": level and int(level[0]), "unique_id": unique_id},
        )

    def _filter(self, problems: list[Problem], name: str, wanted: Any) -> list[Problem]:
        if wanted is None:
            return problems
        kept = [problem for problem in problems if problem.metadata[name] == wanted]
        if not kept:
            known = sorted({str(problem.metadata[name]) for problem in problems})
            raise UserError(f"{self._path} has no {name} {wanted!r}; it has {', '.join(known)}")
        return kept


def _boxed_reference(solution: str) -> str:
    boxes, word = linked_boxes(solution)
    return boxes[-1].strip() if word == "or" else ", ".join(box.strip() for box in boxes)


def linked_boxes(text: str) -> tuple[list[str], str]:
    r"""Returns what the last \boxed holds, behind those that "and", "or" or a comma join to it.

    The second value is "or" if it joins any two of them, else "and" (so for one alone). The list is
    empty as `last_boxed` is None.
    """
    boxes: list[str] = []
    word = "and"
    while len(boxes) < MAX_LINKED and (box := last_boxed(text)) is not None:
        boxes.insert(0, box)
        text = text[: start_of_box(text)]
        link = _LINK.search(text[-80:])
        if link is None:
            break
        text = text[: len(text) - len(link[0]) + 1]
        before = text[start_of_box(text) :] if "box" in text else ""
        if not re.fullmatch(r"\\f?box(?:ed)?\s*\{.*\}", before, re.DOTALL) or (
            not before.endswith(f"{{{last_boxed(text)}}}")
        ):
            break
        if link["word"] == "or":
            word = "or"
    return boxes, word


def start_of_box(text: str) -> int:
    r"""Returns where the last \boxed or \fbox begins, -1 if there is none."""
    return max(text.rfind("\\boxed"), text.rfind("\\fbox"))


def last_boxed(text: str) -> str | None:
    r"""Returns what the last \boxed or \fbox holds, None if there is none or it is not closed."""
    start = start_of_box(text)
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest)
        return bare[0].rstrip(".,") if bare else None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[1 : token.start()]
    return None
