"""Verdicts in bulk: the self check of problems, and the `restem verify` command on JSONL files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.problems.code import RAW_KEYS, code_fields
from restem_lightning.problems.records import open_file, problem_from_fields, read_lines
from restem_lightning.verifiers.base import VerifierSpec
from restem_lightning.verifiers.pool import VerifierPool

MAX_PENDING_LINES = 4096
PROBLEM_FIELDS = tuple(Problem.__dataclass_fields__)


def check_references(
    problems: list[Problem], pool: VerifierPool
) -> tuple[list[Problem], list[tuple[Problem, Verdict]]]:
    """Checks that the verifier accepts every problem's own reference.

    Args:
        problems: the problems to check.
        pool: a drained pool of the verifier.

    Returns:
        kept: the problems whose reference is CORRECT, or that have nothing to check, in order.
        dropped: the other problems, each with the verdict on its reference.
    """
    verdict_of: dict[int, Verdict] = {}
    for index, problem in enumerate(problems):
        try:
            text = pool.verifier.reference_completion(problem)
        except Exception as error:  # the verifier boundary
            verdict_of[index] = Verdict(kind=VerdictKind.ERROR, detail=repr(error))
            continue
        if text is not None:
            pool.submit(index, problem, text)
    verdict_of.update(pool.drain())
    bad = {
        i: verdict for i, verdict in verdict_of.items() if verdict.kind is not VerdictKind.CORRECT
    }
    kept = [problem for index, problem in enumerate(problems) if index not in bad]
    return kept, [(problems[index], bad[index]) for index in sorted(bad)]


def verify_file(
    spec: VerifierSpec,
    input_path: str | Path,
    output_path: str | Path,
    *,
    num_workers: int = 1,
    deadline_s: float = 5.0,
) -> dict[str, int]:
    """Writes one verdict line for each line of a JSONL file, in the same order.

    An input line holds `problem_id`, `completion` and the problem's other fields (`question`,
    `reference_answer`, `tests`, ...), or a code problem's as MBPP, HumanEval and APPS have them
    (see `code_fields`; there `task_id` can stand for `problem_id`); `case_id` is passed on, other
    keys are ignored. A malformed line has verdict ERROR. Memory is bounded; the output appears
    whole or not at all. Both paths may end in .gz.

    Args:
        spec: the verifier.
        input_path: the completions.
        output_path: the verdicts, with problem_id (and case_id), verdict, reward, extracted,
            detail, elapsed_s.
        num_workers: worker processes.
        deadline_s: wall-clock seconds for one line.

    Returns:
        How many lines got each verdict.

    Raises:
        UserError: no such input, or the verifier cannot be built.
    """
    source, target = Path(input_path), Path(output_path)
    if not source.is_file():
        raise UserError(f"{source} is not a file; give the path of a JSONL file of completions")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}.{target.name}")
    counts = dict.fromkeys((kind.value for kind in VerdictKind), 0)
    try:
        with (
            VerifierPool(spec, num_workers=num_workers, deadline_s=deadline_s) as pool,
            open_file(part, "wb") as file,
        ):
            for row in _verdict_rows(pool, read_lines(source)):
                counts[row["verdict"]] += 1
                file.write(json.dumps(row).encode() + b"\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return counts


def _verdict_rows(pool: VerifierPool, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the output rows in input order, with a bounded number of lines under way."""
    heads: dict[int, dict[str, Any]] = {}
    verdicts: dict[int, Verdict] = {}
    next_index = 0
    for index, line in enumerate(lines):
        heads[index], problem, completion = _parse_line(line)
        if isinstance(problem, str):
            verdicts[index] = Verdict(kind=VerdictKind.ERROR, detail=problem)
        else:
            pool.submit(index, problem, completion)
        is_full = True
        while is_full:
            is_full = len(heads) >= MAX_PENDING_LINES
            verdicts.update(pool.poll(1.0 if is_full else 0.0))
            while next_index in verdicts:
                yield _row(heads.pop(next_index), verdicts.pop(next_index))
                next_index += 1
    verdicts.update(pool.drain())
    for index in sorted(heads):
        yield _row(heads[index], verdicts[index])


def _parse_line(line: bytes) -> tuple[dict[str, Any], Problem | str, str]:
    """Returns the line's ids, its problem (or what is wrong with the line) and its completion."""
    head: dict[str, Any] = {"problem_id": None}
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return head, f"the line is not JSON: {error}", ""
    if not isinstance(values, dict):
        return head, "the line is not a JSON object", ""
    head = {key: values[key] for key in ("problem_id", "case_id") if key in values}
    head.setdefault("problem_id", None)
    completion = values.get("completion")
    if not isinstance(completion, str):
        return head, "completion is missing or not a string", ""
    known = {name: values[name] for name in PROBLEM_FIELDS if values.get(name) is not None}
    known["question"] = known.get("question") or "-"
    if type(known.get("reference_answer")) in (int, float):
        known["reference_answer"] = json.dumps(known["reference_answer"])
    try:
        if any(values.get(key) is not None for key in RAW_KEYS):
            fields = code_fields(values)
            known = {**fields, **known}
            if isinstance(known["metadata"], dict):
                known["metadata"] = fields["metadata"] | known["metadata"]
            known.setdefault("problem_id", str(values.get("task_id") or "-"))
        return head, problem_from_fields(known), completion
    except UserError as error:
        return head, str(error), ""


def _row(head: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    return {
        **head,
        "verdict": verdict.kind.value,
        "reward": verdict.reward,
        "extracted": verdict.extracted,
        "detail": verdict.detail,
        "elapsed_s": round(verdict.elapsed_s, 6),
    }
