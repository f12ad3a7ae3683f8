r"""A small LaTeX grammar: text to expression tree. What it cannot read for certain, it refuses.

A tree is a tuple: its head, then its parts.

- ("number", Fraction), ("name", str), ("constant", "pi" | "e" | "i")
- ("add" | "mul", left, right), ("div", left, right), ("pow", base, exponent), ("neg", part)
- ("call", function, argument), ("log", base, argument), ("root", index, argument)
- ("factorial", part), ("binomial", top, bottom), ("abs", part), ("degree", part)
"""

import re
from fractions import Fraction
from typing import Any

from restem_lightning.verifiers.answers import exact_number

Tree = tuple[Any, ...]

MAX_TOKENS = 400
MAX_DEPTH = 40
MAX_DIGITS = 60

FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
)
_LOGARITHMS = ("log", "ln", "lg")
GREEK = frozenset(
    (
        *("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma"),
        *("tau", "phi", "varphi", "omega", "psi", "xi", "eta", "zeta", "kappa", "nu", "chi", "ell"),
    )
)
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac")
_TIMES = ("cdot", "times", "ast")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<bar>\\[|])|(?P<letters>[A-Za-z]+)"
    r"|(?P<symbol>[-+*/^_(){}\[\]!|]))(?P<space>\s*)"
)
_PLAIN_WORDS = re.compile("|".join(sorted(FUNCTIONS, key=len, reverse=True)) + "|log|ln|sqrt|pi")
_CLOSING = {"(": ")", "{": "}"}


class UnreadableError(Exception):
    """The text is not in the grammar, is ambiguous in it, or is too large."""


def parse(text: str) -> Tree:
    """Returns the expression tree of a text that `answers.bare` has cleaned.

    Raises:
        UnreadableError: it cannot be read in exactly one way.
    """
    parser = _Parser(_tokens(text))
    tree = parser.sum()
    if parser.peek() != ("end", ""):
        raise UnreadableError(f"left over: {parser.peek()[1]!r}")
    return tree


def tree_of(text: str) -> Tree:
    """Returns what `parse` does, and the value of a mixed number, which it refuses.

    Raises:
        UnreadableError: it is neither.
    """
    try:
        return parse(text)
    except UnreadableError:
        if (value := exact_number(text)) is None:
            raise
        return ("number", value)


def _tokens(text: str) -> list[tuple[str, str]]:
    """Returns (kind, text) pairs: number, name, command or a symbol that is its own kind."""
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) > MAX_TOKENS:
            raise UnreadableError(f"cannot read {text[position : position + 10]!r}")
        position = match.end()
        kind, value = match.lastgroup, ""
        for kind in ("number", "command", "bar", "letters", "symbol"):
            if (value := match[kind]) is not None:
                break
        if kind == "letters":
            tokens += _letters(value)
        elif kind == "symbol":
            tokens.append((value, value))
        else:
            tokens.append(("|", "|") if kind == "bar" else (kind, value))
    return [*tokens, ("end", "")]


def _letters(text: str) -> list[tuple[str, str]]:
    """Splits letters without a backslash: functions by name, capitals together, products."""
    if match := _PLAIN_WORDS.fullmatch(text):
        return [("command", match[0])]
    if len(text) > 3:
        raise UnreadableError(f"a word: {text[:20]!r}")
    if text.isupper():
        return [("name", text)]
    return [("name", letter) for letter in text]


