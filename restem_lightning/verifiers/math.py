"""Math answers: extraction in a declared format, and the verdict."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.equations import equations
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.problems.math import linked_boxes, start_of_box
from restem_lightning.verifiers.comparison import compare
from restem_lightning.verifiers.equations import wrong_equation
from restem_lightning.verifiers.restated import is_restated

MAX_TEXT = 20_000
MAX_QUICK = 200
MAX_BEFORE = 40
STOP_MARKS = (
    *("\nQ:", "\nQuestion:", "\nProblem:", "\n### Instruction", "\n### Question", "\n### Problem"),
    *("\nHuman:", "\nUser:", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]"),
)
# The next of numbered problems: a completion's own may well be called problem 1.
_NEXT_NUMBERED = re.compile(r"\n(?:Problem|Question|Exercise|Q) ?(?:[2-9]|\d{2,4})[:.)]")

# To the end of the sentence or line; a newline or full stop inside $...$ ends neither. Spaces are
# passed over once, not from each of them on: a long row of them would take minutes.
_SENTENCE = (
    r"\s*(?::\s*)?((?:\\.|\$(?:\\.|[^$\\])*\$|[^\n])+?)"
    r"(?:\.?(?:(?<!\s)\s+)?I hope it is correct|\.(?=\s|\Z)|\n|\Z)"
)
# What the text must hold in lower case (looked for first: it is fast), and the pattern.
_PATTERNS = {
    "gsm8k": ("####", re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")),
    "final_answer": (
        "final answer is",
        re.compile("final answer is" + _SENTENCE, re.IGNORECASE),
    ),
    "answer_is": ("answer is", re.compile("answer is" + _SENTENCE, re.IGNORECASE)),
    "answer_line": (
        "answer",
        re.compile(
            r"^[ \t>*#]{0,8}(?:final |correct )?answer[*_]{0,2}:[*_]{0,2}" + _SENTENCE,
            re.IGNORECASE | re.MULTILINE,
        ),
    ),
}
_RENDERED = {
    "gsm8k": "#### {}",
    "boxed": r"\boxed{{{}}}",
    "final_answer": "Final Answer: The final answer is ${}$. I hope it is correct.",
    "answer_is": "The answer is {}.",
    "answer_line": "Answer: {}",
    "answer_tag": "<answer>{}</answer>",
    "auto": r"\boxed{{{}}}",
}
# A box in -\boxed{5} or \boxed{5}^2 holds a part of the answer; \boxed{5}^\circ all but its unit,
# and 7+\boxed{5}=12 all of it.
_BEFORE_A_PART = re.compile(
    r"(?:(?<!-)-|\d|[\d}] ?[-/] ?|\S ?\+ ?|\\(?:cdot|times|div|pm|neq?) ?|(?<!\w)not \$?"
    r"|(?:\\sqrt(?:\[\d\])?|\\[dt]?frac(?:\{[^{}]*\})?|\^|_)\{)\Z"
)
_ENDS_OF_A_PART = (*"0123456789+-/{", "cdot", "times", "div", "pm", "ne", "neq", "not")
_AFTER_A_PART = re.compile(
    r"\}(?:\^(?!\{?\\circ)|[-+/](?!-)|\\(?:cdot|times|div|pm|sqrt|[dt]?frac(?!\{\\text))(?![A-Za-z])"
    r"|\.?\d| ?[-+*/] ?\d|!\$)"
)
_AFTER_A_BLANK = re.compile(r"\}\s*=")
_PLAIN_NUMBER = re.compile(r"-?(?:\d{1,40}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,20})?", re.ASCII)
_JOINED = {"and": ", ", "or": r" \text{ or } "}
ANSWER_FORMATS = tuple(_RENDERED)
_MARKED = ("gsm8k", "boxed", "final_answer", "answer_tag")
_UNMARKED = ("answer_is", "answer_line")


class MathVerifier:
    """Judges a final answer against the problem's reference answer."""

    name = "math"
    version = "6"

    def __init__(
        self,
        answer_format: str = "auto",
        stop_marks: Sequence[str] = STOP_MARKS,
        check_equations: bool = False,
        needs_reference: bool = True,
    ) -> None:
        r"""Judges a final answer against the problem's reference answer.

        An expression of the question is no answer to it: `Compute $\log_8 2$` is not solved by
        \log_8 2, which equals the reference.

        Args:
            answer_format: where the answer stands; the last one counts. gsm8k: `#### x`; boxed:
                `\boxed{x}`; final_answer: `The final answer is $x$. I hope it is correct.`;
                answer_is: `The answer is x.`; answer_line: `Answer: x` or `**Final answer:** x` at
                the start of a line; answer_tag: `<answer>x</answer>`; auto: any of these,
                answer_is and answer_line only if there is no other.
            stop_marks: the completion is cut before the first of these, so that a next problem
                that the policy invents is never judged.
            check_equations: a correct answer has reward 0 if one of the completion's equations
                (3 + 4 = 7, <<3+4=7>>) does not hold within 0.001 or cannot be read; its verdict
                stays CORRECT, so evaluation does not change.
            needs_reference: a problem without a reference answer is ERROR; if false its answers
                are extracted and WRONG, for selection.rewards majority.

        Raises:
            UserError: an unknown answer_format.
        """
        check_answer_format(answer_format)
        self._answer_format, self._stop_marks = answer_format, tuple(stop_marks)
        self._check_equations, self._needs_reference = check_equations, needs_reference
        if check_equations:
            self.version = f"{self.version}+equations"

    def warm_up(self) -> None:
        """Imports what algebra needs."""
        self.compare(r"\sqrt{4}", "2")

    def cache_key(self, problem: Problem, completion_text: str) -> tuple[Any, ...]:
        """Returns what the verdict depends on: reference, answer, and what else is checked."""
        answer = self._extract(completion_text)
        key = problem.reference_answer, answer, self._is_restated(problem, answer)
        if not self._check_equations:
            return key
        return (*key, equations(judged_text(completion_text, self._stop_marks)))

    def quick_verdict(self, cache_key: tuple[Any, ...]) -> Verdict | None:
        """Returns the verdict for no answer, plain numbers or the reference's text, else None."""
        if self._check_equations or type(self).verify is not MathVerifier.verify:
            return None
        reference, answer, is_restated = cache_key
        is_quick = answer is None or (
            len(answer) <= MAX_QUICK
            if answer == reference
            else _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(reference or "")
        )
        return self._verdict(reference, answer, is_restated=is_restated) if is_quick else None

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns the verdict on the answer found in the completion.

        Raises:
            UserError: the problem has no reference answer.
        """
        answer = self._extract(completion_text)
        reference = problem.reference_answer
        if answer is not None and self._needs_reference and not (reference or "").strip():
            raise UserError(f"problem {problem.problem_id!r} has no reference_answer")
        is_restated = self._is_restated(problem, answer)
        verdict = self._verdict(reference, answer, is_restated=is_restated)
        if verdict.kind is VerdictKind.CORRECT and self._check_equations:
            wrong = wrong_equation(judged_text(completion_text, self._stop_marks))
            if wrong is not None:
                return replace(verdict, reward=0.0, detail=f"the equation {wrong} does not hold")
        return verdict

    def _is_restated(self, problem: Problem, answer: str | None) -> bool:
        """Returns whether an answer only repeats the question; it is then WRONG."""
        if answer is None or answer == problem.reference_answer or len(answer) > MAX_QUICK:
            return False
        if _PLAIN_NUMBER.fullmatch(answer):
            return False
        return is_restated(problem.question, problem.reference_answer or "", answer)

    def _verdict(self, reference: str | None, answer: str | None, *, is_restated: bool) -> Verdict:
        if answer is None:
            return Verdict(kind=VerdictKind.NO_ANSWER, detail=f"no {self._answer_format} answer")
        if not (reference or "").strip():
            detail = "no reference to compare with"
            return Verdict(kind=VerdictKind.WRONG, extracted=answer, detail=detail)
        if is_restated:
            detail = "an expression of the question"
            return Verdict(kind=VerdictKind.WRONG, extracted=answer, detail=detail)
        is_equal, detail = self.compare(reference, answer)
        kind = VerdictKind.CORRECT if is_equal else VerdictKind.WRONG
        return Verdict(kind=kind, extracted=answer, detail=detail)

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns the reference solution if it has the declared format, else only the answer."""
        solution = problem.reference_solution
        if not self._needs_reference and problem.reference_answer is None:
            return None
        if solution is not None and self._extract(solution) is not None:
            return solution
        return render_answer(problem.reference_answer or "?", self._answer_format)

    def compare(self, reference: str, answer: str) -> tuple[bool, str]:
        """Returns whether two answers are the same, and what decided it."""
        return compare(reference, answer)

    def _extract(self, text: str) -> str | None:
        return extract_answer(text, self._answer_format, self._stop_marks)


