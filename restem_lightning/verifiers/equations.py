"""Whether the equations of a text hold, by our own grammar: no text is ever run as code."""

import itertools
import re

from restem_lightning.equations import equations
from restem_lightning.verifiers.expressions import UnreadableError, parse
from restem_lightning.verifiers.values import value_of

TOLERANCE = 1e-3  # that of RFT, arXiv 2308.01825
_SIGNS = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-", "$": "", ",": ""})
_PERCENT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)%")
_COMMANDS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"))


def wrong_equation(text: str) -> str | None:
    """Returns the first equation of a text that does not hold or cannot be read, None if all do.

    In a chain a=b=c each side is compared with the next one, up to TOLERANCE.
    """
    for equation in equations(text):
        try:
            values = [_value(side) for side in equation.split("=")]
        except UnreadableError:
            return equation
        if any(not abs(a - b) < TOLERANCE for a, b in itertools.pairwise(values)):
            return equation
    return None


def _value(side: str) -> float:
    for command, sign in _COMMANDS:
        side = side.replace(command, sign)
    side = _PERCENT.sub(r"(\1/100)", side.translate(_SIGNS))
    try:
        return float(value_of(parse(side)))
    except (OverflowError, TypeError) as error:  # too large, or complex
        raise UnreadableError(str(error)) from error
