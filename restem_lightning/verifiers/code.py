"""Programs: the verdict of unit tests or of input and output, from behind the sandbox's walls."""

import hashlib
import json
import math
import re
from dataclasses import replace
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.sandbox import Outcome, Runner, require
from restem_lightning.verifiers.programs import extract_program, head_of

MAX_TIME_S = 60.0
REFERENCE_FACTOR = 5.0
MIN_TIME_S = 3.0
TOLERANCE = 1e-6

_KINDS = {
    "passed": VerdictKind.CORRECT,
    "failed": VerdictKind.WRONG,
    "lost": VerdictKind.WRONG,
    "timeout": VerdictKind.TIMEOUT,
    "broken": VerdictKind.ERROR,
}
_DECIMAL = re.compile(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?|[-+]?\d+\.?(?:[eE][-+]?\d+)")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
# Runs in the judge. The public data set wraps an expected value in a list of one, or does not.
_SAME = f"""
import math

def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {{str(key): plain(item) for key, item in value.items()}}
    return value

def equal(value, expected):
    if isinstance(expected, list):
        return (
            isinstance(value, list)
            and len(value) == len(expected)
            and all(map(equal, value, expected))
        )
    if isinstance(expected, float) and type(value) in (int, float):
        return math.isclose(value, expected, rel_tol={TOLERANCE}, abs_tol={TOLERANCE})
    return type(value) is type(expected) and value == expected

def same(value, expected):
    value, expected = plain(value), plain(expected)
    is_wrapped = isinstance(expected, list) and len(expected) == 1
    return equal(value, expected) or (is_wrapped and equal(value, expected[0]))
"""


class CodeVerifier:
    """Judges a program by its problem's tests; runs it in a sandbox, the tests in another one."""

    name = "code"
    version = "2"

    def __init__(
        self,
        time_limit_s: float = 10.0,
        memory_mib: int = 512,
        min_isolation: str = "landlock",
    ) -> None:
        """Judges a program by its problem's tests; runs it in a sandbox, the tests in another one.

        Args:
            time_limit_s: CPU seconds of one program for all its tests, unless the problem sets its
                own (`metadata["time_limit_s"]`). Where it has a reference solution, that one's time
                says more: five times as much, at least 3 and at most 60 seconds.
            memory_mib: memory of one program in MiB, the interpreter's own included.
            min_isolation: the weakest isolation that will do. namespaces: own user, mount, process
                and network namespaces; landlock: the kernel's Landlock where there are no
                namespaces; seccomp: nothing but the system-call filter, programs can then read
                files. Below it foreign code is refused.

        Raises:
            UserError: a value is not allowed, or this machine gives less isolation.
        """
        for name, value in (("time_limit_s", time_limit_s), ("memory_mib", memory_mib)):
            if value <= 0:
                raise UserError(f"{name} ({value}) must be above 0")
        self._time_limit_s = min(time_limit_s, MAX_TIME_S)
        level = require(min_isolation).level
        assert level is not None
        self._runner = Runner(level, memory_bytes=memory_mib << 20)
        self._reference_s: dict[tuple[str, str], float] = {}

    @property
    def deadline_s(self) -> float:
        """Seconds that one job may need on a busy machine: its own limits end it long before."""
        return 10 * MAX_TIME_S

    def warm_up(self) -> None:
        """Starts the sandboxes."""
        self._runner.warm_up()

    def close(self) -> None:
        """Ends the sandboxes; they end with this process in any case."""
        self._runner.close()

    def cache_key(self, problem: Problem, completion_text: str) -> tuple[Any, ...]:
        """Returns the problem's tests and the program: nothing else matters."""
        cases = problem.metadata.get("input_output")
        digest = hashlib.sha256(json.dumps(cases).encode()).digest() if cases else b""
        program = extract_program(completion_text, problem)
        return problem.problem_id, problem.tests, problem.entry_point, digest, program

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns the verdict on the program found in the completion.

        Raises:
            UserError: the problem has nothing to judge by.
        """
        program = extract_program(completion_text, problem)
        if program is None:
            return Verdict(kind=VerdictKind.NO_ANSWER, detail="no program")
        outcome = self._run(problem, program, self._first_limit(problem))
        if outcome.kind == "timeout":
            outcome = self._run_longer(problem, program) or outcome
        return Verdict(kind=_KINDS[outcome.kind], extracted=program, detail=outcome.detail)

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns the reference solution as a fenced block, None if there is none."""
        if problem.reference_solution is None:
            return None
        return f"```python\n{problem.reference_solution}\n```"

    def _first_limit(self, problem: Problem) -> float:
        own_s = problem.metadata.get("time_limit_s")
        usual_s = self._time_limit_s if problem.reference_solution is None else MIN_TIME_S
        return min(float(own_s or usual_s), MAX_TIME_S)

    def _run_longer(self, problem: Problem, program: str) -> Outcome | None:
        """Runs a program again if the reference, timed once, says that it deserves more time."""
        completion = self.reference_completion(problem)
        reference = completion and extract_program(completion, problem)
        if not reference:
            return None
        key = (problem.problem_id, reference)
        if key not in self._reference_s:
            outcome = self._run(problem, reference, MAX_TIME_S)
            self._reference_s[key] = outcome.cpu_s if outcome.kind == "passed" else 0.0
            if program == reference:
                return outcome
        limit_s = min(REFERENCE_FACTOR * self._reference_s[key], MAX_TIME_S)
        return (
            self._run(problem, program, limit_s) if limit_s > self._first_limit(problem) else None
        )

    def _run(self, problem: Problem, program: str, limit_s: float) -> Outcome:
        cases = problem.metadata.get("input_output")
        if problem.tests is None and cases and not cases.get("fn_name"):
            return self._run_scripts(program, cases, limit_s)
        if problem.tests is not None:
            tests, names = problem.tests, re.findall(r"\w+", problem.entry_point or "")
            preamble = head_of(problem)
        elif cases:
            tests, names, preamble = _case_tests(cases), [cases["fn_name"]], _SAME
        else:
            raise UserError(
                f"problem {problem.problem_id!r} has neither tests nor metadata.input_output"
            )
        return self._runner.judge(program, tests, names=names, preamble=preamble, cpu_s=limit_s)

    def _run_scripts(self, program: str, cases: dict[str, Any], limit_s: float) -> Outcome:
        """Runs a program on each input, the shortest first, until an output is wrong."""
        pairs = [
            (_text(i), _text(o)) for i, o in zip(cases["inputs"], cases["outputs"], strict=True)
        ]
        if not pairs:
            raise UserError("metadata.input_output has no cases")
        used_s, outcome = 0.0, Outcome(kind="passed")
        for stdin, expected in sorted(pairs, key=lambda pair: len(pair[0])):
            outcome = self._runner.run_script(
                program, stdin.encode(errors="replace"), cpu_s=max(limit_s - used_s, 0.1)
            )
            used_s += outcome.cpu_s
            if outcome.kind != "passed":
                break
            if not same_output(outcome.output.decode(errors="replace"), expected):
                outcome = replace(
                    outcome, kind="failed", detail=f"wrong output for {stdin[:100]!r}"
                )
                break
        return replace(outcome, cpu_s=used_s)


def same_output(output: str, expected: str) -> bool:
    """Returns whether a program's standard output is the expected one.

    Both must have the same number of lines that are not blank, and each of these the same words
    between white space. A word equals another with the same characters; where the expected word is
    a decimal fraction, also a number that differs by at most 1e-6, absolutely or relatively.
    """
    lines, wanted = (
        [words for line in text.splitlines() if (words := line.split())]
        for text in (output, expected)
    )
    return len(lines) == len(wanted) and all(
        len(line) == len(goal) and all(map(_same_word, line, goal))
        for line, goal in zip(lines, wanted, strict=True)
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not (_DECIMAL.fullmatch(expected) and _NUMBER.fullmatch(word)):
        return False
    return math.isclose(float(word), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _case_tests(cases: dict[str, Any]) -> str:
    """Returns the source of asserts for cases that call a function."""
    name = cases["fn_name"]
    if not str(name).isidentifier():
        raise UserError(f"fn_name ({name!r}) is no name of a function")
    pairs = zip(cases["inputs"], cases["outputs"], strict=True)
    return "\n".join(f"assert same({name}(*{i!r}), {o!r})" for i, o in pairs)


def _text(value: Any) -> str:
    """Returns an input or output, which the data set gives as a text or as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