def check_answer_format(answer_format: str) -> None:
    """Raises UserError for a format that `extract_answer` does not know."""
    if answer_format not in ANSWER_FORMATS:
        raise UserError(
            f"answer_format ({answer_format!r}) must be one of {', '.join(ANSWER_FORMATS)}"
        )


def judged_text(text: str, stop_marks: Sequence[str] = STOP_MARKS) -> str:
    """Returns the part of a completion that is judged.

    It is the text before the first stop mark or numbered next problem, and after `</think>`
    (nothing if `<think>` is not closed), and of that the last 20,000 characters.
    """
    ends = [position for mark in stop_marks if (position := text.find(mark)) >= 0]
    if stop_marks and (numbered := _NEXT_NUMBERED.search(text)):
        ends.append(numbered.start())
    kept = text[: min(ends)] if ends else text
    _, closed, after = kept.rpartition("</think>")
    return "" if not closed and "<think>" in after else after[-MAX_TEXT:]


def extract_answer(
    text: str, answer_format: str, stop_marks: Sequence[str] = STOP_MARKS
) -> str | None:
    r"""Returns the last answer in the declared format, None if there is none or it is empty.

    Only `judged_text` counts. Two different answers are no error: the last one counts, but boxes
    that "and", "or" or a comma joins are one answer. A box that holds a part of an expression, as
    in -\boxed{5}, is an empty answer. Takes linear time.
    """
    kept = judged_text(text, stop_marks)
    if answer_format == "auto":
        found = _latest_answer(kept, _MARKED) or _latest_answer(kept, _UNMARKED)
    else:
        found = _last_answer(kept, answer_format)
    return (found[1].strip() or None) if found else None


