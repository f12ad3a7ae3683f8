"""Math answers: declared extraction, exact comparison first, Math-Verify last."""

import importlib.metadata
import logging
import re
from collections.abc import Sequence
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem, last_boxed
from restem_lightning.verifiers.answers import bare, exact_number, nesting, quantity, split_items

MAX_TEXT = 20_000
MAX_COMPARED = 1_000
MAX_DEPTH = 50
MAX_ITEMS = 16
STOP_MARKS = ("\nQ:", "\nQuestion:", "\nProblem:")

# To the end of the sentence or line; a newline or full stop inside $...$ ends neither.
_SENTENCE = (
    r"\s*:?\s*((?:\\.|\$(?:\\.|[^$\\])*\$|[^\n])+?)"
    r"(?:\.?\s*I hope it is correct|\.(?=\s|\Z)|\n|\Z)"
)
_PATTERNS = {
    "gsm8k": re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)"),
    "final_answer": re.compile("final answer is" + _SENTENCE, re.IGNORECASE),
    "answer_is": re.compile("answer is" + _SENTENCE, re.IGNORECASE),
}
_RENDERED = {
    "gsm8k": "#### {}",
    "boxed": r"\boxed{{{}}}",
    "final_answer": "Final Answer: The final answer is ${}$. I hope it is correct.",
    "answer_is": "The answer is {}.",
    "answer_tag": "<answer>{}</answer>",
    "auto": r"\boxed{{{}}}",
}
ANSWER_FORMATS = tuple(_RENDERED)
_MARKED = ("gsm8k", "boxed", "final_answer", "answer_tag")

