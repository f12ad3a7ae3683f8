"""Answers as text: light normalisation, exact numbers, units, lists; no computer algebra."""

import re
from fractions import Fraction

MAX_POWER_BITS = 4_000

_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|displaystyle)\s*\{(.*)\}", re.DOTALL)
_LAYOUT = ("left", "right", "displaystyle", "limits")
_UNICODE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("[\u200b\u2060\ufeff]", ""),
        ("\u00b0", r"^\\circ"),
        ("\u2264", r"\\le "),
        ("\u2265", r"\\ge "),
        ("\u2260", r"\\ne "),
        ("\u222a", r"\\cup "),
        ("\u2212|\\A\u2013", "-"),
        ("\u00d7", r"\\times "),
        ("\u00b7", r"\\cdot "),
        ("\u00f7|\u2044|\u2215", "/"),
        ("\u03c0", r"\\pi "),
        ("\u221e", r"\\infty "),
        ("\u2205", r"\\emptyset "),
        ("\u00b2", "^2"),
        ("\u00b3", "^3"),
        ("\u00bd", r"\\frac{1}{2}"),
        ("\u00bc", r"\\frac{1}{4}"),
        ("\u00be", r"\\frac{3}{4}"),
        (r"\u221a(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}"),
        (r"\u221a(?=[({])", r"\\sqrt"),
    )
)
# (what a text must hold for the pattern to match at all, the pattern, its replacement)
_REPLACEMENTS = tuple(
    (needed, re.compile(pattern), replacement)
    for needed, pattern, replacement in (
        # A money sign is escaped, or alone before a number; any other $ delimits mathematics.
        ("$", r"\\\$|\A\s*\$(?=\s*[-\d.][^$]*\Z)|(?<=\A-)\$(?=[^$]*\Z)", r"\\dollar "),
        ("\\!", r"(?<=\d),\\!\s*(?=\d{3})", ","),
        *((rf"\{name}", rf"\\{name}(?![A-Za-z])", "") for name in _LAYOUT),
        ("\\!", r"(?<!\\)\\!", ""),
        ("$", r"(?<=\d)\$+(?=\d)", " "),
        ("$", r"\$", ""),
        ("\\mathbb", r"\\mathbb\s*(?:R(?![A-Za-z])|\{R\})", r"(-\\infty,\\infty)"),
        ("\\math", r"\\math(?:rm|it)\s*\{([ei])\}", r"\1"),
        ("\\math", r"\\math(?:rm|bf|it)\s*\{", r"\\text{"),
        ("\\b", r"\\(?:boldsymbol|bm)\s*\{", r"\\text{"),
        ("\\text", r"\\text(?:bf|rm|it|normal)\s*\{", r"\\text{"),
        ("\\mbox", r"\\mbox\s*\{", r"\\text{"),
        ("\\text", r"\\text\{([0-9A-Z]+)\}(?=_)", r"\1"),
        ("ig", r"\\(?:big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])", ""),
        ("brac", r"\\([lr]brace)(?![A-Za-z])", lambda m: {"l": r"\{", "r": r"\}"}[m[1][0]]),
        ("brac", r"\\([lr]brack)(?![A-Za-z])", lambda m: {"l": "[", "r": "]"}[m[1][0]]),
        ("vert", r"\\vert(?![A-Za-z])", "|"),
        ("binom", r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        ("\\choose", r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}", r"\\binom{\1}{\2}"),
        ("\\over", r"\{([^{}]+)\\over(?![A-Za-z])([^{}]+)\}", r"\\frac{\1}{\2}"),
        ("frac", r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        ("frac", r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (",", r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ","),
        ("\\", r"(?<!\\)\\[,;: ]", " "),
        ("quad", r"\\q?quad(?![A-Za-z])", " "),
        ("~", "~", " "),
        ("%", r"\\%", "%"),
        ("\\circ", r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ", r"^\\circ"),
        ("\\degree", r"\\degree", r"^\\circ"),
        ("\\leq", r"\\leq(?:slant)?(?![A-Za-z])", r"\\le "),
        ("<=", "<=", r"\\le "),
        ("\\geq", r"\\geq(?:slant)?(?![A-Za-z])", r"\\ge "),
        (">=", ">=", r"\\ge "),
        ("\\neq", r"\\neq(?![A-Za-z])", r"\\ne "),
        ("\\varn", r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        ("\\{", r"\\\{\s*\\\}", r"\\emptyset "),
        ("", r"\s+", " "),
        # No space is left but between letters, digits or points, and after a comma before a digit.
        (" ", r"(?<![A-Za-z0-9.,]) | (?![A-Za-z0-9.])|(?<=,) (?!\d)", ""),
        (" ", r"(\\[A-Za-z]+) (?=\d)", r"\1"),
        ("+", r"(?:(?<=,)|\A)\+(?=\\infty)", ""),
    )
)
_AS_IT_IS = re.compile(r"[A-Za-z0-9]+|-?\d+(?:[.,]\d+)*", re.ASCII)

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_PLAIN = re.compile(rf"{_DIGITS}(?:\.\d*)?|\.\d+")
_FRACTION = re.compile(
    r"(?P<whole>\d+)?\\frac\{(?P<top>[^{}]+)\}\{(?P<bottom>[^{}]+)\}"
    r"|(?:(?P<whole2>\d+) )?(?P<top2>[^/{} ]+)/(?P<bottom2>[^/{} ]+)"
)
_SCIENTIFIC = re.compile(
    r"([\d.,]+)(?:\\times|\\cdot|\*) ?10\^\{?(-?\d{1,3})\}?|([\d.]+)[eE](-?\d{1,3})"
)
_POWER = re.compile(r"(\d{1,50})\^\{?(-?\d{1,4})\}?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d{1,50})\}")
_UNIT = re.compile(
    r"(?P<value>.*?[\w}).])"
    r"(?: ?\\text\{ ?(?P<text>[A-Za-z][A-Za-z ./-]*)(?:\^\{?(?P<inner>[23])\}?)?\}"
    r"|(?<=[\d}.])(?P<word>[A-Za-z]{2}[A-Za-z ]*)| (?P<noun>[A-Za-z]{2}[A-Za-z ]*))"
    r"(?:\^\{?(?P<power>[23])\}?)?"
)
_UNITS = {
    **dict.fromkeys(("dollar", "dollars", "usd", "bucks"), "dollar"),
    **dict.fromkeys(("cent", "cents"), "cent"),
    **dict.fromkeys(("degree", "degrees", "deg"), "degree"),
    **dict.fromkeys(("percent", "per cent"), "%"),
    **dict.fromkeys(("unit", "units"), "unit"),
    **dict.fromkeys(("mm", "millimeter", "millimeters"), "mm"),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), "cm"),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometers"), "km"),
    **dict.fromkeys(("in", "inch", "inches"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"),
    **dict.fromkeys(("yd", "yard", "yards"), "yd"),
    **dict.fromkeys(("mi", "mile", "miles"), "mi"),
    **dict.fromkeys(("g", "gram", "grams"), "g"),
    **dict.fromkeys(("kg", "kilogram", "kilograms"), "kg"),
    **dict.fromkeys(("oz", "ounce", "ounces"), "oz"),
    **dict.fromkeys(("lb", "lbs", "pound", "pounds"), "lb"),
    **dict.fromkeys(("ml", "milliliter", "milliliters"), "ml"),
    **dict.fromkeys(("l", "liter", "liters", "litre", "litres"), "l"),
    **dict.fromkeys(("gallon", "gallons"), "gallon"),
    **dict.fromkeys(("s", "sec", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "day"),
    **dict.fromkeys(("week", "weeks"), "week"),
    **dict.fromkeys(("month", "months"), "month"),
    **dict.fromkeys(("year", "years"), "year"),
    **dict.fromkeys(("mph", "miles per hour", "miles/hour"), "mph"),
}
_POWERS = {"square": "2", "sq": "2", "cubic": "3"}
# Words that change the value of the number before them, or that hedge.
_NO_NOUNS = frozenset(
    (
        *("zero", "zeroe", "four", "five", "six", "seven", "eight", "nine", "eleven", "twelve"),
        *(
            "twenty",
            "thirty",
            "fifty",
            "grand",
            "point",
            "below",
            "above",
            "under",
            "gross",
            "each",
        ),
        *("t", "and", "or", "not", "to", "minus", "plus", "times", "over", "hundred", "thousand"),
        *("million", "billion", "trillion", "dozen", "score", "half", "halve", "third"),
        *("quarter", "double", "triple", "pair", "percent", "percentage", "more", "less"),
        *("fewer", "remainder", "squared", "square", "cubed", "factorial", "mod", "modulo"),
        *("base", "negative", "infinity", "so", "maybe", "else", "ten", "one", "two", "three"),
        *("pi", "theta", "alpha", "beta", "gamma", "delta", "lambda", "phi", "omega", "sin"),
        *("cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "of"),
        *("is", "are", "was", "were", "if", "when", "where", "while", "unless", "except", "but"),
        *("most", "least", "maximum", "minimum", "max", "than", "greater", "larger", "smaller"),
        *("higher", "lower", "about", "around", "approximately", "approx", "roughly", "nearly"),
        *("almost", "ish", "no", "nor", "never", "neither", "either", "cannot", "wrong"),
        *("incorrect", "false", "guess", "perhaps", "possibly", "probably", "may", "might"),
    )
)
_MATRIX = re.compile(
    r"[(\[]?\\begin\{(?:[pb]?matrix\}|array\}\{[clr]*\})((?:(?!\\begin).)*)"
    r"\\end\{(?:[pb]?matrix|array)\}[)\]]?",
    re.DOTALL,
)
_ROW_END = re.compile(r"\\\\(?:\[\d*\.?\d*(?:pt|em|ex|mm|cm)\])?")
_CONJUNCTION = re.compile(r"\\text\{,? ?(?:or|and) ?\}|\b(?:or|and)\b")
_TIME = re.compile(
    r"(\d{1,2})(?::(\d\d))?(?:(?: ?|\\text\{ ?)([ap])\.?m\.?\}?)?", re.ASCII | re.IGNORECASE
)
_TO = re.compile(r" ?\\text\{ ?to ?\} ?| to ")
_OPENING, _CLOSING = "([{", ")]}"


def bare(answer: str) -> str:
    r"""Returns the answer without delimiters, wrappers, layout commands and needless spaces.

    Money signs go too. Spaces between digits stay: `10 24` is not 1024.
    """
    answer = answer.strip()
    if _AS_IT_IS.fullmatch(answer):
        return answer
    if answer.startswith(("**", "`")) or answer.endswith("**"):
        answer = answer.strip("*` ")
    for pattern, replacement in () if answer.isascii() else _UNICODE:
        answer = pattern.sub(replacement, answer)
    for needed, pattern, replacement in _REPLACEMENTS:
        if needed in answer:
            answer = pattern.sub(replacement, answer)
    while True:
        inner = answer.strip()
        if not inner.endswith("..."):  # 3.14... goes on
            inner = inner.rstrip(".,;:")
        inner = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", inner)
        wrapped = _WRAPPED.fullmatch(inner)
        if wrapped and _is_balanced(wrapped[1]):
            inner = wrapped[1]
        elif inner[:1] == "(" and inner[-1:] == ")" and _is_balanced(inner[1:-1]):
            inner = inner[1:-1] if len(_split(inner[1:-1])) == 1 else inner
        if inner == answer:
            return answer
        answer = inner


def exact_number(text: str) -> Fraction | None:
    r"""Returns the exact value of a bare number, None if it is anything else.

    Integers and decimals with or without thousands separators (in correct groups of three), a/b,
    \frac{a}{b}, mixed numbers, a \times 10^b, and powers of integers that stay small.
    """
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-").removeprefix("+") if text[:1] in "+-" else text
    if _PLAIN.fullmatch(text):
        return sign * Fraction(text.replace(",", "").rstrip("."))
    if match := _FRACTION.fullmatch(text):
        top = exact_number(match["top"] or match["top2"])
        bottom = exact_number(match["bottom"] or match["bottom2"])
        whole = match["whole"] or match["whole2"]
        if top is None or not bottom or (whole and not 0 < top < bottom):
            return None
        return sign * (int(whole or 0) + top / bottom)
    if match := _REPEATING.fullmatch(text):
        whole, fixed, period = match.groups()
        scale = 10 ** len(fixed)
        tail = Fraction(int(period), scale * (10 ** len(period) - 1))
        return sign * (Fraction(int(whole + fixed or "0"), scale) + tail)
    if match := _SCIENTIFIC.fullmatch(text):
        factor = exact_number(match[1] or match[3])
        return None if factor is None else sign * factor * Fraction(10) ** int(match[2] or match[4])
    if match := _POWER.fullmatch(text):
        base, exponent = int(match[1]), int(match[2])
        if base.bit_length() * abs(exponent) <= MAX_POWER_BITS and (base or exponent > 0):
            return sign * Fraction(base) ** exponent
    return None


def quantity(text: str) -> tuple[Fraction | None, str]:
    """Returns the exact value of a number and its unit ("" for none, "%", "cm2", ...)."""
    value, unit = split_unit(text)
    return exact_number(value), unit


def split_unit(text: str) -> tuple[str, str]:
    r"""Returns a text without its unit, and the unit: "" for none, "%", "dollar", "cm2", "eggs".

    A noun is a unit too, unless it changes the value (dozen, hundredths) or hedges.
    """
    if match := re.match(r"(-?)\\dollar ?(?=[-\d.\\])", text):
        value, unit = split_unit(match[1] + text[match.end() :])
        return (value, "dollar") if unit in ("", "dollar") else (text, "")
    for ending, unit in (("%", "%"), (r"^\circ", "degree")):
        value = text.removesuffix(ending).strip()
        if value != text and exact_number(inner := bare(value)) is not None:
            return inner, unit
    if match := _UNIT.fullmatch(text):
        name = match["text"] or match["word"] or match["noun"]
        words = name.lower().replace(".", "").split()
        power = match["power"] or match["inner"] or ""
        if len(words) > 1 and words[0] in _POWERS:
            power = _POWERS[words.pop(0)]
        unit = None if name == "M" else _UNITS.get(" ".join(words))  # 5 M is 5 million
        if unit is None and not match["word"] and words and _is_noun(words):
            unit = " ".join(words).rstrip("s")
        if unit is not None:
            return match["value"].strip(), unit + power
    return text, ""


def is_unit_allowed(unit: str, other: str) -> bool:
    """Returns whether two units agree: the same, or left out on one side."""
    return unit == other or not unit or not other


def _is_noun(words: list[str]) -> bool:
    is_short = len(words) <= 4 and max(map(len, words)) <= 20
    return (
        is_short
        and len(words[0]) > 1
        and not any(
            word.rstrip("s") in _NO_NOUNS
            or word.rstrip("s").endswith(("th", "fold"))
            or word in _NO_NOUNS
            for word in words
        )
    )


def compare_ratios(reference: str, answer: str) -> tuple[bool, str] | None:
    """Returns whether a time or a ratio 3:5 equals an answer, None if the reference is neither.

    3:5 is 6:10, 3/5 and `3 to 5`, but 4:30 may be a time, so it is not 2:15. Hours after noon are
    not converted; a.m. and p.m. may be left out on one side.
    """
    if ":" not in reference and "m" not in reference[-3:].lower():  # most are neither
        return None
    times = [_TIME.fullmatch(text) for text in (reference, answer)]
    if all(time and (time[2] or time[3]) for time in times):
        clocks = [(int(time[1]), int(time[2] or 0)) for time in times]
        halves = [(time[3] or "").lower() for time in times]
        return clocks[0] == clocks[1] and is_unit_allowed(*halves), "times"
    terms = [exact_number(part) for part in reference.split(":")]
    if len(terms) < 2 or not all(terms):
        return None
    others = [exact_number(part) for part in _TO.sub(":", answer).split(":")]
    if len(others) == 1 and len(terms) == 2:
        return others[0] == terms[0] / terms[1], "ratios"
    is_equal = len(terms) == len(others) and all(others)
    return is_equal and len({a / b for a, b in zip(terms, others, strict=True)}) == 1, "ratios"


def matrix_rows(text: str) -> list[list[str]] | None:
    """Returns the cells of a matrix row by row, None if the text is no matrix."""
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in _ROW_END.split(match[1]) if row.strip()]
    return [[bare(cell) for cell in row.split("&")] for row in rows]


def split_items(text: str) -> tuple[str, list[str]]:
    r"""Returns the brackets around a list and its items.

    The brackets are two characters such as "()" or "[)", "{}" for \{...\}, or "" for none.
    """
    if quantity(text)[0] is not None:
        return "", [text]
    plain = text.replace(r"\{", "{").replace(r"\}", "}") if text.startswith(r"\{") else text
    is_set = plain is not text
    if plain[:1] in ("(", "[", "{"[: int(is_set)] or "(") and plain[-1:] in tuple(")]}"):
        inner = plain[1:-1]
        parts = [value for part in _split(inner) for value in _expand_sign(part, is_set)]
        items = [bare(part) for part in parts]
        if _is_balanced(inner) and (len(items) > 1 or is_set):
            return plain[0] + plain[-1], items
    parts = _split(_CONJUNCTION.sub("\0", text))
    return "", [bare(value) for part in parts for value in _expand_sign(part)]


def _expand_sign(text: str, is_several: bool = True) -> list[str]:
    r"""Writes a\pm b as the two values that it stands for."""
    if not is_several or len(re.findall(r"\\pm(?![A-Za-z])", text)) != 1:
        return [text]
    return [text.replace(r"\pm", "+").strip().removeprefix("+"), text.replace(r"\pm", "-")]


def _split(text: str) -> list[str]:
    """Splits at commas, semicolons and separators outside brackets."""
    items, depth = [""], 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth == 0 and char in ",;\0":
            items.append("")
        else:
            items[-1] += char
    return [item for item in items if item.strip()]


def nesting(text: str) -> int:
    """Returns how deep brackets are nested, whatever their kinds; -1 if one closes too early."""
    depth = deepest = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        deepest = max(deepest, depth)
        if depth < 0:
            return -1
    return deepest


def _is_balanced(text: str) -> bool:
    opened = sum(char in _OPENING for char in text)
    return nesting(text) >= 0 and opened == sum(char in _CLOSING for char in text)
