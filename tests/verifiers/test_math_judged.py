r"""Answers labelled by hand, class by class, before the verifier had seen them.

A policy's answer is right if a strict examiner who knows the reference would give the mark. It is
wrong if its value differs, or if it hedges, is only near, or says something else beside the answer.
"""

import pytest

from restem_lightning.verifiers import MathVerifier

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
UNION = r"(-\infty,-2)\cup(2,\infty)"

RIGHT = {
    "integer": {
        "72": [
            "72.",
            "72.00",
            r"\,72",
            "**72**",
            r"$72$",
            "x=72",
            "72 apples",
            "+72",
            "(72)",
            "n = 72",
        ],
        "1000": ["1,000", r"1{,}000", r"1\,000", "1e3", "10^3", r"10^{3}", "$1,000", "1000.0"],
        "-3": ["\u22123", "- 3", r"\frac{-6}{2}", "-3.0", "(-3)", r"-\frac{3}{1}"],
        "0": ["-0", "0.0", r"0^\circ", "0/5"],
        "8": [r"\sqrt{64}", "2^3", "|-8|", r"\left|-8\right|", r"\frac{16}{2}", "2+6", r"2\cdot 4"],
        "120": ["5!", r"\frac{6!}{6}", r"\binom{10}{3}", r"1.2\times 10^2", "120 ways"],
        "16": ["(-2)^4", r"4^2", r"\log_2 65536"],
    },
    "fraction": {
        r"\frac{3}{4}": [
            "0.75",
            ".75",
            "3/4",
            r"\dfrac{3}{4}",
            r"\frac34",
            r"\frac{6}{8}",
            "0.750",
        ],
        r"\frac{14}{3}": ["14/3", r"4\frac{2}{3}", "4 2/3", r"\frac{28}{6}", r"4+\frac{2}{3}"],
        r"-\frac{2}{5}": ["-0.4", r"\frac{-2}{5}", r"\frac{2}{-5}", "-2/5", "-(2/5)"],
        r"\frac{1}{9}": [r"0.\overline{1}", r"9^{-1}", r"\frac{1}{3^2}"],
        "3.5": [r"3\frac{1}{2}", "3 1/2", "7/2", r"3\tfrac12", "3.50"],
        r"-1\frac{1}{2}": ["-1.5", r"-\frac{3}{2}", "-1 1/2"],
    },
    "percent and money": {
        r"45\%": ["45%", "45 percent", r"45\text{ percent}", "45", "0.45", r"\frac{9}{20}"],
        "0.08": ["8%", r"8\%", r"\frac{2}{25}"],
        r"\$3.50": ["3.5", "$3.50", r"\$3.5", "3.50 dollars", r"\frac72"],
        "2280": ["$2,280", r"\$2{,}280.00", "2280 dollars", "$2280.", "2,280 USD"],
    },
    "scientific": {
        r"3.2\times 10^{-4}": [
            "0.00032",
            "3.2e-4",
            r"3.2\cdot 10^{-4}",
            "3.2E-4",
            r"32\times 10^{-5}",
        ],
        r"6.02\times10^{23}": ["6.02e23", r"60.2\times 10^{22}", r"6.02 \cdot 10^{23}"],
    },
    "list": {
        "(3,-1)": ["(3, -1)", r"\left(3,-1\right)", r"(3.0,-\frac{2}{2})", "(x,y)=(3,-1)"],
        r"\{1,2,3\}": [r"\{3,1,2\}", r"\{1, 2, 3\}", "1,2,3", r"\left\{2,1,3\right\}"],
        "1,2,3": ["3, 2, 1", "1, 2, and 3", "1, 2, 3.", "1,2 and 3", r"1, 2\text{ and }3"],
        "2,-3": ["x=2, x=-3", r"x=2\text{ or }x=-3", "-3, 2", "x=2 or -3", "x = -3, 2"],
        r"1\pm\sqrt{2}": [r"1+\sqrt{2}, 1-\sqrt{2}", r"1-\sqrt2,1+\sqrt2"],
        "3:4": ["3 : 4", "$3:4$"],
    },
    "interval": {
        "(-1,3]": [r"\left(-1,3\right]", r"x\in(-1,3]", r"-1<x\le 3", r"3 \geq x > -1"],
        "[2,\\infty)": [
            r"[2, \infty)",
            r"x \geq 2",
            r"2\le x",
            r"[2,+\infty)",
            r"\left[2,\infty\right)",
        ],
        r"(-\infty,4)": ["x<4", "4>x", r"(-\infty, 4)", r"x \in (-\infty,4)"],
        UNION: [r"(2,\infty)\cup(-\infty,-2)", r"\left(-\infty,-2\right)\cup\left(2,\infty\right)"],
        r"x\ge 2": [r"[2,\infty)", r"x \geq 2", "2<=x", "x >= 2", r"x\in[2,\infty)"],
        "1<x<2": ["(1,2)", "2>x>1", r"1 < x < 2", r"x\in(1,2)"],
        "x<-1": [r"(-\infty,-1)", "-1>x", "2x<-2"],
    },
    "matrix": {
        MATRIX: [
            MATRIX.replace("pmatrix", "bmatrix"),
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            r"\begin{pmatrix}\frac{2}{2}&2\\3&\sqrt{16}\end{pmatrix}",
            r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)",
            r"\begin{bmatrix}1&2\\3&4\\\end{bmatrix}",
        ],
    },
    "equation": {
        "y=2x+1": ["y = 1+2x", "2x-y+1=0", "y-2x=1", "2x+1"],
        "2x+4y=6": ["x+2y=3", "4y+2x=6", "3-2y=x"],
        r"x\le -1": ["x <= -1", r"-1\ge x", r"x\leq-1"],
    },
    "unit": {
        r"5\text{ cm}": ["5", "5 cm", "5cm", r"5\,\mathrm{cm}", "5 centimeters"],
        r"60^\circ": ["60", "60 degrees", r"60^{\circ}", "60\u00b0"],
        "25": ["25 mph", "25 miles per hour", "25 hours", r"25\text{ cm}^2", "25 square feet"],
    },
    "text": {
        "Tuesday": ["tuesday", r"\text{Tuesday}", "Tuesday.", r"\textbf{Tuesday}"],
        r"\text{(B)}": ["(B)", "B", r"\textbf{(B)}", r"\mathrm{(B)}"],
        "(C)": ["C", "(C).", r"\text{(C)}"],
        "yes": ["Yes", "yes.", r"\text{Yes}"],
        "False": ["false", "False."],
        r"\text{even}": ["even", "Even"],
    },
    "base": {
        "2102_3": ["2102_{3}", "2102", r"2102_{3}."],
        "FF_{16}": ["FF_{16}"],
    },
    "algebra": {
        "x^2-1": ["(x-1)(x+1)", "-1+x^2", r"(x+1)\cdot(x-1)", "x^{2}-1"],
        r"2\sqrt{3}": [r"\sqrt{12}", r"\frac{6}{\sqrt{3}}", r"2\cdot\sqrt3", r"2\cdot 3^{1/2}"],
        r"\frac{\sqrt{3}}{3}": [r"\frac{1}{\sqrt{3}}", r"\sqrt{\frac13}", r"\sqrt{3}/3"],
        r"\sqrt{2}+\sqrt{3}": [r"\sqrt{5+2\sqrt{6}}", r"\sqrt3+\sqrt2"],
        r"36\pi": [r"\pi\cdot 36", r"6^2\pi", "36\u03c0"],
        "3-4i": ["-4i+3", r"3-4\cdot i"],
        r"\ln 4": [r"2\ln 2", r"\ln(4)"],
        r"\frac{3x}{4}": [r"\frac{3}{4}x", "0.75x", "3x/4"],
        r"\frac{n(n+1)}{2}": [r"\frac{n^2+n}{2}", "n(n+1)/2", r"\binom{n+1}{2}"],
        r"\cos 2x": [r"1-2\sin^2 x", r"\cos(2x)", r"2\cos^2 x-1"],
    },
}