_BASE = re.compile(r"(-?[0-9A-Za-z]+)_\{?(\d{1,2})\}?")
_ASSIGNMENT = re.compile(r"([A-Za-z](?:\([a-z]\))?)=([^=<>]+)")
_RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|neq?|lt|gt|in|cup|cap|setminus)(?![A-Za-z])")
_SET_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|in|cup|cap|setminus)(?![A-Za-z])")
_SUBSCRIPT = re.compile(r"(?<!\\log)_(?:\{[^{}]*\}|.)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "begin", "end"}
# Towers of powers, exponents of four digits, factorials of factorials or of four digits, 51 digits.
_TOO_LARGE = re.compile(
    r"\^\{?-?\d+\}?\^|\^\{[\d+*-]*\d\^|\^\{?-?\d{4}|\d{4}!|[)}!]!|\d{51}"
    r"|binom\{?\d{4}|\\(?:sum|prod|int)(?![A-Za-z])"
)


class MathVerifier:
    """Judges a final answer against the problem's reference answer."""

    name = "math"

    def __init__(
        self,
        answer_format: str = "auto",
        stop_marks: Sequence[str] = STOP_MARKS,
        use_math_verify: bool = True,
    ) -> None:
        r"""Judges a final answer against the problem's reference answer.

        Args:
            answer_format: where the answer stands; the last one counts. gsm8k: `#### x`; boxed:
                `\boxed{x}`; final_answer: `The final answer is $x$. I hope it is correct.`;
                answer_is: `The answer is x.`; answer_tag: `<answer>x</answer>`; auto: any of these,
                `The answer is x.` only if there is no other.
            stop_marks: the completion is cut before the first of these, so that a next problem
                that the policy invents is never judged.
            use_math_verify: ask Math-Verify about answers that exact comparison cannot settle.

        Raises:
            UserError: an unknown answer_format, or Math-Verify is wanted and not installed.
        """
        check_answer_format(answer_format)
        self._answer_format, self._stop_marks = answer_format, tuple(stop_marks)
        self._use_math_verify = use_math_verify
        self.version = "1"
        if use_math_verify:
            try:
                self.version += f"+math-verify-{importlib.metadata.version('math-verify')}"
            except importlib.metadata.PackageNotFoundError:
                raise UserError(
                    "use_math_verify (True) needs `pip install math-verify[antlr4-13-2]`; "
                    "or set it to false"
                ) from None

    def warm_up(self) -> None:
        """Imports Math-Verify and lets it build its parser."""
        if self._use_math_verify:
            _confirm(r"\sqrt{4}", "2")

    def cache_key(self, problem: Problem, completion_text: str) -> tuple[Any, ...]:
        """Returns the reference and the extracted answer: nothing else matters."""
        return problem.reference_answer, self._extract(completion_text)

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns the verdict on the answer found in the completion.

        Raises:
            UserError: the problem has no reference answer.
        """
        answer = self._extract(completion_text)
        if answer is None:
            return Verdict(kind=VerdictKind.NO_ANSWER, detail=f"no {self._answer_format} answer")
        if not (problem.reference_answer or "").strip():
            raise UserError(f"problem {problem.problem_id!r} has no reference_answer")
        is_equal, detail = self.compare(problem.reference_answer, answer)
        kind = VerdictKind.CORRECT if is_equal else VerdictKind.WRONG
        return Verdict(kind=kind, extracted=answer, detail=detail)

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns the reference solution if it has the declared format, else only the answer."""
        solution = problem.reference_solution
        if solution is not None and self._extract(solution) is not None:
            return solution
        return render_answer(problem.reference_answer or "?", self._answer_format)

    def compare(self, reference: str, answer: str) -> tuple[bool, str]:
        """Returns whether two answers are the same, and what decided it.

        The first of these that can decide does: text, exact numbers, number bases, words, lists,
        assignments, and Math-Verify only for what is left, if it is small enough.
        """
        if max(nesting(reference), nesting(answer)) > MAX_DEPTH:
            return False, "unparsed: too deep"
        return self._compare(bare(reference), bare(answer))

    def _compare(self, reference: str, answer: str) -> tuple[bool, str]:
        if not reference or not answer:
            return False, "empty"
        if reference == answer:
            return True, "same text"
        if max(len(reference), len(answer)) > MAX_COMPARED:
            return False, "unparsed: too long"
        for decide in (_compare_numbers, _compare_bases, _compare_words):
            decided = decide(reference, answer)
            if decided is not None:
                return decided, decide.__name__.removeprefix("_compare_")
        if (values := _assigned(reference, answer)) is not None:
            return self._compare(*values) if values else (False, "assignments to different names")
        if not any(_SET_RELATION.search(text) for text in (reference, answer)):
            items, others = split_items(reference), split_items(answer)
            if len(items[1]) > 1 or len(others[1]) > 1 or items[0] != others[0]:
                return self._compare_lists(items, others)
        if not self._use_math_verify:
            return False, "different text"
        if reason := _refusal(reference, answer):
            return False, reason
        return _confirm(reference, answer), "math-verify"

    def _compare_lists(
        self, reference: tuple[str, list[str]], answer: tuple[str, list[str]]
    ) -> tuple[bool, str]:
        """Compares element by element; sets and bare lists in any order."""
        (brackets, items), (other_brackets, others) = reference, answer
        unordered = {"", "{}"}
        if brackets != other_brackets and not {brackets, other_brackets} <= unordered:
            return False, "different brackets"
        if len(items) != len(others):
            return False, "different number of elements"
        if len(items) > MAX_ITEMS:
            return False, "unparsed: too many elements"
        left = list(others)
        for item in items:
            candidates = left if brackets in unordered else left[:1]
            found = [other for other in candidates if self._compare(item, other)[0]]
            if not found:
                return False, "elements differ"
            left.remove(found[0])
        return True, "elements"

    def _extract(self, text: str) -> str | None:
        return extract_answer(text, self._answer_format, self._stop_marks)


def check_answer_format(answer_format: str) -> None:
    """Raises UserError for a format that `extract_answer` does not know."""
    if answer_format not in ANSWER_FORMATS:
        raise UserError(
            f"answer_format ({answer_format!r}) must be one of {', '.join(ANSWER_FORMATS)}"
        )


def extract_answer(
    text: str, answer_format: str, stop_marks: Sequence[str] = STOP_MARKS
) -> str | None:
    """Returns the last answer in the declared format, None if there is none or it is empty.

    Only text before the first stop mark and after `</think>` counts, and of that the last 20,000
    characters. Two different answers are no error: the last one counts. Takes linear time.
    """
    ends = [position for mark in stop_marks if (position := text.find(mark)) >= 0]
    kept = text[: min(ends)] if ends else text
    _, closed, after = kept.rpartition("</think>")
    if not closed and "<think>" in after:
        return None
    kept = after[-MAX_TEXT:]
    if answer_format == "auto":
        marked = [place for name in _MARKED if (place := _last_answer(kept, name)) is not None]
        found = max(marked, default=None) or _last_answer(kept, "answer_is")
    else:
        found = _last_answer(kept, answer_format)
    return (found[1].strip() or None) if found else None


def render_answer(answer: str, answer_format: str) -> str:
    """Returns the shortest completion that gives `answer` in the declared format."""
    return _RENDERED[answer_format].format(answer)


def _last_answer(text: str, answer_format: str) -> tuple[int, str] | None:
    """Returns where the last answer in one format starts, and the answer."""
    if answer_format == "boxed":
        start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
        return None if start < 0 else (start, last_boxed(text) or "")
    if answer_format == "answer_tag":
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, max(end, 0))
        return None if start < 0 else (start, text[start + len("<answer>") : end])
    places = [(match.start(), match[1]) for match in _PATTERNS[answer_format].finditer(text)]
    return places[-1] if places else None


