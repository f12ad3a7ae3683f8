import pytest

from restem_lightning.completions import VerdictKind
from restem_lightning.problems import Problem
from restem_lightning.verifiers import MathVerifier
from restem_lightning.verifiers.equations import wrong_equation

PROBLEM = Problem(problem_id="p", question="q", reference_answer="12")


@pytest.mark.parametrize(
    "text",
    [
        "5 + 7 = 12", "48/2 = <<48/2=24>>24", "costs $1,200.50 - $200 = $1,000.50",
        "(3 + 4) * 2 = 7 * 2 = 14", r"3 \times 4 = 12 and 3x4 = 12", "20% * 50 = 10", "2^3 = 8",
        "10/3 = 3.3333", "no equation here", "-3 + 5 = 2", "1 \u00f7 4 = 0.25",
    ],
)  # fmt: skip
def test_equations_that_hold(text):
    assert wrong_equation(text) is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("5 + 7 = 12, then 12 + 1 = 14", "12+1=14"),
        ("10/3 = 3.33", "10/3=3.33"),
        ("1 + 2 = 3 + 3 = 6", "1+2=3+3=6"),
        ("<<total=3>>", "total=3"),
        ("4 / 0 = 0", "4/0=0"),
        ("9^9^9^9 = 1", "9^9^9^9=1"),
        ("<<__import__('os').getpid()=1>>", "__import__('os').getpid()=1"),
    ],
)
def test_the_first_equation_that_does_not_hold_or_cannot_be_read(text, wrong):
    assert wrong_equation(text) == wrong


def test_a_wrong_equation_takes_the_reward_and_leaves_the_verdict():
    verifier = MathVerifier("gsm8k", check_equations=True)
    right = verifier.verify(PROBLEM, "5 + 7 = 12\n#### 12")
    lucky = verifier.verify(PROBLEM, "5 + 8 = 12\n#### 12")
    assert (right.kind, right.reward) == (VerdictKind.CORRECT, 1.0)
    assert (lucky.kind, lucky.reward) == (VerdictKind.CORRECT, 0.0)
    assert "5+8=12" in lucky.detail
    assert verifier.verify(PROBLEM, "5 + 8 = 13\n#### 13").kind is VerdictKind.WRONG
    assert verifier.version != MathVerifier("gsm8k").version
    keys = {verifier.cache_key(PROBLEM, f"5 + {n} = 12\n#### 12") for n in (7, 8)}
    assert len(keys) == 2


def test_equations_behind_a_stop_mark_do_not_count():
    verifier = MathVerifier("gsm8k", check_equations=True)
    assert verifier.verify(PROBLEM, "5 + 7 = 12\n#### 12\nQ: is 1 + 1 = 3?").reward == 1.0


def test_without_a_reference_answers_are_extracted_if_none_is_needed():
    problem = Problem(problem_id="p", question="q")
    verifier = MathVerifier("gsm8k", needs_reference=False)
    verdict = verifier.verify(problem, "#### 7")
    assert (verdict.kind, verdict.extracted) == (VerdictKind.WRONG, "7")
    assert verifier.reference_completion(problem) is None
    assert verifier.reference_completion(PROBLEM) == "#### 12"
