"""Whether an answer only repeats an expression of its question: equal, but no answer."""

import math
import re
from functools import lru_cache

from restem_lightning.verifiers.answers import bare, split_unit

MAX_QUESTION = 10_000
_DELIMITER = re.compile(r"(?<!\\)\$+|\\[()\[\]]")
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|ne)(?![A-Za-z])")
_NAME = re.compile(r"\A[A-Za-z]+(?:_\{?\w\}?)?(?:\([a-z]\))?=")
_TIMES = re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])")
_FINAL = re.compile(
    r"-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+"
    r"|\\frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}|(?P<top2>\d+)/(?P<bottom2>\d+))"
)


def is_restated(question: str, reference: str, answer: str) -> bool:
    r"""Returns whether an answer is an expression of the question, and the reference is not.

    Asked to compute \log_8 2, whoever answers \log_8 2 has computed nothing, though it equals 1/3.
    Numbers, and fractions in lowest terms, are final: that a question holds 1/2 says nothing of it.
    """
    cleaned, wanted = bare(answer), bare(reference)
    if cleaned == wanted or _is_final(split_unit(_value(cleaned))[0]):
        return False
    asked = _expressions(question[:MAX_QUESTION])
    return any(_key(text) in asked for text in (cleaned, _value(cleaned))) and not any(
        _key(text) in asked for text in (wanted, _value(wanted))
    )


@lru_cache(maxsize=4096)
def _expressions(question: str) -> frozenset[str]:
    """Returns what stands between mathematical delimiters, and the sides of its relations."""
    texts = [bare(part) for part in _DELIMITER.split(question)]
    return frozenset(_key(side) for text in texts for side in (text, *_RELATION.split(text)))


def _value(text: str) -> str:
    """Returns the right side of x = 5."""
    return _NAME.sub("", text)


def _key(text: str) -> str:
    """Returns a bare text the same, however it is laid out."""
    return re.sub(r"[\s{}]", "", _TIMES.sub("*", text))


def _is_final(text: str) -> bool:
    match = _FINAL.fullmatch(text)
    if match is None:
        return False
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    return top is None or math.gcd(int(top), int(bottom)) == 1
