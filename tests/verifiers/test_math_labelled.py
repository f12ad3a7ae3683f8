"""Answers labelled by construction: rewritten references are right, perturbed ones are wrong."""

import re

import pytest

from restem_lightning.verifiers import MathVerifier

REFERENCES = [
    *("5", "18", "-7", "0", "243", "1024", "70000", "2,125", "1000000", "57500", "8.5", "0.25"),
    *("-0.75", "12.60", r"\frac{3}{4}", r"-\frac{7}{3}", r"\frac{22}{7}", r"\dfrac{5}{8}"),
    *(r"\frac{101}{250}", "3/8", r"\frac{\pi}{6}", r"12\pi", r"\frac{9\pi}{2}", r"2\sqrt{3}"),
    *(r"7\sqrt{10}", r"\frac{3\sqrt{5}}{2}", r"\frac{\sqrt{2}}{2}", r"3+2\sqrt{2}", r"1-\sqrt{7}"),
    *(r"48\pi-72\sqrt{3}", "3+4i", "-2-i", "x+1", "2x^2-3x+5", "(x-1)(x+4)", "3a^2b", "6-t^3"),
    *(r"\frac{x+1}{x-1}", r"\frac{1}{2m}", "y=2x-3", "x=4", r"\log_2 5", r"2\cos 3t", "2^{n+1}"),
    *("(2,3)", "(-1,0,5)", r"\left(\frac{1}{2},-3\right)", "[0,1)", r"(-\infty,4]", "[2,9]"),
    *(r"(-\infty,1)\cup(1,\infty)", r"[0,2)\cup(5,7]", "1,-2", "3,5,7", r"1+\sqrt{2},1-\sqrt{2}"),
    *(r"\{1,2,6\}", r"50\%", r"12.5\%", r"90^\circ", r"\$18", r"5\text{ cm}", r"12\text{ ways}"),
    *(r"36\pi\text{ square inches}", "1101_2", "152A_{11}", r"\text{odd}", r"\text{(C)}", "Friday"),
    *(r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}0&1\\2&3\end{pmatrix}", r"x\ge 3"),
    *("x^2+y^2=25", "3x-2y+1=0", r"-1<x<4", "3:5", r"\sqrt[3]{4}", r"2\frac{1}{3}", "x_1+x_2"),
]

INTEGER = re.compile(r"-?\d{1,3}(?:,\d{3})+|-?\d+")
FRACTION = re.compile(r"\\d?frac\{(\d+)\}\{(\d+)\}")
SUM = re.compile(r"([^-+=<>,()\[\]&]+)([-+])([^-+=<>,()\[\]&]+)")
PAIR = re.compile(r"(.*?[(\[{]?)([^,()\[\]{}]+),([^,()\[\]{}]+)(.*)")


def rewritten(reference):
    """Yields answers that mean the same as the reference."""
    yield from (reference, f"${reference}$", f"${reference}$.", rf"\boxed{{{reference}}}")
    yield rf"\({reference}\)"
    yield re.sub(r"(?<!^)(?<![(\[{,^_<>=&])([-+=<>])(?!o)", r" \1 ", reference)
    yield re.sub(r",(?!\d{3}(?!\d))", ", ", reference)
    yield reference.replace(r"\frac", r"\dfrac")
    yield reference.replace(r"\dfrac", r"\tfrac").replace(r"\frac", r"\tfrac")
    yield re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", reference)
    yield re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", reference)
    yield re.sub(r"\\d?frac(?=\{)", r"\\frac ", reference)
    if re.fullmatch(r"[(\[](?!.*(?:\)\(|\\cup|\\left)).*[)\]]", reference):
        yield rf"\left{reference[0]} {reference[1:-1]} \right{reference[-1]}"
    yield from _rewritten_numbers(reference)
    yield from _rewritten_terms(reference)


