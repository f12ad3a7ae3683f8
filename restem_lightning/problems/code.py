"""Problems whose answers are programs: MBPP, HumanEval and APPS, and rows of theirs as they are.

A function problem has `entry_point`, the function under test, and `tests`, Python source that
asserts something of it. A standard-input problem has `metadata["input_output"]` instead: `inputs`
and `outputs` of the same length. APPS has both kinds; where `input_output` names a function
(`fn_name`), inputs are lists of arguments.
"""

import ast
import builtins
import json
import logging
from collections.abc import Sequence
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.problems.records import Problem, rows_of, take_slice, text_field

logger = logging.getLogger(__name__)

# By task_id, both ends included (arXiv 2108.07732, section 2.1).
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
APPS_DIFFICULTIES = ("introductory", "interview", "competition")


class MBPP:
    """Short Python functions from a sentence and three asserts (arXiv 2108.07732)."""

    def __init__(
        self, path: str, split: str, num: int | None = None, offset: int = 0, num_shown: int = 1
    ) -> None:
        """Reads MBPP in its original format, or the sanitized one.

        The question shows tests, for they alone tell the function's name. All tests judge: whoever
        writes a program that answers the shown ones by heart fails the hidden ones.

        Args:
            path: a folder with mbpp.jsonl or mbpp.jsonl.gz, one such file, or else the id of a
                Hugging Face data set such as google-research-datasets/mbpp (needs the `datasets`
                library).
            split: train (task_id 601 to 974), validation (511 to 600), test (11 to 510) or prompt
                (1 to 10).
            num: how many problems to take; null takes all that are left.
            offset: how many to pass over first, so that slices of one split can be disjoint.
            num_shown: tests that the question shows, from the first, at least 1.

        Raises:
            UserError: for an unknown split or a num_shown below 1.
        """
        if split not in MBPP_SPLITS:
            raise UserError(f"split ({split}) of MBPP must be one of {', '.join(MBPP_SPLITS)}")
        if num_shown < 1:
            raise UserError(
                f"num_shown ({num_shown}) must be at least 1: a test names the function"
            )
        self._path, self._split, self._num, self._offset = path, split, num, offset
        self._num_shown = num_shown

    def load(self) -> list[Problem]:
        """Returns the problems in file order, with ids such as mbpp/601 (its task_id).

        Raises:
            UserError: no such data set, a row that is not MBPP's, or a slice beyond its end.
        """
        first, last = MBPP_SPLITS[self._split]
        problems = []
        for index, row in enumerate(rows_of(self._path, self._split, None, stem="mbpp")):
            where = f"{self._path} row {index}"
            if not isinstance(row.get("task_id"), int):
                raise UserError(f"{where} has no whole number `task_id`; is this MBPP?")
            if first <= row["task_id"] <= last:
                problems.append(self._problem(row, where))
        return take_slice(problems, self._offset, self._num, self._path)

    def _problem(self, row: dict[str, Any], where: str) -> Problem:
        text = text_field(row, "text" if "text" in row else "prompt", where)
        fields = _fields_at(row, where)
        shown = "\n".join(row["test_list"][: self._num_shown])
        return Problem(
            problem_id=f"mbpp/{row['task_id']}",
            question=f"{text.strip()}\nIt should pass:\n{shown}",
            reference_solution=text_field(row, "code", where).replace("\r\n", "\n"),
            split=self._split,
            source="mbpp",
            **fields,
        )


class HumanEval:
    """Python functions from signature and docstring (arXiv 2107.03374); for evaluation only."""

    def __init__(
        self,
        path: str,
        num: int | None = None,
        offset: int = 0,
        question_format: str = "{prompt}",
    ) -> None:
        """Reads HumanEval in its original format.

        Args:
            path: a folder with humaneval.jsonl or humaneval.jsonl.gz, one such file, or else the id
                of a Hugging Face data set such as openai/openai_humaneval (needs the `datasets`
                library).
            num: how many problems to take; null takes all that are left.
            offset: how many to pass over first.
            question_format: how the unfinished function is put as a question; holds {prompt}. Left
                as it is, with a prompt format of `{question}` alone, the policy goes on with the
                function's body.

        Raises:
            UserError: for a format without its placeholder.
        """
        if "{prompt}" not in question_format:
            raise UserError(f"question_format ({question_format!r}) must hold {{prompt}}")
        self._path, self._num, self._offset = path, num, offset
        self._question_format = question_format

    def load(self) -> list[Problem]:
        """Returns the problems in file order, with ids such as HumanEval/17 (its task_id).

        Raises:
            UserError: no such data set, a row that is not HumanEval's, or a slice beyond its end.
        """
        problems = []
        for index, row in enumerate(rows_of(self._path, "test", None, stem="humaneval")):
            where = f"{self._path} row {index}"
            prompt = text_field(row, "prompt", where)
            problems.append(
                Problem(
                    problem_id=text_field(row, "task_id", where),
                    question=self._question_format.replace("{prompt}", prompt),
                    reference_solution=prompt + text_field(row, "canonical_solution", where),
                    split="test",
                    source="humaneval",
                    **_fields_at(row, where),
                )
            )
        return take_slice(problems, self._offset, self._num, self._path)


