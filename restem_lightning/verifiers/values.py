"""Equality of expression trees by their values at random points.

Whatever is rational is computed exactly. The rest is computed with 60 digits, which refutes, and
then with 1,500 digits, which confirms.
"""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from restem_lightning.verifiers.expressions import Tree, UnreadableError

COARSE_DIGITS, FINE_DIGITS = 60, 1_500
NUM_POINTS = 8
MAX_BITS = 20_000
# An irrational value, and whatever enters it, lies between 10^-900 and 10^900. So a sum that is
# 10^-1300 of its terms is zero: nothing smaller can have been written.
MAX_MAGNITUDE_BITS = 2_990
MAX_ARGUMENT = 1_000_000
MAX_FACTORIAL = 2_100
MAX_FALLING = 10  # the most factors of a binomial of any number, x(x-1)/2 being two

Value = Any  # a Fraction, or a real or complex number of an mpmath context


def are_equal(left: Tree, right: Tree) -> bool:
    """Returns whether two expressions have the same value wherever they are real.

    Raises:
        UnreadableError: a value is too large to compute, or no point has one.
    """
    has_i = bool(_leaves(left, "constant") & {"i"} or _leaves(right, "constant") & {"i"})
    for digits in (COARSE_DIGITS, FINE_DIGITS):
        arithmetic = _Arithmetic(digits)
        num_real, unreal = 0, []
        for first, second in _values(left, right, digits):
            if first is None and second is None:
                continue
            if first is None or second is None:
                return False
            if has_i or (_is_real(first) and _is_real(second)):
                if arithmetic.add(first, -second) != 0:
                    return False
                num_real += 1
            elif _is_real(first) or _is_real(second):
                return False
            else:
                unreal.append((first, second))
        if not num_real and not unreal:
            raise UnreadableError("undefined")
        # Where nothing is real, the complex values decide.
        if not num_real and any(arithmetic.add(first, -second) != 0 for first, second in unreal):
            return False
    return True


def are_proportional(left: Tree, right: Tree, *, is_signed: bool) -> bool:
    """Returns whether left = c * right with one number c, above zero if `is_signed`, else not zero.

    Raises:
        UnreadableError: as for `are_equal`, or if either side has no variable.
    """
    if not _leaves(left, "name") or not _leaves(right, "name"):
        raise UnreadableError("a relation without variables")
    for digits in (COARSE_DIGITS, FINE_DIGITS):
        arithmetic = _Arithmetic(digits)
        pairs = [pair for pair in _values(left, right, digits) if None not in pair]
        if len(pairs) < NUM_POINTS // 2 or 0 in pairs[0]:
            return False
        first, second = pairs[0]
        ratio = arithmetic.divide(first, second)
        if is_signed and not (_is_real(ratio) and ratio > 0):
            return False
        for value, other in pairs[1:]:
            if arithmetic.add(value, -arithmetic.multiply(ratio, other)) != 0:
                return False
    return True


def value_of(tree: Tree) -> Value:
    """Returns the value of an expression without variables, exact or to 60 digits.

    Raises:
        UnreadableError: it has variables, or its value is undefined or too large.
    """
    if _leaves(tree, "name"):
        raise UnreadableError("a variable")
    try:
        return _Arithmetic(COARSE_DIGITS).evaluate(tree, {})
    except ZeroDivisionError:
        raise UnreadableError("undefined") from None


