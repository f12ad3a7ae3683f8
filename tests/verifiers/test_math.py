import time

import pytest

from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.verifiers import MathVerifier, VerifierPool, VerifierSpec
from restem_lightning.verifiers.math import ANSWER_FORMATS, extract_answer, render_answer

SAME = [
    *[("5", answer) for answer in ("5", " 5. ", "$5$.", r"\boxed{5}", "**5**", "+5", "5.0", "x=5")],
    *[("5", answer) for answer in ("(5)", r"\(5\)", r"\[5\]", r"\text{5}", "((((5))))", "5 cm")],
    *[("1234", answer) for answer in ("1,234", r"1{,}234", r"1,\!234", r"1\,234", "1,234.00")],
    *[("18", answer) for answer in ("$18", r"\$18.00", "18 dollars", r"18\text{ dollars}")],
    *[(r"\frac{1}{2}", answer) for answer in ("1/2", "0.5", ".5", r"\dfrac12", r"\frac{2}{4}")],
    *[("-1/2", answer) for answer in (r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}", "-.5")],
    *[("7/3", answer) for answer in (r"2\frac{1}{3}", "2 1/3", r"\frac{7}{3}")],
    *[("1500", answer) for answer in ("1.5e3", r"1.5\times 10^3", r"1.5 \cdot 10^{3}")],
    *[("50", "50%"), (r"50\%", "50"), ("0.5", r"50\%"), ("50%", "0.5"), ("1024", "2^{10}")],
    *[("90", r"90^\circ"), (r"90^{\circ}", "90 degrees"), (r"5\text{ cm}", "5"), ("5", "5cm")],
    *[("5", r"5\text{ square units}"), (r"5\text{ cm}^2", "5 square centimeters")],
    *[("5", "5 or 5.0"), ("x+11", r"x+11\text{ or }11+x"), ("28_9", "28 or 28_9")],
    *[("5,-5", answer) for answer in ("-5, 5", r"\pm 5", "x=5 or x=-5", r"5\text{ and }-5")],
    *[("(2,3)", "(2, 3)"), ("(2,3)", r"\left(2,\,3\right)"), (r"\{1,2\}", r"\{2, 1\}")],
    *[("(1,\\frac12)", "(1,0.5)"), ("[0,1)", r"\left[0, 1\right)"), ("1101_2", "1101_{2}")],
    *[("1101_2", "1101"), (r"\text{Saturday}", "saturday"), (r"\text{(C)}", "C")],
    *[(r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"), (r"1-\frac{1}{e}", r"\frac{e-1}{e}")],
    *[(r"\frac{x+1}{x-1}", "(x+1)/(x-1)"), (r"(-\infty,0)\cup(1,2)", r"(-\infty, 0) \cup (1, 2)")],
    (r"(-\infty,-2)\cup(2,\infty)", r"x<-2\text{ or }x>2"),
    (r"(-\infty,-2]\cup(3,4)", r"3<x<4 or x\le -2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    *[
        (r"0.\overline{3}", "1/3"),
        (r"\approx 8.24", "8.2437"),
        ("5", "5 eggs"),
        ("12", r"12\text{ ways}"),
    ],
    *[("x^2+y^2=25", "y^2=25-x^2"), ("x>3", "3<x"), ("-1<x<4", "4>x>-1"), (r"x\in[0,1]", "[0,1]")],
    *[(r"\sin 2x", r"2\sin x\cos x"), (r"\tan 15^\circ", r"2-\sqrt{3}"), ("8", r"\sqrt[3]{512}")],
]

DIFFERENT = [
    # Hedges and lists.
    *[("7", answer) for answer in ("7 or 8", r"7\text{ or }8", "7, 8", "6 and 7", "7 7")],
    *[("A", "A or B"), ("A", r"A\text{ or }B"), ("A", "B"), ("yes", "yes and no"), ("yes", "no")],
    *[("5", "x=5,-5"), ("5,5", "5"), ("1,3,5", "1,-3,5"), ("(2,3)", "(3,2)"), ("5", r"\pm 5")],
    *[(r"\$4,000", "4, 0"), (r"10,\!000\text{ feet}", "10,0"), ("1,2,3", "1,2,3,...")],
    # Nearly equal numbers.
    *[("3.14", "3.14..."), ("5", "5...")],
    *[("1000000007", "1000000008"), ("12345", "12346"), ("3.1416", "3.14159"), ("5", "-5")],
    *[(r"\frac{1}{3}", "0.333333"), ("0.1234567", "0.1234568"), ("10", "10.0000001")],
    *[(r"\sqrt{2}", "1.41421356"), (r"\pi", "3.14159265"), ("10^{-30}", "10^{-31}")],
    *[(r"\frac{1}{1998!}", r"\frac{1}{2000!}"), (r"2^{-87}", r"-2^{-87}")],
    (r"\frac{\sqrt{2}}{10^{30}}", r"\frac{\sqrt{2}}{10^{31}}"),
    # Factors of a hundred, a thousand, units.
    *[("5600", "56"), ("18.90", "1890"), ("0.1", "10"), ("5", "50%"), ("5", "5 thousand")],
    *[("5", "5 dozen"), ("5", "5 apples or 6"), (r"5\text{ cm}", r"5\text{ m}"), ("2", "2m")],
    *[(r"5\text{ cm}^2", r"5\text{ cm}"), ("5", "5x"), ("3x", "3"), (r"\$5", "5 cents and more")],
    # Brackets, relations, assignments.
    *[("[0,1)", "[0,1]"), ("(0,1)", "[0,1]"), ("(1,2)", r"\{1,2\}"), ("x=5", "x<5")],
    *[(r"(-\infty,-2)\cup(2,\infty)", f"x<-2 or {other}") for other in ("y>2", "x>3", "x<2")],
    *[(r"(-\infty,-2)\cup(2,\infty)", f"x<-2 {other}") for other in ("and x>2", "", r"or x\ge 2")],
    *[(r"x\ge 3", "x>3"), ("y=5", "x=5"), ("x^2+y^2=25", "x^2-y^2=25"), ("5", "x<5")],
    # Bases and subscripts.
    *[("1101_2", "1101_3"), ("13", "13_4"), ("x_1", "x_2"), (r"\log_2 8", r"\log_3 8")],
    # Spaces and separators.
    *[("1024", "10 24"), ("1024", "1,02,4"), ("135", "1,3,5"), ("1,234", "1, 234"), ("12", "1 2")],
    # Precedence.
    *[("a^2b", "a^{2b}"), ("2^{n+1}", "2^n+1"), (r"2\sqrt{3}", r"2\sqrt[3]{3}")],
    *[(r"\frac{x+1}{x-1}", "x+1/x-1"), (r"1+\frac1e", r"1-\frac1e")],
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    # Units, money, percentages.
    *[
        (r"\$18", "18 cents"),
        ("0.5", "0.5%"),
        ("5", "500%"),
        ("5", "5 hundredths"),
        ("5", "5 or so"),
    ],
    *[("5", f"5 {words}") for words in ("zeros", "point five", "fold", "grand", "below zero", "k")],
    *[("5", "5 " + "a" * 40), ("5", "5 five-fold"), ("9\\text{ a.m.}", "9\\text{ p.m.}")],
    # Values that rounding cannot tell apart, and letters in another order.
    *[(r"\sqrt{2}", r"\sqrt{2}+10^{-40}"), ("x", "x+10^{-300}"), ("AB", "BA"), ("1/2x", "x/2")],
    *[(r"\sqrt{x^2}", "x"), ("x<5", "5<x"), ("-x<5", "x<-5"), ("x=1,2", "x=1"), ("5", "[5]")],
    *[(r"\approx 8.24", "8.25"), ("8.24", r"5\approx 8.24"), (r"0.\overline{3}", "0.3")],
    # Programs, prose, nonsense.
    *[("0", "__import__('os').system('true')"), ("5", "not 5"), ("5", "the answer"), ("0", "1/0")],
    *[("5", "exit()"), ("", "5"), ("5", "{"), ("5", r"\frac{5}"), ("5", "?"), ("nan", "1/0")],
]

HUGE = [
    *("10^{10^{10}}", "(100!)!", "1000000!", r"\binom{1000000}{500000}", r"9^{9^{9^9}}"),
    *("9" * 15_000, "(" * 400 + "1" + ")" * 400, "1," * 9_000, "(" * 45 + "x+" + ")" * 45),
    *(r"\sum_{i=1}^{10^9} i", "{" * 999, " " * 9_999, r"\frac{" * 100, "x^{99999}", "5 " * 9_000),
]

EXTRACTED = [
    ("gsm8k", "so 3+2=5\n#### 5", "5"),
    ("gsm8k", "#### 5\n#### 6", "6"),
    ("gsm8k", "####$1,000.\nDone", "$1,000."),
    ("gsm8k", "##### 5", None),
    ("gsm8k", "the answer is 5", None),
    ("gsm8k", "####", None),
    ("gsm8k", "#### 5\n\nQ: next?\n#### 6", "5"),
    ("gsm8k", "no answer\nQuestion: next?\n#### 6", None),
    ("gsm8k", "#### 5\nProblem 2: next?\n#### 6", "5"),
    ("gsm8k", "Problem 1: this one\n#### 5", "5"),
    ("gsm8k", "so\nProblem 1: this one\n#### 5", "5"),
    ("gsm8k", "#### 5\nQuestion 12. next?\n#### 6", "5"),
    ("gsm8k", "#### 5\nUser: and this?\n#### 6", "5"),
    ("boxed", r"\boxed{5}<|im_start|>user" + "\nNext<|im_end|>\\boxed{6}", "5"),
    ("boxed", r"\boxed{5} or \boxed{\frac{6}{7}}", r"5 \text{ or } \frac{6}{7}"),
    ("boxed", r"$x=\boxed{5}$, $y=\boxed{6}$ and $z = \boxed 7$.", "5, 6, 7"),
    ("boxed", r"\[\boxed{5}\text{ and }\boxed{\{6\}}\]", r"5, \{6\}"),
    ("boxed", r"$\boxed{5}$, and so $\boxed{6}$", "6"),
    ("boxed", r"$x^{2}$ and $\boxed{6}$", "6"),
    ("boxed", r"\boxed{}", None),
    ("boxed", r"\boxed{5", None),
    ("boxed", r"so \boxed{5}" + "\nProblem: \\boxed{6}", "5"),
    ("final_answer", "the final answer is\n$\\begin{x}1\n2\\end{x}$.", "$\\begin{x}1\n2\\end{x}$"),
    (
        "final_answer",
        "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.",
        "$\\frac{1}{2}$",
    ),
    ("final_answer", "The final answer is $5$ or $6$. I hope it is correct.", "$5$ or $6$"),
    ("answer_is", "The answer is 5.5. The next", "5.5"),
    ("answer_is", "The answer is 3. The answer is: 4", "4"),
    ("answer_is", "The answer is not known", "not known"),
    ("answer_tag", "<answer>a\nb</answer>", "a\nb"),
    ("answer_tag", "<answer>1</answer> <answer>2</answer> <answer>", "2"),
    ("auto", "The answer is 5.\n#### 6", "6"),
    ("auto", r"#### 6 and \boxed{7}, so that answer is right", "7"),
    ("auto", "The answer is 5.", "5"),
    ("auto", "5", None),
    ("boxed", r"<think>\boxed{5}</think> \boxed{6}", "6"),
    ("boxed", r"<think>\boxed{5}", None),
    ("boxed", r"<think>\boxed{5}</think> none", None),
    ("gsm8k", "#### 5" + "\n" * 20_001, None),
]


QUICK = ("5", "-5.0", "1,234", "5.00", "1234", "123", "-5", "50", "0.5")


@pytest.fixture(scope="module")
def verifier():
    return MathVerifier()


def problem(reference_answer, **values):
    return Problem(problem_id="p", question="q", reference_answer=reference_answer, **values)


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_equal_answers_are_accepted(verifier, reference, answer):
    assert verifier.compare(reference, answer)[0]


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different_answers_are_refused(verifier, reference, answer):
    assert not verifier.compare(reference, answer)[0]


@pytest.mark.parametrize("reference", [reference for reference, _ in SAME + DIFFERENT if reference])
@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
def test_every_reference_accepts_itself_in_every_format(reference, answer_format):
    verifier = MathVerifier(answer_format)
    completion = verifier.reference_completion(problem(reference))
    assert verifier.verify(problem(reference), completion).kind is VerdictKind.CORRECT


@pytest.mark.parametrize("answer", HUGE)
@pytest.mark.parametrize("reference", ["5", "x", r"\sqrt{2}", "(1,2)"])
def test_huge_answers_are_refused_without_computing(verifier, reference, answer):
    is_equal, detail = verifier.compare(reference, answer)
    assert not is_equal
    assert detail


def test_the_pool_is_whole_after_answers_made_to_hang():
    spec = VerifierSpec(class_path="restem_lightning.verifiers.MathVerifier")
    odd = ["5\x00", "\ud8005", "\u200f5", r"(((x+1)^{30})^{30})^{30}", r"(x+1)^{2000}"]
    odd += [r"\sqrt" * 300 + "2", "-" * 900 + "5", r"\tan(" * 38 + "1" + ")" * 38, r"e^{e^{e^9}}"]
    texts = [rf"\boxed{{{answer}}}" for answer in [*HUGE, *odd]]
    with VerifierPool(spec, deadline_s=5.0) as pool:
        verdicts = pool.verify_all([(problem(r"\sqrt{8}"), text) for text in texts])
        again = pool.verify_all([(problem(r"\sqrt{8}"), r"\boxed{2\sqrt{2}}")])
    assert {verdict.kind.value for verdict in verdicts} <= {"WRONG", "NO_ANSWER"}
    assert again[0].kind is VerdictKind.CORRECT


@pytest.mark.parametrize(("answer_format", "text", "expected"), EXTRACTED)
def test_extraction(answer_format, text, expected):
    assert extract_answer(text, answer_format) == expected


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
@pytest.mark.parametrize(
    "piece", ["answer is $", "answer is ", "$", "\\", "####", r"\boxed{", "<answer>", "answer is\n"]
)
def test_extraction_is_fast_on_any_text(benchmark_s, answer_format, piece):
    assert benchmark_s(lambda: extract_answer(piece * (60_000 // len(piece)), answer_format)) < 0.2


@pytest.fixture
def benchmark_s():
    def measure(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    return measure


@pytest.mark.parametrize("reference", ["5", "", None])
@pytest.mark.parametrize("text", ["", "5", "####", r"\boxed{}", "None"])
def test_no_answer_is_never_correct(verifier, reference, text):
    assert verifier.verify(problem(reference), text).kind is VerdictKind.NO_ANSWER


def test_an_answer_without_a_reference_is_an_error(verifier):
    for reference in ("", " ", None):
        with pytest.raises(UserError, match="no reference_answer"):
            verifier.verify(problem(reference), "#### 5")


def test_a_verdict_holds_the_answer_and_what_decided(verifier):
    verdict = verifier.verify(problem("5"), "#### 5.0")
    assert (verdict.kind, verdict.extracted, verdict.detail) == (
        VerdictKind.CORRECT,
        "5.0",
        "numbers",
    )


def test_the_reference_solution_is_the_self_check_if_it_has_the_format():
    solution = "2+3=5\n#### 5"
    with_solution = problem("5", reference_solution=solution)
    assert MathVerifier("gsm8k").reference_completion(with_solution) == solution
    assert MathVerifier("boxed").reference_completion(with_solution) == r"\boxed{5}"
    assert render_answer("5", "answer_is") == "The answer is 5."


def test_equal_answers_to_equal_references_share_a_cache_key():
    verifier = MathVerifier("gsm8k")
    keys = [verifier.cache_key(problem("5"), f"{text}\n#### 5") for text in ("a", "b")]
    assert keys[0] == keys[1] != verifier.cache_key(problem("5"), "#### 6")


@pytest.mark.parametrize("reference", ["5", "-5.0", "1,234", "1,23", "x", "50%", "", None])
@pytest.mark.parametrize("answer", ["5", "5.00", "1234", "123", "-5", "5 or 6", "50", "0.5", None])
def test_a_quick_verdict_is_the_verdict(reference, answer):
    verifier = MathVerifier("gsm8k", needs_reference=False)
    text = "none" if answer is None else f"#### {answer}"
    quick = verifier.quick_verdict(verifier.cache_key(problem(reference), text))
    assert quick in (None, verifier.verify(problem(reference), text))
    is_quick = answer is None or {reference, answer} <= {*QUICK}
    assert (quick is not None) == is_quick


def test_checked_equations_and_an_own_verify_are_never_quick():
    class Own(MathVerifier):
        def verify(self, problem, completion_text):
            raise NotImplementedError

    assert MathVerifier(check_equations=True).quick_verdict(("5", "5", ())) is None
    assert Own().quick_verdict(("5", "5")) is None


def test_stop_marks_are_configurable():
    verifier = MathVerifier("gsm8k", stop_marks=["\nEND"])
    assert verifier.verify(problem("5"), "#### 5\nEND\n#### 6").kind is VerdictKind.CORRECT
    assert verifier.verify(problem("5"), "#### 5\nQ:\n#### 6").kind is VerdictKind.WRONG


def test_an_unknown_format_is_refused():
    with pytest.raises(UserError, match=r"answer_format \('last_number'\) must be one of gsm8k"):
        MathVerifier("last_number")