class APPS:
    """Programs and functions from contests and practice sites (arXiv 2105.09938)."""

    def __init__(
        self,
        path: str,
        split: str,
        num: int | None = None,
        offset: int = 0,
        difficulty: str | None = "introductory",
    ) -> None:
        """Reads APPS in the format of its public data set.

        Args:
            path: a folder with train/test .jsonl or .jsonl.gz, one such file, or else the id of a
                Hugging Face data set such as codeparrot/apps (needs the `datasets` library).
            split: train or test.
            num: how many problems to take, after the filter; null takes all that are left.
            offset: how many to pass over first, after the filter.
            difficulty: introductory, interview or competition; null keeps all.

        Raises:
            UserError: for an unknown difficulty.
        """
        if difficulty is not None and difficulty not in APPS_DIFFICULTIES:
            raise UserError(
                f"difficulty ({difficulty}) must be one of {', '.join(APPS_DIFFICULTIES)}, or null"
            )
        self._path, self._split, self._num, self._offset = path, split, num, offset
        self._difficulty = difficulty

    def load(self) -> list[Problem]:
        """Returns the problems in file order, with ids such as apps/train/17 (row 17, from 0).

        Rows without usable tests are dropped, and counted in a warning.

        Raises:
            UserError: no such data set, a row without a difficulty, or a slice beyond its end.
        """
        problems, dropped = [], []
        for index, row in enumerate(rows_of(self._path, self._split, None)):
            where = f"{self._path} {self._split} row {index}"
            if self._difficulty not in (None, text_field(row, "difficulty", where)):
                continue
            try:
                problems.append(self._problem(index, row, where))
            except UserError as error:
                dropped.append(str(error))
        if dropped:
            logger.warning(f"{self._path}: dropped {len(dropped)}; the first: {dropped[0]}")
        return take_slice(problems, self._offset, self._num, self._path)

    def _problem(self, index: int, row: dict[str, Any], where: str) -> Problem:
        fields = _fields_at(row, where)
        starter = (row.get("starter_code") or "").strip()
        wanted = (
            f"Write the function {fields['entry_point']}."
            if fields["entry_point"]
            else "Write a program that reads standard input and writes standard output."
        )
        begin = f"\nBegin with:\n{starter}" if starter else ""
        solutions = _decoded(row.get("solutions") or "[]", "solutions")
        return Problem(
            problem_id=f"apps/{self._split}/{index}",
            question=f"{text_field(row, 'question', where).strip()}\n\n{wanted}{begin}",
            reference_solution=solutions[0] if solutions else None,
            split=self._split,
            source="apps",
            **fields,
        )


RAW_KEYS = ("test", "test_list", "input_output")


def code_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Returns `tests`, `entry_point` and `metadata` of a row in a data set's own format.

    Args:
        row: holds HumanEval's `test`, `entry_point` and, as a rule, `prompt`; or MBPP's `test_list`
            and, if there are any, `test_setup_code` or `test_imports`, `challenge_test_list` and
            `entry_point` (else it is the function that all asserts call); or `input_output`.

    Raises:
        UserError: none of these, or a value of the wrong type.
    """
    if row.get("input_output") is not None:
        cases = _input_output(row["input_output"])
        return _fields(None, cases.get("fn_name"), input_output=cases)
    if row.get("test") is not None:
        tests, entry_point = _text(row, "test"), _text(row, "entry_point")
        prompt = {"prompt": _text(row, "prompt")} if row.get("prompt") is not None else {}
        return _fields(f"{tests}\n\ncheck({entry_point})", entry_point, **prompt)
    setup = row.get("test_setup_code") or "\n".join(_texts(row, "test_imports"))
    asserts = [*_texts(row, "test_list"), *_texts(row, "challenge_test_list")]
    if not asserts:
        raise UserError(f"a code problem needs one of {', '.join(RAW_KEYS)}, and not empty")
    if not isinstance(setup, str):
        raise UserError(f"test_setup_code must be a string, not {setup!r}")
    tests = "\n".join([setup, *asserts] if setup else asserts).replace("\r\n", "\n")
    entry_point = row.get("entry_point")
    return _fields(tests, _text(row, "entry_point") if entry_point else entry_point_of(asserts))


def entry_point_of(asserts: Sequence[str]) -> str:
    """Returns the function that all asserts call: the outermost one that is no builtin.

    Raises:
        UserError: an assert is not Python, or they call no function in common.
    """
    called = []
    for text in asserts:
        try:
            nodes = ast.walk(ast.parse(text))  # outer calls come before inner ones
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"the test {text[:60]!r} is not Python: {error}") from None
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        called.append([name.id for name in calls if isinstance(name, ast.Name)])
    common = [name for name in called[0] if all(name in names for names in called)]
    own = [name for name in common if not hasattr(builtins, name)]
    if not common:
        raise UserError(f"the tests call no function in common; give entry_point: {asserts[0]!r}")
    return (own or common)[0]


def _fields(tests: str | None, entry_point: str | None, **metadata: Any) -> dict[str, Any]:
    return {"tests": tests, "entry_point": entry_point, "metadata": metadata}


def _fields_at(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns `code_fields`; its complaints name the place."""
    try:
        return code_fields(row)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _input_output(value: Any) -> dict[str, Any]:
    cases = _decoded(value, "input_output")
    if not isinstance(cases, dict):
        raise UserError(f"input_output must hold an object, not {str(cases)[:60]!r}")
    inputs, outputs, name = cases.get("inputs"), cases.get("outputs"), cases.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise UserError("input_output must hold the lists `inputs` and `outputs`, not empty")
    if len(inputs) != len(outputs):
        raise UserError(f"input_output has {len(inputs)} inputs, but {len(outputs)} outputs")
    if name is not None and not isinstance(name, str):
        raise UserError(f"fn_name must be a string, not {name!r}")
    return {"inputs": inputs, "outputs": outputs} | ({"fn_name": name} if name else {})


def _decoded(value: Any, name: str) -> Any:
    """Returns a value that the public data set keeps as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}") from None


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise UserError(f"{name} must be a string, not {row.get(name)!r}")
    return row[name]


def _texts(row: dict[str, Any], name: str) -> list[str]:
    values = row.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{name} must be a list of strings, not {values!r}")
    return values