def _values(left: Tree, right: Tree, digits: int) -> Iterator[tuple[Value | None, Value | None]]:
    """Yields both values at each point, None where undefined."""
    names = sorted(_leaves(left, "name") | _leaves(right, "name"))
    draw = random.Random(0)
    arithmetic = _Arithmetic(digits)
    for index in range(NUM_POINTS if names else 1):
        point = {}
        for name in names:
            sign = (1, -1)[index % 2] if index < 4 else draw.choice((1, -1))
            # Half of the points are small, half of them reach far enough for \sqrt{x-9}.
            size = draw.randrange(1, 3_000 if index // 2 % 2 else 40_000)
            # Two denominators, so that no \sin(n\pi x) that can be computed is zero everywhere.
            point[name] = sign * Fraction(size, (1_009, 1_013)[index % 2])
        yield tuple(_value_at(tree, point, arithmetic) for tree in (left, right))


def _value_at(tree: Tree, point: dict[str, Fraction], arithmetic: "_Arithmetic") -> Value | None:
    try:
        return arithmetic.evaluate(tree, point)
    except ZeroDivisionError:
        return None


@lru_cache(maxsize=4096)
def _leaves(tree: Tree, head: str) -> frozenset[str]:
    """Returns the names or the constants in a tree."""
    if tree[0] == head:
        return frozenset((tree[1],))
    parts = [_leaves(part, head) for part in tree[1:] if isinstance(part, tuple)]
    return frozenset().union(*parts)


def _is_real(value: Value) -> bool:
    return isinstance(value, Fraction) or not hasattr(value, "_mpc_")


@lru_cache(maxsize=2)
def _context(digits: int) -> Any:
    import mpmath

    context = mpmath.MPContext()
    context.dps = digits
    return context


class _Arithmetic:
    """Arithmetic with exact rationals as long as possible, else with a number of digits."""

    def __init__(self, digits: int) -> None:
        self._digits = digits

    def evaluate(self, tree: Tree, point: dict[str, Fraction]) -> Value:
        """Returns the value at a point; ZeroDivisionError means undefined."""
        head, *parts = tree
        if head == "number":
            return parts[0]
        if head == "name":
            return point[parts[0]]
        if head == "constant":
            context = _context(self._digits)
            return context.mpc(0, 1) if parts[0] == "i" else +getattr(context, parts[0])
        if head == "call":
            return self._call(parts[0], self.evaluate(parts[1], point))
        values = [self.evaluate(part, point) for part in parts]
        return getattr(self, _METHODS[head])(*values)

    def add(self, left: Value, right: Value) -> Value:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return _bounded(left + right)
        left, right = self._inexact(left), self._inexact(right)
        total = left + right
        noise = _context(self._digits).mpf(10) ** -(self._digits * 13 // 15)
        if abs(total) <= noise * max(abs(left), abs(right)):
            return Fraction(0)
        return self._checked(total)

    def multiply(self, left: Value, right: Value) -> Value:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return _bounded(left * right)
        if left == 0 or right == 0:
            return Fraction(0)
        return self._checked(self._inexact(left) * self._inexact(right))

    def divide(self, left: Value, right: Value) -> Value:
        if right == 0:
            raise ZeroDivisionError
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return _bounded(left / right)
        if left == 0:
            return left
        return self._checked(self._inexact(left) / self._inexact(right))

    def _negate(self, value: Value) -> Value:
        return -value

    def _absolute(self, value: Value) -> Value:
        return abs(value)

    def _degree(self, value: Value) -> Value:
        return self.multiply(self.divide(value, Fraction(180)), +_context(self._digits).pi)

    def _power(self, base: Value, exponent: Value) -> Value:
        if exponent == 0 and base != 0:
            return Fraction(1)
        if base == 0:
            if not _is_real(exponent) or exponent <= 0:
                raise ZeroDivisionError
            return Fraction(0)
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1 and isinstance(base, Fraction):
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if abs(exponent) * bits > MAX_BITS:
                    raise UnreadableError("a power too large to compute")
                return base**exponent.numerator
            if _is_real(base) and base < 0 and exponent.denominator % 2:
                root = self._power(-base, exponent)
                return -root if exponent.numerator % 2 else root
        base, exponent = self._inexact(base), self._inexact(exponent)
        context = _context(self._digits)
        if abs(exponent) * (1 + abs(context.log(base))) > MAX_MAGNITUDE_BITS * 2 // 3:
            raise UnreadableError("a power too large to compute")
        return self._checked(context.power(base, exponent))

    def _root(self, index: Value, value: Value) -> Value:
        if not isinstance(index, Fraction) or index.denominator != 1 or not 2 <= index <= 100:
            raise UnreadableError("a root of another index than 2 to 100")
        return self._power(value, 1 / index)

    def _logarithm(self, base: Value, value: Value) -> Value:
        if value == 0 or base == 0 or base == 1:
            raise ZeroDivisionError
        if value == 1:
            return Fraction(0)
        context = _context(self._digits)
        top, bottom = (self._checked(context.log(self._inexact(v))) for v in (value, base))
        return self.divide(top, bottom)

    def _factorial(self, value: Value) -> Value:
        return _bounded(Fraction(math.factorial(_small_count(value))))

    def _binomial(self, top: Value, bottom: Value) -> Value:
        count = _small_count(bottom)
        if count > MAX_FALLING or not isinstance(top, Fraction):
            return _bounded(Fraction(math.comb(_small_count(top), count)))
        return _bounded(math.prod(((top - k) / (k + 1) for k in range(count)), start=Fraction(1)))

    def _call(self, function: str, value: Value) -> Value:
        value, context = self._inexact(value), _context(self._digits)
        is_hyperbolic = function in ("sinh", "cosh", "tanh")
        if abs(value) > (1_000 if is_hyperbolic else MAX_ARGUMENT):
            raise UnreadableError("an argument too large to compute")
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(function, function)
        result = getattr(context, name)(value)
        if abs(result) < context.mpf(10) ** -(self._digits * 13 // 15):
            return Fraction(0)
        if abs(result) > context.mpf(10) ** (self._digits * 13 // 15):
            raise ZeroDivisionError
        return self._checked(result)

    def _inexact(self, value: Value) -> Value:
        if not isinstance(value, Fraction):
            return value
        bits = abs(value.numerator.bit_length() - value.denominator.bit_length())
        if bits > MAX_MAGNITUDE_BITS:
            raise UnreadableError("a number too large to compute")
        return _context(self._digits).mpf(value.numerator) / value.denominator

    def _checked(self, value: Value) -> Value:
        """Returns the value, as a real number if its imaginary part is noise."""
        context = _context(self._digits)
        size = abs(value)
        if not context.isfinite(size) or (size and abs(context.mag(size)) > MAX_MAGNITUDE_BITS):
            raise UnreadableError("a value too large to compute")
        noise = size * context.mpf(10) ** -(self._digits * 13 // 15)
        if not _is_real(value) and abs(value.imag) <= noise:
            return value.real
        return value


_METHODS = {
    "add": "add",
    "mul": "multiply",
    "div": "divide",
    "neg": "_negate",
    "abs": "_absolute",
    "pow": "_power",
    "log": "_logarithm",
    "root": "_root",
    "degree": "_degree",
    "factorial": "_factorial",
    "binomial": "_binomial",
}


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise UnreadableError("a number too large to compute")
    return value


def _small_count(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise UnreadableError("a count that is not one of 0 to 2,100")
    return int(value)