def _compare_numbers(reference: str, answer: str) -> bool | None:
    """Decides if both are exact numbers, a unit allowed on either or the same on both."""
    (value, unit), (other, other_unit) = quantity(reference), quantity(answer)
    if value is None or other is None:
        return None
    if unit and other_unit and unit != other_unit:
        return False
    if value == other:
        return True
    percent, plain = (value, other) if unit == "%" else (other, value)
    return {unit, other_unit} == {"%", ""} and percent == plain * 100


def _compare_bases(reference: str, answer: str) -> bool | None:
    """Decides if either is a number with its base as a subscript; the answer may leave it out."""
    sides = _BASE.fullmatch(reference), _BASE.fullmatch(answer)
    if all(sides):
        return sides[0].groups() == sides[1].groups()
    if sides[0] and exact_number(answer) is not None:
        return sides[0][1] == answer
    if sides[1] and exact_number(reference) is not None:
        return sides[1].groups() == (reference, "10")
    return None


def _assigned(reference: str, answer: str) -> tuple[str, ...] | None:
    """Returns the two values of x=value, the name allowed on one side or the same on both.

    An empty tuple means different names, None that neither side (or not only) is an assignment.
    """
    texts = (reference, answer)
    sides = [_ASSIGNMENT.fullmatch(text) for text in texts]
    if all(sides) and sides[0][1] != sides[1][1]:
        return ()
    pairs = list(zip(sides, texts, strict=True))
    if not any(sides) or any(not side and _RELATION.search(text) for side, text in pairs):
        return None
    return tuple(side[2] if side else text for side, text in pairs)


def _compare_words(reference: str, answer: str) -> bool | None:
    """Decides if the reference is plain words."""
    if not re.fullmatch(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*", reference):
        return None
    return reference.casefold() == answer.casefold()


def _refusal(reference: str, answer: str) -> str:
    """Returns why Math-Verify must not be asked, "" if it may."""
    for text in (reference, answer):
        if _TOO_LARGE.search(text):
            return "unparsed: too large to compute"
    if sorted(_SUBSCRIPT.findall(reference)) != sorted(_SUBSCRIPT.findall(answer)):
        return "different subscripts"
    if set(_WORD.findall(answer)) - set(_WORD.findall(reference)) - _FUNCTIONS:
        return "words in the answer"
    return ""


def _confirm(reference: str, answer: str) -> bool:
    """Asks Math-Verify, and refutes what it takes for equal by rounding.

    Its own time-outs need SIGALRM; they are off, the pool's deadline holds instead.
    """
    import math_verify
    import sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    normal = math_verify.parser.NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
    )
    settings = [math_verify.LatexExtractionConfig(normalization_config=normal)]
    sides = [
        math_verify.parse(f"${text}$", settings, "no_fallback", "first_match", parsing_timeout=None)
        for text in (reference, answer)
    ]
    if not all(sides) or not math_verify.verify(*sides, timeout_seconds=None):
        return False
    left, right = sides[0][0], sides[1][0]
    if not all(isinstance(side, sympy.Expr) and side.is_number for side in (left, right)):
        return True
    left, right = sympy.N(left, 50), sympy.N(right, 50)
    return bool(abs(left - right) <= 1e-12 * max(abs(left), abs(right)))
