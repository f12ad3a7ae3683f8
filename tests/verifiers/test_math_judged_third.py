"""A third round of answers labelled by hand before the verifier saw them: what it got wrong."""

import pytest

from restem_lightning.verifiers import MathVerifier

RIGHT = {
    r"\emptyset": [r"\varnothing", r"\{\}", r"\{ \}", "\u2205"],
    "AB=9, CD=4": ["CD=4, AB=9", "9,4"],
    "3,5": ["x=5, x=3", "x_1=5, x_2=3"],
    r"\text{A,B}": [r"\text{B and A}"],
    "5": [
        *(
            r"5\text{ m}",
            r"5\text{ L}",
            "5 cans",
            "5 apples in total",
            r"\boldsymbol{5}",
            "\u200b5",
        ),
        *("2+3=5", "f(3)=5", "a_{10}=5", "P(A)=5", r"\text{Area}=5", "5=5.0"),
    ],
    "60": [r"\theta=60^\circ", r"\angle ABC=60^\circ", r"(60)^\circ", r"60\text{ deg}"],
    "0.56=56\\%": ["56\\%", "0.56", r"\frac{14}{25}"],
    r"\frac{3}{4}": [r"\frac{3}{4}=0.75", r"{3\over 4}", "3\u20444"],
    r"6\frac{3}{4}": [r"6+\frac34", "6\u00be"],
    "15\\mbox{ cm}^2": [r"15\text{ cm^2}", "15 cm\u00b2"],
    "45\\text{ mph}": [r"45\text{ miles/hour}"],
    r"2\sqrt{3}": ["2\u221a3", "\u221a12", "2\u00b7\u221a3"],
    "-7": ["\u20137"],
    "x^2": ["x\u00b2"],
    "e^2": [r"\exp(2)", r"\mathrm{e}^2"],
    "2+i": [r"2+\mathrm{i}"],
    "|x|": [r"\lvert x\rvert", r"\vert x\vert"],
    r"\binom{10}{3}": [r"\dbinom{10}{3}", r"{10 \choose 3}", r"\frac{10!}{3!7!}"],
    r"\frac{1}{2004!}": ["1/2004!", r"\frac{1}{2004\cdot2003!}"],
    r"\sin^2 t": [r"\sin t\cdot\sin t"],
    r"-80\leq g(x)\leq 82": [r"-80\le g(x)\le82"],
    "(3,4)": ["x=3, y=4", r"x=3\text{ and }y=4", r"\bigl(3,4\bigr)", "a=3,b=4"],
    r"[2,5)": [r"\lbrack 2,5)"],
    r"(-\infty,\infty)": [r"\mathbb{R}", r"x\in\mathbb R"],
    r"\{4,5,7\}": [r"\lbrace 4,5,7\rbrace"],
    r"1\pm\sqrt{19}": [r"\{1\pm\sqrt{19}\}"],
    r"6, 8\text{, and }10": ["6,8,10"],
    "3:5": ["3/5", r"\frac{3}{5}", r"3\text{ to }5", "6:10"],
    "1:2:3": ["2:4:6"],
    r"05\!:\!00": ["5:00"],
    r"\text{4:30 p.m.}": [r"4:30\text{ PM}", r"\text{4:30 pm}", r"4\!:\!30\text{ p.m.}", "4:30"],
    r"9\text{ a.m.}": [r"9:00\text{ a.m.}", r"\text{9 AM}"],
    "0.0011_2": ["0.0011"],
    r"\text{A5}_{11}": ["A5_{11}", "A5"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [
        *(r"v=\begin{pmatrix}1\\2\end{pmatrix}", r"\mathbf{v}=\begin{pmatrix}1\\2\end{pmatrix}"),
        *(
            r"\left[\begin{array}{r}1\\2\end{array}\right]",
            r"\begin{pmatrix}1\\[2pt]2\end{pmatrix}",
        ),
    ],
    "14": [r"14 \text{ right triangles}"],
}

WRONG = {
    r"\emptyset": [r"\{\emptyset\}", "0"],
    "AB=9, CD=4": ["4,9", "AB=4, CD=9"],
    r"\text{A,B}": [r"\text{A or B}"],
    "5": [
        *(r"5\text{ M}", r"5\text{ at most}", r"5\text{ if x is positive}", r"5\text{ is wrong}"),
        *(r"5\text{ approximately}", r"5\text{ maximum}", "5 ish", "5 at least", "5 but no"),
    ],
    "120": ["100+20=121", "121=120", "x!=120", "x+y=120"],
    "15": [r"5=15", r"\pi=15", r"2f(3)=15", r"\theta>15", "15:00", "15:1"],
    r"\frac{3}{4}": ["3:4", r"{4\over 3}", r"\frac{3}{4}=\frac{4}{3}"],
    "152": ["15\u00b2"],
    "65": ["6\u00bd"],
    r"\frac{1}{2004!}": ["0", r"\frac{1}{2003!}", r"\frac{2}{2004!}"],
    "(3,4)": ["y=3, x=4", "y=4, x=3", "x=3, y=5", r"x=3\text{ or }y=4", "x=3, y>4"],
    r"(-\infty,\infty)": [r"\mathbb{R}^2", r"\mathbb{R}\setminus\{0\}", r"\mathbb{Q}"],
    "3:5": ["5:3", "3:6", "3:5:7", "0:0", "35"],
    "4:30": ["2:15", "4:03", "16:30", "430", "4.5"],
    r"\text{4:30 p.m.}": [r"\text{4:30 a.m.}", r"\text{5:30 p.m.}", "430"],
    r"9\text{ a.m.}": [r"9\text{ p.m.}", r"9:30\text{ a.m.}"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [
        *(r"-v=\begin{pmatrix}1\\2\end{pmatrix}", r"v\ne\begin{pmatrix}1\\2\end{pmatrix}"),
        *(r"\begin{vmatrix}1\\2\end{vmatrix}", r"v=\begin{pmatrix}2\\1\end{pmatrix}"),
    ],
    "8": ["{4}{2}", "4{2}", "2^{3}{1}"],
    "42": ["4$2", "$4$$2$"],
    "x": [r"x+\sin(1009\pi x)", r"x\cos(2018\pi x)"],
}


def pairs(table):
    return [(reference, answer) for reference, answers in table.items() for answer in answers]


@pytest.mark.parametrize(("reference", "answer"), pairs(RIGHT))
def test_right_answers_are_accepted(reference, answer):
    assert MathVerifier().compare(reference, answer)[0]


@pytest.mark.parametrize(("reference", "answer"), pairs(WRONG))
def test_wrong_answers_are_refused(reference, answer):
    assert not MathVerifier().compare(reference, answer)[0]
