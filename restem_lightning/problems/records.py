"""Problems: the record, JSONL files, and readers of the original data-set formats."""

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Protocol

from restem_lightning.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem whose answers can be checked.

    Args:
        problem_id: unique within the run.
        question: the text put to the policy.
        reference_answer: the known final answer (math, procedural).
        reference_solution: a human solution that ends in the reference answer, if there is one.
        tests: source of the unit tests (code).
        entry_point: name of the function under test (code).
        split: train, validation or held_out, as the source calls it.
        source: the data set it comes from.
        metadata: anything else, JSON-serialisable.
    """

    problem_id: str
    question: str
    reference_answer: str | None = None
    reference_solution: str | None = None
    tests: str | None = None
    entry_point: str | None = None
    split: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


class ProblemSource(Protocol):
    """Anything that yields problems; named by class path in YAML."""

    def load(self) -> list[Problem]:
        """Returns the problems in a fixed order, the same at every call."""


_TEXTS = ("problem_id", "question", "split", "source")
_OPTIONAL_TEXTS = ("reference_answer", "reference_solution", "tests", "entry_point")


def problem_from_fields(values: dict[str, Any]) -> Problem:
    """Returns the problem that a JSON object describes.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type.
    """
    allowed = tuple(item.name for item in fields(Problem))
    if unknown := sorted(set(values) - set(allowed)):
        raise UserError(f"unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
    for name in ("problem_id", "question"):
        if not values.get(name):
            raise UserError(f"{name} must be a non-empty string, not {values.get(name)!r}")
    for name, value in values.items():
        kind = str if name in _TEXTS else str | None if name in _OPTIONAL_TEXTS else dict
        if not isinstance(value, kind):
            raise UserError(
                f"{name} must be {'an object' if kind is dict else 'a string'}: {value!r}"
            )
    return Problem(**values)


def read_problems(path: str | Path) -> list[Problem]:
    """Returns the problems of a JSONL file (.jsonl or .jsonl.gz), one JSON object a line.

    Raises:
        UserError: no such file, a malformed line, an unknown key, or a problem_id used twice.
    """
    problems: list[Problem] = []
    line_of: dict[str, int] = {}
    for number, row in read_rows(Path(path)):
        try:
            problem = problem_from_fields(row)
        except UserError as error:
            raise UserError(f"{path} line {number}: {error}") from None
        first = line_of.setdefault(problem.problem_id, number)
        if first != number:
            raise UserError(
                f"{path} line {number}: problem_id {problem.problem_id!r} is already used in line "
                f"{first}; give each problem its own id"
            )
        problems.append(problem)
    return problems


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Writes problems as JSONL (.jsonl or .jsonl.gz); the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with open_file(part, "wb") as file:
            for problem in problems:
                file.write(json.dumps(vars(problem)).encode() + b"\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def check_splits(named: dict[str, list[Problem]]) -> None:
    """Checks that no problem_id occurs in two splits.

    Args:
        named: the problems of each split by the split's name, e.g. "train" and "held_out".

    Raises:
        UserError: one does.
    """
    split_of: dict[str, str] = {}
    for name, problems in named.items():
        for problem_id in {problem.problem_id: None for problem in problems}:
            other = split_of.setdefault(problem_id, name)
            if other != name:
                raise UserError(
                    f"splits {other!r} and {name!r} share the problem_id {problem_id!r}; use "
                    "disjoint slices (offset, num) or other seeds"
                )


def without_questions_of(
    problems: list[Problem], others: Iterable[Problem]
) -> tuple[list[Problem], list[Problem]]:
    """Returns the problems whose question none of the others asks, and those that are asked twice.

    Data sets repeat themselves, and generators do so where a task has few problems; white space
    does not tell questions apart.
    """
    asked = {" ".join(other.question.split()) for other in others}
    kept, dropped = [], []
    for problem in problems:
        (dropped if " ".join(problem.question.split()) in asked else kept).append(problem)
    return kept, dropped


class JsonlProblems:
    """Problems of our own JSONL format."""

    def __init__(self, path: str, split: str | None = None, num: int | None = None) -> None:
        """Reads our own JSONL format.

        Args:
            path: a .jsonl or .jsonl.gz file, one problem a line.
            split: keep only problems with this `split`; null keeps all.
            num: how many to take, from the first; null takes all.
        """
        self._path, self._split, self._num = path, split, num

    def load(self) -> list[Problem]:
        """Returns the problems in file order."""
        problems = read_problems(self._path)
        if self._split is not None:
            known = sorted({problem.split for problem in problems})
            if self._split not in known:
                raise UserError(f"{self._path} has no split {self._split!r}; it has {known}")
            problems = [problem for problem in problems if problem.split == self._split]
        return take_slice(problems, 0, self._num, self._path)


def open_file(path: Path, mode: str) -> IO[bytes]:
    """Opens a plain or, by its suffix .gz, a compressed file; mode is "rb" or "wb"."""
    return gzip.open(path, mode) if path.suffix == ".gz" else path.open(mode)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a plain or compressed file; UserError if its compression is damaged."""
    with open_file(path, "rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is no whole .gz file ({error}); copy it anew") from error


def take_slice(problems: list[Problem], offset: int, num: int | None, path: str) -> list[Problem]:
    """Returns num problems from an offset on, all that are left if num is None."""
    end = len(problems) if num is None else offset + num
    if not 0 <= offset < end <= len(problems):
        raise UserError(
            f"offset ({offset}) and num ({num}) do not fit {path} ({len(problems)} such problems)"
        )
    return problems[offset:end]


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """Returns a field that must be text; UserError, with the place, if it is not."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{where} has no text field {name!r}; it has {', '.join(row)}")
    return row[name]


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSONL file; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of a .jsonl or .jsonl.gz file")
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            shown = line[:60].decode(errors="backslashreplace").rstrip()
            raise UserError(f"{path} line {number} is not a JSON object: {shown}")
        yield number, row


def rows_of(
    path: str, split: str, hub_config: str | None, stem: str | None = None
) -> Iterable[dict[str, Any]]:
    """Returns the rows of a folder's file `stem` (else `split`), of a file, or of the Hub."""
    place = Path(path)
    if place.is_dir():
        names = [f"{stem or split}.jsonl", f"{stem or split}.jsonl.gz"]
        found = [place / name for name in names if (place / name).is_file()]
        if not found:
            raise UserError(f"{path} has no {' or '.join(names)}; choose another path or split")
        return (row for _, row in read_rows(found[0]))
    if place.exists() or path.endswith((".jsonl", ".jsonl.gz")) or path.count("/") != 1:
        return (row for _, row in read_rows(place))
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} is no path here; for the Hub, `pip install datasets`") from None
    try:
        return datasets.load_dataset(path, hub_config, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"Hugging Face data set {path!r}, split {split!r}: {error}") from error