def render_answer(answer: str, answer_format: str) -> str:
    """Returns the shortest completion that gives `answer` in the declared format."""
    return _RENDERED[answer_format].format(answer)


def _latest_answer(text: str, names: Sequence[str]) -> tuple[int, str] | None:
    places = [place for name in names if (place := _last_answer(text, name)) is not None]
    return max(places, default=None)


def _last_answer(text: str, answer_format: str) -> tuple[int, str] | None:
    """Returns where the last answer in one format starts, and the answer."""
    if answer_format == "boxed":
        start = start_of_box(text)
        if start < 0:
            return None
        boxes, word = linked_boxes(text)
        answer = boxes[-1] if boxes else ""
        after = text[text.find(answer, start + len(r"\boxed")) + len(answer) :]
        before = text[max(0, start - MAX_BEFORE) : start]
        is_part = _AFTER_A_PART.match(after) or (
            before.rstrip(" $").endswith(_ENDS_OF_A_PART)  # looked for first: it is fast
            and _BEFORE_A_PART.search(before)
            and not _AFTER_A_BLANK.match(after)
        )
        return start, "" if is_part else _JOINED[word].join(boxes)
    if answer_format == "answer_tag":
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, max(end, 0))
        return None if start < 0 else (start, text[start + len("<answer>") : end])
    mark, pattern = _PATTERNS[answer_format]
    if text.isascii() and mark not in text.lower():
        return None
    places = [(match.start(), match[1]) for match in pattern.finditer(text)]
    return places[-1] if places else None