class _Parser:
    """Recursive descent; each method consumes what it returns."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens, self._position, self._depth = tokens, 0, 0

    def peek(self) -> tuple[str, str]:
        return self._tokens[self._position]

    def _next(self) -> tuple[str, str]:
        token = self.peek()
        self._position += 1
        return token

    def _take(self, kind: str) -> bool:
        if self.peek()[0] != kind:
            return False
        self._position += 1
        return True

    def _expect(self, kind: str) -> None:
        if not self._take(kind):
            raise UnreadableError(f"{kind!r} expected, not {self.peek()[1]!r}")

    def sum(self) -> Tree:
        tree = self._signed_product()
        while self.peek()[0] in ("+", "-"):
            is_minus = self._next()[0] == "-"
            other = self._product()
            tree = ("add", tree, ("neg", other) if is_minus else other)
        return tree

    def _signed_product(self) -> Tree:
        if self._take("-"):
            return ("neg", self._product())
        self._take("+")
        return self._product()

    def _product(self) -> Tree:
        tree = self._juxtaposed()
        while True:
            kind, value = self.peek()
            if kind == "*" or (kind == "command" and value in _TIMES):
                self._next()
                tree = ("mul", tree, self._factor_after_operator())
            elif kind == "/" or (kind == "command" and value == "div"):
                self._next()
                # 1/2x and 1/2(x+1) are read both ways by people.
                tree = ("div", tree, self._factor_after_operator(is_divisor=True))
            else:
                return tree

    def _factor_after_operator(self, is_divisor: bool = False) -> Tree:
        if self._take("-"):
            return ("neg", self._factor_after_operator(is_divisor))
        if is_divisor:
            tree = self._power()
            if self._starts_factor():
                raise UnreadableError("ambiguous: a/bc")
            return tree
        return self._juxtaposed()

    def _juxtaposed(self) -> Tree:
        start = self._position
        tree = self._power()
        while self._starts_factor():
            kind, value = self.peek()
            before = self._tokens[self._position - 1][0]
            inner = self._tokens[self._position + 1][0] if kind == "{" else kind
            if inner == "number" and before != "!":
                raise UnreadableError("a number follows without an operator")
            if before == "number" and self._position == start + 1 and value in _FRACTIONS:
                tree = self._after_number(tree)
                continue
            tree = ("mul", tree, self._power())
        return tree

    def _after_number(self, number: Tree) -> Tree:
        r"""Reads the fraction in 2\frac{x}{3}; 2\frac{1}{3} may be a mixed number."""
        fraction = self._power()
        if fraction[0] == "div" and fraction[1][0] == fraction[2][0] == "number":
            raise UnreadableError("ambiguous: mixed number or product")
        return ("mul", number, fraction)

    def _starts_factor(self) -> bool:
        kind, value = self.peek()
        return kind in ("number", "name", "(", "{") or (
            kind == "command" and value not in (*_TIMES, "div", "circ", "rvert")
        )

    def _power(self) -> Tree:
        tree = self._atom()
        while True:
            if self._take("!"):
                tree = ("factorial", tree)
            elif self._take("^"):
                if self.peek() == ("command", "circ"):
                    self._next()
                    tree = ("degree", tree)
                else:
                    tree = ("pow", tree, self._argument())
                    if self.peek()[0] == "^":
                        raise UnreadableError("ambiguous: a^b^c")
            else:
                return tree

    def _argument(self) -> Tree:
        r"""Reads {...} or, as TeX does, one digit, one letter or one command."""
        if self._take("{"):
            return self._group("{")
        kind, value = self.peek()
        if kind == "number" and len(value) > 1:
            if "." in value or "," in value:
                raise UnreadableError("a decimal needs braces")
            self._tokens[self._position] = ("number", value[1:])
            return ("number", Fraction(value[0]))
        if kind == "-":
            self._next()
            return ("neg", self._atom())
        return self._atom()

    def _group(self, opening: str) -> Tree:
        tree = self.sum()
        self._expect(_CLOSING[opening])
        return tree

    def _atom(self) -> Tree:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        tree = self._atom_of(*self._next())
        self._depth -= 1
        return tree

    def _atom_of(self, kind: str, value: str) -> Tree:
        if kind == "number":
            if len(value) > MAX_DIGITS:
                raise UnreadableError("too many digits")
            return ("number", Fraction(value.replace(",", "")))
        if kind == "name":
            return self._name(value)
        if kind in _CLOSING:
            return self._group(kind)
        if kind == "|":
            tree = self.sum()
            self._expect("|")
            return ("abs", tree)
        if kind == "command":
            return self._command(value)
        raise UnreadableError(f"unexpected {value!r}")

    def _name(self, name: str) -> Tree:
        if self._take("_"):
            name += "_" + self._subscript()
        elif name in ("e", "i"):
            return ("constant", name)
        if name[0] in "fgh" and self.peek()[0] == "(":
            raise UnreadableError("a function or a product")
        return ("name", name)

    def _subscript(self) -> str:
        is_braced = self._take("{")
        kind, value = self._next()
        if kind not in ("number", "name") or (is_braced and not self._take("}")):
            raise UnreadableError("a subscript that is no number or letter")
        if kind == "number" and not is_braced and len(value) > 1:
            raise UnreadableError("a subscript of several digits needs braces")
        return value

    def _command(self, name: str) -> Tree:
        if name in _FRACTIONS:
            return ("div", self._argument(), self._argument())
        if name == "binom":
            return ("binomial", self._argument(), self._argument())
        if name == "sqrt":
            if self.peek()[0] == "(":
                self._next()
                return ("root", ("number", Fraction(2)), self._group("("))
            index: Tree = ("number", Fraction(2))
            if self._take("["):
                index = self.sum()
                self._expect("]")
            return ("root", index, self._argument())
        if name == "pi":
            return ("constant", "pi")
        if name == "exp":
            return ("pow", ("constant", "e"), self._function_argument())
        if name == "lvert":
            tree = self.sum()
            if self._next() != ("command", "rvert"):
                raise UnreadableError("an absolute value that is not closed")
            return ("abs", tree)
        if name in GREEK:
            return self._name("\\" + name)
        if name in FUNCTIONS or name in _LOGARITHMS:
            return self._function(name)
        raise UnreadableError(f"unknown \\{name[:20]}")

    def _function(self, name: str) -> Tree:
        base: Tree = ("constant", "e") if name == "ln" else ("number", Fraction(10))
        if name == "log" and self._take("_"):
            base = self._argument()
        exponent = self._argument() if self._take("^") else None
        if exponent is not None and exponent[0] != "number":
            raise UnreadableError("a function to a power that is no number")
        argument = self._function_argument()
        head = ("log", base) if name in _LOGARITHMS else ("call", name)
        return (*head, argument) if exponent is None else ("pow", (*head, argument), exponent)

    def _function_argument(self) -> Tree:
        r"""Reads (...), or the factors up to the next operator: \sin 2x, \cos\frac{x}{2}."""
        if self.peek()[0] in ("(", "{"):
            tree = self._group(self._next()[0])
            if self.peek()[0] in ("^", "!"):
                raise UnreadableError(r"ambiguous: \sin(x)^2")
            return tree
        tree = self._power()
        while self.peek()[0] == "name" or self.peek()[1] in ("pi", *_FRACTIONS, "sqrt", *GREEK):
            tree = ("mul", tree, self._power())
        after = self.peek()
        if after[1] in _TIMES and self._tokens[self._position + 1][1] in FUNCTIONS:
            return tree
        if after[0] in ("(", "{", "/", "number", "*") or after[1] in _TIMES:
            raise UnreadableError(r"ambiguous: \sin x(y)")
        return tree