def _rewritten_numbers(reference):
    if INTEGER.fullmatch(reference):
        value = int(reference.replace(",", ""))
        yield from (str(value), f"{value:,}", f"{value}.0", f"{value:,}.00", f"x = {value}")
        yield from (f"{value:,}".replace(",", "{,}"), f"{value:,}".replace(",", r",\!"))
        yield from (f"\\frac{{{2 * value}}}{{2}}", f"{value}/1", f"{value} dollars", f"${value:,}")
        yield from (rf"{value}\text{{ meters}}", f"{value} eggs", rf"\text{{{value}}}")
        yield from (rf"{value}\text{{ students.}}", f"**{value}**", f"{value} cm^2")
    if re.fullmatch(r"-?\d+\.\d+", reference):
        digits = len(reference.partition(".")[2])
        top = int(reference.replace(".", ""))
        yield from (reference + "0", reference.replace("0.", ".", 1) if "0." in reference else "")
        yield from (f"\\frac{{{top}}}{{{10**digits}}}", f"{top}/{10**digits}", f"\\${reference}")
    if match := FRACTION.fullmatch(reference.removeprefix("-")):
        sign, (top, bottom) = "-" * reference.startswith("-"), map(int, match.groups())
        yield from (f"{sign}{top}/{bottom}", f"\\frac{{{sign}{3 * top}}}{{{3 * bottom}}}")
        yield f"{sign}({top}/{bottom})"
        if top > bottom:
            yield f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}"
            yield f"{sign}{top // bottom} {top % bottom}/{bottom}"
        if 1000 % bottom == 0:
            yield f"{sign}{top / bottom}"
    if reference.endswith(r"\%"):
        number = reference[:-2]
        yield from (number + "%", number, f"{number} percent", f"{float(number) / 100:.3f}")
    if reference.endswith(r"^\circ"):
        number = reference.removesuffix(r"^\circ")
        yield from (number, rf"{number}^{{\circ}}", number + "\u00b0", f"{number} degrees")
    if reference.startswith(r"\$"):
        yield from (reference[1:], reference[2:], f"{reference}.00", f"{reference[2:]} dollars")
    if match := re.fullmatch(r"(.*\d(?:\\pi)?)\\text\{ (.*)\}", reference):
        yield from (
            match[1],
            f"{match[1]}\\ \\mathrm{{{match[2]}}}",
            f"{match[1]} \\mbox{{ {match[2]}}}",
        )


def _rewritten_terms(reference):
    match = SUM.fullmatch(reference)
    if match and "{" not in reference:
        first, sign, second = match.groups()
        yield f"{second}+{first}" if sign == "+" else f"-{second}+{first}"
    if match := re.fullmatch(r"(\d+)\\sqrt\{(\d+)\}", reference):
        number, radicand = map(int, match.groups())
        yield from (rf"\sqrt{{{number**2 * radicand}}}", rf"{number} \cdot \sqrt{{{radicand}}}")
        yield rf"\frac{{{number * radicand}}}{{\sqrt{{{radicand}}}}}"
    if match := re.fullmatch(r"\\frac\{(.*)(\\(?:pi|sqrt\{\d+\}))\}\{(\d+)\}", reference):
        top, factor, bottom = match.groups()
        yield from (rf"\frac{{{top or 1}}}{{{bottom}}}{factor}", f"({top}{factor})/{bottom}")
    if not re.search(r"[(\[\\]", reference.replace("\\sqrt", "")) and re.fullmatch(
        r"[^,]+(?:,[^,]{1,2}|,[^,]{4,})+", reference
    ):
        items = reference.split(",")
        yield from (",".join(items[::-1]), r"\text{ and }".join(items[::-1]), " or ".join(items))
    if reference.startswith(r"\{"):
        yield r"\{" + ", ".join(reference[2:-2].split(",")[::-1]) + r"\}"
    if match := re.fullmatch(r"(\w+)_\{?(\d+)\}?", reference):
        yield from (f"{match[1]}_{{{match[2]}}}", rf"{match[1]}_{{{match[2]}}}.")
    if r"\cup" in reference:
        yield r" \cup ".join(reference.split(r"\cup")[::-1])
    if r"\text" in reference and "(" not in reference and not re.search(r"\d", reference):
        yield from (reference.replace(r"\text{", "").rstrip("}"), reference.replace("odd", "Odd"))
    if "pmatrix" in reference:
        yield reference.replace("pmatrix", "bmatrix")
        yield reference.replace("&", " & ").replace(r"\\", r" \\ ")


def perturbed(reference):
    """Yields answers that mean something else than the reference."""
    digits = list(re.finditer(r"(?<![\d.a-z])\d+(?:\.\d+)?", reference))
    for match in (digits[0], digits[-1]) if digits else ():
        for changed in (str(int(float(match[0])) + 1), match[0] + "1"):
            yield reference[: match.start()] + changed + reference[match.end() :]
    yield from _perturbed_numbers(reference)
    yield from _perturbed_structures(reference)
    if re.search(r"(?<![a-z\\])[xyabt](?![a-z])", reference):
        yield re.sub(r"(?<![a-z\\])[xyabt](?![a-z])", "q", reference)
    for sign, other in (("+", "-"), ("-", "+")):
        if sign in reference[1:]:
            yield reference[0] + reference[1:].replace(sign, other, 1)
    yield from (f"{reference} or 77", rf"{reference}\text{{ or }}77", f"{reference}, 77")
    yield from (f"not {reference}", f"{reference}+10^{{-40}}", "")


