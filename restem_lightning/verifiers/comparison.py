"""Comparison of two answers: text, exact numbers, words, structures, then algebra.

Each step either decides or leaves the pair to the next; what no step can read is not equal.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from restem_lightning.verifiers.answers import (
    bare,
    compare_ratios,
    exact_number,
    is_unit_allowed,
    matrix_rows,
    nesting,
    quantity,
    split_items,
    split_unit,
)
from restem_lightning.verifiers.expressions import GREEK, Tree, UnreadableError, parse, tree_of
from restem_lightning.verifiers.values import are_equal, are_proportional, value_of

MAX_COMPARED = 1_000
MAX_DEPTH = 50
MAX_ITEMS = 16

_BASE = re.compile(r"(-?[0-9A-Za-z.]+)_(?:\{(\d{1,2})\}|(\d))")
_NAMED = re.compile(
    rf"((?:(?:\\angle ?)?[A-Za-z]+|\\(?:{'|'.join(sorted(GREEK))})|\\(?:vec|text)\{{[A-Za-z ]+\}})"
    r"(?:_(?:\w|\{\w+\}))?(?:\((?:[A-Za-z]|-?\d+)\))?)="
)
_ASSIGNED = re.compile("[A-Za-z]=[^=]+")
_MEMBER = re.compile(r"([A-Za-z])\\in(?![A-Za-z])(.+)")
_NAMED_TUPLE = re.compile(r"\(([A-Za-z](?:,[A-Za-z])+)\)=(\(.*\))")
_SIGN = re.compile(r"(\\(?:le|ge|ne|lt|gt)(?![A-Za-z])|[=<>])")
_SIGNS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\lt": "<", r"\gt": ">"}
_FLIPPED = {">": "<", ">=": "<="}
_OR = re.compile(r"\\text\{ ?or ?\}|(?<![A-Za-z])or(?![A-Za-z])")
_LETTERS = re.compile(r"[A-Z](?:, ?[A-Z])+")
_INFINITY = r"\infty"
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
_UNORDERED = frozenset(("", "{}"))

Decision = tuple[bool, str] | None


def compare(reference: str, answer: str) -> tuple[bool, str]:
    """Returns whether two answers are the same, and what decided it."""
    if max(nesting(reference), nesting(answer)) > MAX_DEPTH:
        return False, "unparsed: too deep"
    cleaned = bare(reference)
    return _compare(cleaned, cleaned if answer == reference else bare(answer))


def _compare(reference: str, answer: str) -> tuple[bool, str]:
    if not reference or not answer:
        return False, "empty"
    if reference == answer:
        return True, "same text"
    if max(len(reference), len(answer)) > MAX_COMPARED:
        return False, "unparsed: too long"
    for decide in _STEPS:
        decision = decide(reference, answer)
        if decision is not None:
            return decision
    return _compare_expressions(reference, answer)


def _compare_numbers(reference: str, answer: str) -> Decision:
    """Decides exact numbers; a unit may be left out on one side.

    A percentage is a hundredth of its number: 0.5 = 50%. Beyond 1 the sign may be left out, too:
    50 = 50%, but 0.5 is not 0.5%, and 5 is not 500%.
    """
    (value, unit), (other, other_unit) = quantity(reference), quantity(answer)
    if value is None or other is None:
        return None
    if "%" not in (unit, other_unit) or unit == other_unit:
        is_equal = value == other and is_unit_allowed(unit, other_unit)
    elif "" not in (unit, other_unit):
        is_equal = False
    else:
        plain, percent = (other, value) if unit == "%" else (value, other)
        is_left_out = abs(plain) > 1 and plain == percent
        is_share = (abs(plain) <= 1 or plain.denominator > 1) and plain * 100 == percent
        is_equal = is_left_out or is_share
    return is_equal, "numbers"


def _compare_bases(reference: str, answer: str) -> Decision:
    """Decides if either is a number with its base as a subscript; the answer may leave it out."""
    sides = [_BASE.fullmatch(text) for text in (reference, answer)]
    pairs = [(side[1].lstrip("0"), side[2] or side[3]) if side else None for side in sides]
    is_digits = [pair is not None and any(char.isdigit() for char in pair[0]) for pair in pairs]
    if all(is_digits):
        return pairs[0] == pairs[1], "bases"
    if is_digits[0] and re.fullmatch("-?[0-9A-Z.]+", answer):
        return pairs[0][0] == answer.lstrip("0"), "bases"
    if is_digits[1] and exact_number(reference) is not None:
        return pairs[1] == (reference, "10"), "bases"
    return None


def _compare_words(reference: str, answer: str) -> Decision:
    """Decides if the reference is plain words."""
    if not re.fullmatch(r"(?:[A-Za-z]{3,}|[Nn]o)(?:[ -][A-Za-z]+)*", reference):
        return None
    return reference.casefold() == answer.casefold(), "words"


def _compare_matrices(reference: str, answer: str) -> Decision:
    """Decides if either is a matrix: same shape, equal cells."""
    rows, others = matrix_rows(reference), matrix_rows(answer)
    if (rows is None) != (others is None):
        rows, others = (matrix_rows(_NAMED.sub("", text)) for text in (reference, answer))
    if rows is None and others is None:
        return None
    if rows is None or others is None or [len(r) for r in rows] != [len(r) for r in others]:
        return False, "different shapes"
    is_equal = all(
        _compare(cell, other)[0]
        for row, other_row in zip(rows, others, strict=True)
        for cell, other in zip(row, other_row, strict=True)
    )
    return is_equal, "cells"


def _compare_memberships(reference: str, answer: str) -> Decision:
    r"""Takes x\in off; the same name on both sides, or left out on one."""
    matches = [_MEMBER.fullmatch(text) for text in (reference, answer)]
    if not any(matches):
        return None
    if all(matches) and matches[0][1] != matches[1][1]:
        return False, "different names"
    sides = zip(matches, (reference, answer), strict=True)
    return _compare(*(bare(match[2]) if match else text for match, text in sides))


def _compare_named_tuples(reference: str, answer: str) -> Decision:
    """Takes (x,y)= off; the same on both sides, or in the order of the alphabet on one."""
    matches = [_NAMED_TUPLE.fullmatch(text) for text in (reference, answer)]
    if not any(matches):
        return None
    names = [match[1].split(",") for match in matches if match]
    if names[0] != (names[1] if all(matches) else sorted(names[0])):
        return False, "different names"
    sides = zip(matches, (reference, answer), strict=True)
    tuples = [match[2] if match else text for match, text in sides]
    if any(len(split_items(text)[1]) != len(names[0]) for text in tuples):
        return False, "different number of elements"
    return _compare(*tuples)


def _compare_ranges(reference: str, answer: str) -> Decision:
    r"""Decides an inequality in one variable against an interval: the same ends, open or closed.

    A reference (1,2) may be a point, so no inequality equals it; x\in(1,2) is an interval.
    """
    is_chain = [bool(_SIGN.search(text)) for text in (reference, answer)]
    if is_chain[0] == is_chain[1]:
        return None
    ranges = [_range_of(text) for text in (reference, answer)]
    if None in ranges:
        return None
    (name, *ends), (other_name, *other_ends) = ranges
    if "" not in (name, other_name) and name != other_name:
        return False, "different names"
    is_point = not is_chain[0] and not name and ends[0][1] == ends[1][1] == "open"
    if is_point and not any(_INFINITY in value for value, _ in ends):
        return False, "a point or an interval"
    return _are_same_ends(ends, other_ends), "ranges"


def _are_same_ends(ends: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]) -> bool:
    return all(
        kind == other_kind and _compare(value, other)[0]
        for (value, kind), (other, other_kind) in zip(ends, others, strict=True)
    )


def _range_of(text: str) -> tuple[str, tuple[str, str], tuple[str, str]] | None:
    r"""Returns the variable ("" for none) and both ends, each with "open" or "closed".

    Reads [1,2), x\in[1,2), 1\le x<2, x<2 and their mirror images; None for anything else.
    """
    kind_of = {"(": "open", ")": "open", "[": "closed", "]": "closed", "<": "open", "<=": "closed"}
    member = _MEMBER.fullmatch(text)
    brackets, items = split_items(bare(member[2]) if member else text)
    if len(items) == 2 and brackets[:1] in ("(", "[") and not _SIGN.search(text):
        low, high = zip(items, map(kind_of.get, brackets), strict=True)
        return (member[1] if member else "", low, high)
    parts = _SIGN.split(text)
    sides, signs = [bare(side) for side in parts[::2]], [_SIGNS.get(s, s) for s in parts[1::2]]
    if all(sign in _FLIPPED for sign in signs):
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    names = [side for side in sides if re.fullmatch("[A-Za-z]", side) and side not in "ei"]
    if len(names) != 1 or not signs or any(sign not in ("<", "<=") for sign in signs):
        return None
    place = sides.index(names[0])
    if (len(sides), place) not in ((2, 0), (2, 1), (3, 1)):
        return None
    low = (sides[place - 1], kind_of[signs[place - 1]]) if place else ("-" + _INFINITY, "open")
    high = (sides[place + 1], kind_of[signs[place]]) if sides[place + 1 :] else (_INFINITY, "open")
    values = re.sub(r"\\[A-Za-z]+", "", low[0] + high[0])
    return None if names[0] in values else (names[0], low, high)


def _compare_lists(reference: str, answer: str) -> Decision:
    """Decides lists, tuples (x=1, y=2 is one), intervals; sets and bare lists in any order."""
    (brackets, items), (other_brackets, others) = split_items(reference), split_items(answer)
    if len(items) <= 1 and len(others) <= 1 and brackets == other_brackets == "":
        return None
    is_choice = bool(_OR.search(answer))
    is_assigned = all(map(_ASSIGNED.fullmatch, others)) and not is_choice
    if (brackets, other_brackets) == ("()", "") and is_assigned:
        variables = [item[0] for item in others]
        if variables == sorted(set(variables)):
            others, other_brackets = [bare(item[2:]) for item in others], "()"
    if brackets != other_brackets and not {brackets, other_brackets} <= _UNORDERED:
        return False, "different brackets"
    if r"\emptyset" in (reference, answer) or (is_choice and _LETTERS.fullmatch(reference)):
        return False, "elements differ"
    names = _names_of(items), _names_of(others)
    is_lost = max(map(len, names)) > 1 and names[0] != names[1]
    return _compare_items(items, others, is_ordered=brackets not in _UNORDERED or is_lost)


def _names_of(items: list[str]) -> set[str]:
    """Returns the names in AB=9, CD=4, which only their order tells apart in 9, 4; x_1 is x."""
    return {name[1].partition("_")[0] for item in items if (name := _NAMED.match(item))}


def _compare_alternatives(reference: str, answer: str) -> Decision:
    """Takes `a or b` and a=b for b, where a and b are the same; else it is a list or relation."""
    sides = []
    for text in (reference, answer):
        is_chain = "=" in text and not _APPROXIMATELY.search(text)
        parts = [bare(part) for part in (text.split("=") if is_chain else _OR.split(text))]
        is_one = 1 < len(parts) <= MAX_ITEMS and all(
            _compare(parts[-1], part)[0] for part in parts[:-1]
        )
        sides.append(parts[-1] if is_one else text)
    return None if sides == [reference, answer] else _compare(*sides)


def _compare_items(items: list[str], others: list[str], *, is_ordered: bool) -> tuple[bool, str]:
    if len(items) != len(others):
        return False, "different number of elements"
    if len(items) > MAX_ITEMS:
        return False, "unparsed: too many elements"
    left = list(others)
    for item in items:
        found = [o for o in (left[:1] if is_ordered else left) if _compare(item, o)[0]]
        if not found:
            return False, "elements differ"
        left.remove(found[0])
    return True, "elements"


def _compare_relations(reference: str, answer: str) -> Decision:
    """Decides equations, inequalities and x=...; the name may be left out on one side."""
    is_relation = [bool(_SIGN.search(text)) for text in (reference, answer)]
    if not any(is_relation):
        return None
    names = [_NAMED.match(text) for text in (reference, answer)]
    values = [
        bare(text[name.end() :]) if name and not _SIGN.search(text[name.end() :]) else None
        for text, name in zip((reference, answer), names, strict=True)
    ]
    if all(is_relation):
        if None not in values and names[0][1] == names[1][1]:
            return _compare(*values)
        return _compare_chains(reference, answer)
    sides = [
        value if related else text
        for value, related, text in zip(values, is_relation, (reference, answer), strict=True)
    ]
    return (False, "a relation and none") if None in sides else _compare(*sides)


def _compare_chains(reference: str, answer: str) -> tuple[bool, str]:
    """Compares a<b, a<=b<c, a=b: each link up to a factor, from left to right or reversed."""
    try:
        links, others = _links(reference), _links(answer)
        is_equal = _are_same_links(links, others) or _are_same_links(links[::-1], others)
    except UnreadableError as error:
        return False, f"unparsed: {error}"
    return is_equal, "relations"


def _are_same_links(links: list[tuple[str, Tree]], others: list[tuple[str, Tree]]) -> bool:
    return [sign for sign, _ in links] == [sign for sign, _ in others] and all(
        are_proportional(link, other, is_signed="<" in sign)
        for (sign, link), (_, other) in zip(links, others, strict=True)
    )


def _links(text: str) -> list[tuple[str, Tree]]:
    """Returns each link of a chain as its sign and the difference of its sides; no > is left."""
    parts = _SIGN.split(text)
    sides = [parse(part) for part in parts[::2]]
    links = []
    for index, sign in enumerate(parts[1::2]):
        sign = _SIGNS.get(sign, sign)
        left, right = sides[index], sides[index + 1]
        if sign in _FLIPPED:
            sign, left, right = _FLIPPED[sign], right, left
        links.append((sign, ("add", left, ("neg", right))))
    return links


def _compare_unions(reference: str, answer: str) -> Decision:
    r"""Decides unions: the same pieces in any order; `x<1 or x>2` is one, too, beside intervals."""
    sides = [reference.split(r"\cup"), answer.split(r"\cup")]
    if len(sides[0]) == len(sides[1]) == 1:
        return None
    pieces = [
        [bare(piece) for piece in (side if len(side) > 1 else _OR.split(side[0]))] for side in sides
    ]
    if all(len(side) > 1 for side in sides):
        return _compare_items(*pieces, is_ordered=False)
    ranges = [[_range_of(piece) for piece in side] for side in pieces]
    names = {piece[0] for side in ranges for piece in side if piece} - {""}
    is_union = None not in ranges[0] + ranges[1] and len(names) <= 1
    if not is_union or len(ranges[0]) != len(ranges[1]) or len(ranges[0]) > MAX_ITEMS:
        return False, "a union and none"
    left = list(ranges[1])
    for _, *ends in ranges[0]:
        found = [other for other in left if _are_same_ends(ends, other[1:])]
        if not found:
            return False, "ranges"
        left.remove(found[0])
    return True, "ranges"


def _compare_approximations(reference: str, answer: str) -> Decision:
    r"""Decides if the reference is marked as rounded: the answer must round to its digits.

    The mark alone adds nothing to an answer; of `a \approx b` there only a counts.
    """
    parts, others = _APPROXIMATELY.split(reference), _APPROXIMATELY.split(answer)
    if len(parts) == len(others) == 1:
        return None
    if max(len(parts), len(others)) > 2:
        return False, "approximations"
    answer = bare(others[0] or others[-1])
    if len(parts) == 1 or (parts[0] and _compare(bare(parts[0]), answer)[0]):
        return _compare(bare(parts[0]), answer)
    (rounded, unit), (value, other_unit) = split_unit(bare(parts[1])), split_unit(answer)
    if not is_unit_allowed(unit, other_unit) or not re.fullmatch(r"-?\d+\.\d+", rounded):
        return _compare(bare(parts[1]), answer)
    half = Fraction(1, 2 * 10 ** len(rounded.partition(".")[2]))
    try:
        is_close = abs(Fraction(str(value_of(tree_of(value)))) - Fraction(rounded)) <= half
    except (UnreadableError, ValueError):
        return False, "approximations"
    return is_close, "approximations"


def _compare_units(reference: str, answer: str) -> Decision:
    """Takes the units off; the same on both sides, or left out on one."""
    (value, unit), (other, other_unit) = split_unit(reference), split_unit(answer)
    if not unit and not other_unit:
        return None
    if not is_unit_allowed(unit, other_unit):
        return False, "different units"
    return _compare(bare(value), bare(other))


def _compare_expressions(reference: str, answer: str) -> tuple[bool, str]:
    try:
        return are_equal(tree_of(reference), tree_of(answer)), "algebra"
    except UnreadableError as error:
        return False, f"unparsed: {error}"


_STEPS = (
    _compare_words,
    _compare_alternatives,
    _compare_bases,
    _compare_numbers,
    compare_ratios,
    _compare_matrices,
    _compare_approximations,
    _compare_named_tuples,
    _compare_ranges,
    _compare_memberships,
    _compare_unions,
    _compare_lists,
    _compare_relations,
    _compare_units,
)
