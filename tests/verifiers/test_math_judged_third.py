"""A third round of answers labelled by hand before the verifier saw them: what it got wrong."""

import pytest

from restem_lightning.verifiers import MathVerifier

RIGHT = {
    r"\emptyset": [r"\varnothing", r"\{\}", r"\{ \}", "\u2205"],
    "AB=9, CD=4": ["CD=4, AB=9", "9,4"],
    "3,5": ["x=5, x=3", "x_1=5, x_2=3"],
    r"\text{A,B}": [r"\text{B and A}"],
    "5": [r"5\text{ m}", r"5\text{ L}", "5 cans", "5 apples in total"],
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