def _perturbed_numbers(reference):
    plain = reference.replace(",", "")
    if re.fullmatch(r"-?\d+(?:\.\d+)?", plain) and plain != "0":
        value = float(plain)
        yield from (
            f"{value * 100:.2f}",
            f"{value / 100:.4f}",
            f"{value * 1000:.1f}",
            f"-({plain})",
        )
        yield from (f"{plain}.0001" if "." not in plain else plain + "1", f"{value * 1000:g}\\%")
        yield from (f"{plain} thousand", f"{plain} dozen", f"{plain}x", f"{plain}^2", f"{plain}_7")
        yield from (f"{plain}\\pi", f"\\sqrt{{{plain}}}", f"{plain} or so", f"{plain} {plain}")
    if match := FRACTION.fullmatch(reference.removeprefix("-")):
        top, bottom = map(int, match.groups())
        sign = "-" * reference.startswith("-")
        yield from (
            rf"{sign}\frac{{{bottom}}}{{{top}}}",
            f"{sign}{top},{bottom}",
            f"{sign}{top}{bottom}",
        )
        yield from (f"{sign}{top / bottom:.2f}1", f"{sign}{top / bottom:.12f}9")
    if reference.endswith(r"\%"):
        yield from (f"{float(reference[:-2]) * 100:g}", f"{float(reference[:-2]) / 100:g}\\%")
    if re.search(r"(?:cm|inches)\}$", reference):
        yield from (reference.replace("cm", "m"), reference.replace("inches", "feet"))
    if reference.startswith(r"\$"):
        yield from (f"{reference[2:]} cents", f"{reference}.01", f"{reference} million")


def _perturbed_structures(reference):
    if re.fullmatch(r"[(\[].*,.*[)\]]", reference) and r"\cup" not in reference:
        inner = reference[1:-1]
        for opened, closed in ("()", "[]", "[)", "(]"):
            if (opened, closed) != (reference[0], reference[-1]):
                yield opened + inner + closed
        yield from (f"{reference[:-1]},1{reference[-1]}", inner)
        items = inner.split(",")
        if items[0] != items[1] and "frac" not in inner:
            yield reference[0] + ",".join([items[1], items[0], *items[2:]]) + reference[-1]
    if r"\cup" in reference:
        first, _, second = reference.partition(r"\cup")
        yield from (
            first,
            second,
            reference.replace(r"\cup", r"\cap"),
            reference.replace("(1", "[1"),
        )
    if re.search(r"[<>]|\\ge", reference):
        yield from (reference.replace("<", r"\le", 1), reference.replace(r"\ge", ">"))
        yield from (reference.replace("<", ">"), reference.replace(r"\ge", r"\le"))
    if r"\sqrt{" in reference:
        yield from (reference.replace(r"\sqrt{", r"\sqrt[3]{"), reference.replace(r"\sqrt", ""))
    if r"\frac{" in reference and "x" in reference:
        yield reference.replace(r"\frac{x+1}{x-1}", "x+1/x-1")
    if "^{" in reference:
        yield reference.replace("{", "").replace("}", "")
    if "pmatrix" in reference:
        yield (
            reference.replace(r"\\", "&") if "&" not in reference else reference.replace("&", r"\\")
        )
    if re.search("[A-Za-z]{3}", reference) and "\\" not in reference:
        yield from ("Monday", reference + " and Monday", reference[::-1])


@pytest.mark.parametrize("reference", REFERENCES)
def test_rewritten_references_are_accepted(reference):
    answers = [answer for answer in rewritten(reference) if answer]
    verifier = MathVerifier()
    assert [answer for answer in answers if not verifier.compare(reference, answer)[0]] == []


@pytest.mark.parametrize("reference", REFERENCES)
def test_perturbed_references_are_refused(reference):
    answers = [answer for answer in perturbed(reference) if answer != reference]
    verifier = MathVerifier()
    assert [answer for answer in answers if verifier.compare(reference, answer)[0]] == []
