"""Equations in a text, as a policy writes its steps: 3 + 4 = 7 or <<3+4=7>>."""

import re
from itertools import groupby

# Numbers joined by operators and "=". Every space has one place in the pattern and all that follows
# the first operand is optional, so that no text makes the search backtrack.
_OPERAND = r"(?:\( ?){0,9}-?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?(?: ?\)){0,9}"
_OPERATOR = r"(?:[-+*/^x\u00d7\u00f7\u2212]|\\times|\\cdot|\\div)"
_MARK_OR_CHAIN = re.compile(
    rf"<<([^<>]*)>>|(?<![\w.])({_OPERAND}(?: ?(?:{_OPERATOR}|=) ?{_OPERAND})*)"
)
_OPERATION = re.compile(rf"[\d)%] ?{_OPERATOR}")


def equations(text: str) -> tuple[str, ...]:
    """Returns the equations of a text in order, without white space, repeats in a row merged.

    An equation is numbers joined by at least one operator and "=", as in 3+4=7 or in the chain
    1+2+3=3+3=6, or the inside of a GSM8K calculator mark <<...=...>>.
    """
    parts = _MARK_OR_CHAIN.findall(" ".join(text.split()))
    found = (mark or chain for mark, chain in parts if mark or _OPERATION.search(chain))
    keys = ("".join(equation.split()) for equation in found if "=" in equation)
    return tuple(key for key, _ in groupby(keys))