WRONG = {
    "integer": {
        "72": ["-72", "7.2", "720", "72.5", "72!", "27", "72x", "7 2", "0.72", "72,000", "72/2"],
        "1000": ["1.000", "1,00", "100", "10,00", "10^4", "10^{-3}", "1000 thousand", "1 000 000"],
        "-3": ["3", "--3", "-3.01", "|-3|", "(-3)^2"],
        "16": ["-2^4", "2^{-4}", "-4^2", "(-4)^{2}+1"],
        "7": [
            "7 or 8",
            "7 and 8",
            "either 7 or 8",
            "7 (or 8)",
            "about 7 or so",
            r"7\pm 1",
            "not 7",
        ],
        "9": [
            "at least 9",
            "9 or more",
            "more than 9",
            "less than 9",
            "9-10",
            "9 to 10",
            "9 plus 1",
        ],
        "5": ["5k", "5 million", "5 dozen", "5/0", "5, 5", "5; 6", "5 5", "5 and a half", "5 1/2"],
        "12": ["1,2", "12 minus 1", "12 hundred", "12 times 2", "12 = 13", "12 twelfths", "1/2"],
    },
    "fraction": {
        r"\frac{3}{4}": ["4/3", "0.7", "3.4", "34", r"-\frac34", "0.075", "3,4", r"\frac{3}{4}x"],
        r"\frac{2}{3}": ["0.67", "0.6666666667", "0.66", r"2\frac{1}{3}", r"\frac{3}{2}", r"66\%"],
        "3.5": ["31/2", "3 1/5", r"\frac{31}{2}", "3,5", "3 5", "35"],
        r"-1\frac{1}{2}": ["-0.5", "1.5", r"-\frac12", r"-\frac{11}{2}"],
        "0.12": [r"0.1\overline{2}", "1.2", "0.012", "12"],
    },
    "percent and money": {
        r"45\%": [r"4.5\%", "0.045", "4500", r"450\%", r"0.45\%", "45 dollars"],
        "0.5": ["5%", r"0.5\%", "500%", "5"],
        r"\$3.50": ["350", "3.5 cents", "$35", r"\$3.05", "3.50 euros and 1", "$3.50 or $4"],
        r"\$5": ["5 cents", r"5\%", "5 thousand dollars", "-$5"],
    },
    "scientific": {
        r"3.2\times 10^{-4}": [r"3.2\times 10^4", "0.0032", "3.2e-5", r"3.2\times 10^{-4}+1"],
        "1500": [r"1.5\times 10^4", "1.5e2", r"1.5\times 10^{-3}", "1.5"],
    },
    "list": {
        "(3,-1)": [
            "(-1,3)",
            "(3,1)",
            "[3,-1]",
            "(3,-1]",
            "(3,-1,0)",
            "3",
            r"(3,-1),(0,0)",
            r"\{3,-1\}",
        ],
        r"\{1,2,3\}": [
            r"\{1,2\}",
            r"\{1,2,3,4\}",
            r"\{1,2,4\}",
            "123",
            "(1,2,3)",
            r"\{\{1,2,3\},4\}",
        ],
        "1,2,3": ["1,2", "1,2,3,4", "1,2,-3", "123", "1,23", "6"],
        "2,-3": ["2,3", "2", "-2,3", "x=2", "(2,-3)", r"x=2\text{ or }x=3"],
        r"1\pm\sqrt{2}": [r"1+\sqrt{2}", r"1\pm\sqrt{3}", r"\pm\sqrt2", r"-1\pm\sqrt2"],
        "3:4": ["4:3", "3,4", "3.4", "34", "3:4:5"],
    },
    "interval": {
        "(-1,3]": [
            r"-1\le x<3",
            "-1<x<3",
            r"-1\le x\le 3",
            "[-1,3)",
            "x>-1",
            r"-1<x\le 4",
            r"x\le 3",
        ],
        "[2,\\infty)": ["x>2", r"x\le 2", r"(2,\infty)", r"[-2,\infty)", r"x\ge -2", "x=2", "2"],
        r"(-\infty,4)": [r"x\le 4", "x>4", r"(-\infty,4]", r"(4,\infty)", r"-4<x<4", r"(\infty,4)"],
        UNION: [
            "(-2,2)",
            r"(-\infty,-2)\cap(2,\infty)",
            r"(-\infty,-2]\cup[2,\infty)",
            r"(2,\infty)",
            "x>2",
            "-2<x<2",
            r"x<-2\text{ and }x>3",
        ],
        r"x\ge 2": [
            r"(2,\infty)",
            r"t\in[2,\infty)",
            "x>2",
            r"(-\infty,2]",
            r"[2,3)",
            "2",
            "x=2",
            "[2,2]",
        ],
        "1<x<2": ["[1,2]", "(1,2]", "(2,1)", "1,2", r"\{1,2\}", "(1,2,3)", "(1,3)", r"1\le x\le 2"],
        "(1,2)": ["1<x<2", "2>x>1", "(1.2)", r"x=1\text{ or }y=2"],
        "-2<x<2": [r"x<2\text{ or }x>-2", "|x|>2", "x<2", "-2>x>2", "(2,-2)"],
    },
    "matrix": {
        MATRIX: [
            r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
            r"\begin{pmatrix}1&2&3&4\end{pmatrix}",
            r"\begin{pmatrix}1&2\\3&-4\end{pmatrix}",
            r"\begin{pmatrix}1&2\\3&4\\0&0\end{pmatrix}",
            MATRIX.replace("pmatrix", "vmatrix"),
            f"2{MATRIX}",
            f"{MATRIX}^2",
            f"-{MATRIX}",
            "1,2,3,4",
        ],
    },
    "equation": {
        "y=2x+1": [
            "y=2x-1",
            "x=2y+1",
            "y=2x",
            r"y\ge 2x+1",
            "y=-2x+1",
            "2x+y+1=0",
            "z=2x+1",
            "3=2x+1",
        ],
        "2x+4y=6": ["2x+4y=3", "x+2y=6", "2x-4y=6", "2x+4y", "0=0", "x=y"],
        "x>2": [r"x\ge 2", "x<2", "x=2", "2", "y>2", "x>-2", "x>2 or x<0", "-x>2"],
    },
    "unit": {
        r"5\text{ cm}": ["5 m", r"5\text{ cm}^2", "5 inches", "50 cm", "5 km"],
        r"60^\circ": ["60 radians", r"60\pi", "30 degrees", "60 minutes"],
        r"3\text{ hours}": ["3 minutes", "3 hours 20 minutes", "180", "3 days"],
        r"10\text{ mph}": ["10 km/h", "10 feet per second"],
        "2": ["2 feet 3 inches", "2 1/2 cups", "2 percent of 100 or 3"],
    },
    "text": {
        "Tuesday": ["Thursday", "Tuesday or Wednesday", "not Tuesday", "Tuesdays and Fridays", "T"],
        r"\text{(B)}": ["(A)", "(A) or (B)", "(B) or (C)", "not (B)", "A", "(BB)", "B, C", "8"],
        "yes": ["no", "not yes", "yes and no", "maybe", "yes or no", "yesterday"],
        "valid": ["invalid", "not valid", "valid or invalid"],
        "False": ["True", "not False", "0"],
        r"\text{even}": ["odd", "not even", "neither", "even and odd"],
    },
    "base": {
        "2102_3": ["2102_4", "2101_3", "65_3", "2102_{30}", "-2102_3"],
        "65": ["2102", "65_7", "65_{16}"],
    },
    "algebra": {
        "x^2-1": ["x^2+1", "(x-1)^2", "x^2", "1-x^2", "y^2-1", "x^{2-1}", "2x-1"],
        r"2\sqrt{3}": [
            r"\sqrt{6}",
            r"2\sqrt[3]{3}",
            "3.46410161514",
            r"-2\sqrt3",
            r"\sqrt{2\cdot 3}",
            r"2\sqrt{3}i",
        ],
        r"\sqrt{x+1}": [r"\sqrt{x}+1", "x+1", r"-\sqrt{x+1}", r"\sqrt{x}+\sqrt{1}"],
        r"\frac{1}{x+1}": [r"\frac1x+1", "1/x+1", "x+1", r"\frac{1}{x-1}", "-x-1"],
        "2^{x+1}": ["2^x+1", "2x+1", "2^{x}", "4^x", "(x+1)^2"],
        r"\sin^2 x": [r"\sin x^2", r"\sin 2x", r"2\sin x", r"\cos^2 x"],
        r"36\pi": ["113.1", "113.0973355", "36", r"36\pi^2", r"36\pi r", r"36+\pi"],
        "3-4i": ["3+4i", "-1", "4-3i", "-3+4i", "5"],
        r"\ln 4": [r"\ln 2", "1.386294", r"\log 4", r"\ln 4x"],
        "|x|": ["x", "-x", "x^2", r"\pm x"],
        "a-b": ["b-a", "a+b", "-ab", "A-B", "a-6"],
        r"\frac{n(n+1)}{2}": [r"\frac{n(n-1)}{2}", "n(n+1)", r"\binom{n}{2}", r"n(n+1)/2n"],
        r"\log_2 3": [r"\log_3 2", r"\log 3", r"\log_2 3x", "1.585"],
    },
}


def pairs(table):
    return [
        pytest.param(reference, answer, id=f"{kind}-{reference}-{answer}")
        for kind, answers_of in table.items()
        for reference, answers in answers_of.items()
        for answer in answers
    ]


@pytest.mark.parametrize(("reference", "answer"), pairs(RIGHT))
def test_right_answers_are_accepted(reference, answer):
    assert MathVerifier().compare(reference, answer)[0]


@pytest.mark.parametrize(("reference", "answer"), pairs(WRONG))
def test_wrong_answers_are_refused(reference, answer):
    assert not MathVerifier().compare(reference, answer)[0]
