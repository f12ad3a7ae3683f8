"""Whole completions labelled by hand: the last answer counts, and nothing after a next problem."""

import time

import pytest

from restem_lightning.completions import VerdictKind
from restem_lightning.problems import Problem
from restem_lightning.verifiers import MathVerifier

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
NEXT = "\n\nQuestion: Ann has 2 pens. How many?\nAnswer: She has 2.\n"

PARTS = [
    *[("2", ""), ("3+", ""), ("3 + ", ""), ("3 - ", ""), ("2\\cdot ", ""), (r"x\ne ", "")],
    *[(r"\sqrt{", "}"), (r"\frac{", "}{3}"), (r"\frac{3}{", "}"), ("2^{", "}"), ("", "!")],
    *[("", "0"), ("", ".5"), ("", " + 1"), ("", r"\frac12"), ("", r"\sqrt2"), ("", r"\pm 1")],
]

# format, completion, reference
CORRECT = [
    ("gsm8k", "Ann has 3+4=<<3+4=7>>7 pens.\n#### 7", "7"),
    ("gsm8k", "####7", "7"),
    ("gsm8k", "#### $1,007", "1007"),
    ("gsm8k", "#### 7 apples", "7"),
    ("gsm8k", "#### 7.\n", "7"),
    ("gsm8k", "#### **7**", "7"),
    ("gsm8k", r"#### \boxed{7}", "7"),
    ("gsm8k", "#### 5\nWait, that is wrong.\n#### 7", "7"),
    ("gsm8k", "#### 7" + NEXT + "#### 2", "7"),
    ("gsm8k", "#### 7\nQ: What is 1+1?\nA: #### 2", "7"),
    ("gsm8k", "#### 1.5e3", "1500"),
    ("boxed", r"so $\boxed{\frac{1}{2}}$.", "1/2"),
    ("boxed", r"first \boxed{5}, but then \boxed{6}", "6"),
    ("boxed", r"$$\boxed{ \{1,2\} }$$", r"\{2,1\}"),
    ("boxed", r"\boxed{x=\boxed{5}}", "5"),
    ("boxed", r"$x=\boxed{5}$ or $x=\boxed{6}$", "5,6"),
    ("boxed", r"It is $\boxed{x+11}$, or $\boxed{11+x}$.", "11+x"),
    ("boxed", r"\boxed 5", "5"),
    ("boxed", r"\fbox{5}", "5"),
    ("boxed", r"\boxed{\text{(D)}}", "D"),
    ("boxed", r"\boxed{5}" + "\nProblem:\nWhat is 3+3?\nSolution: $\\boxed{6}$", "5"),
    ("boxed", rf"\boxed{{{MATRIX}}}", MATRIX),
    ("boxed", r"<think>maybe \boxed{4}</think>It is \boxed{5}.", "5"),
    ("boxed", r"\boxed{5\text{ or }-5}", r"\pm 5"),
    ("boxed", r"**\boxed{5}**", "5"),
    ("boxed", r"$x=\boxed{60}^\circ$", "60"),
    ("boxed", r"\boxed{5}---which is right", "5"),
    ("boxed", r"so $7+\boxed{5}=12$", "5"),
    ("boxed", r"**Step 2** - \boxed{5}!", "5"),
    ("boxed", r"the term is $\boxed{19}x^3$", "19"),
    ("boxed", r"$\boxed{25}\frac{\text{miles}}{\text{day}}$", "25"),
    ("boxed", r"$s\ge\boxed{4}$", "4"),
    ("answer_is", "So the answer is 5.", "5"),
    ("answer_is", "The answer is: $5.25$.", "5.25"),
    ("answer_is", "The answer is 1,234.", "1234"),
    ("answer_is", "So the answer is (C).", "(C)"),
    ("answer_is", "Let's think step by step. 24 = 4!.\nSo the answer is 24.", "24"),
    ("answer_is", "So the answer is False.", "False"),
    ("answer_is", "So the answer is invalid.\n\nQ: All cats are dogs.", "invalid"),
    ("answer_is", "So the answer is apple banana cherry.", "apple banana cherry"),
    ("answer_is", "So the answer is ] } ).", "] } )"),
    ("answer_is", "The answer is **5**.", "5"),
    ("answer_is", "The answer is 5. No: 2+4 is 6. The answer is 6.", "6"),
    ("answer_is", "the answer is $x=5$", "5"),
    ("answer_line", "2+3=5\nAnswer: 5", "5"),
    ("answer_line", "**Answer: $5$**", "5"),
    ("answer_line", "### **Final Answer:** 5 apples.\nDone.", "5"),
    ("answer_line", "Answer:\n$$\\frac{1}{2}$$", "0.5"),
    ("final_answer", "Final Answer: The final answer is $2\\pi$. I hope it is correct.", r"2\pi"),
    ("final_answer", "The final answer is $(1,2)$. I hope it is correct.\n\nProblem:\nx", "(1,2)"),
    ("final_answer", "The final answer is 0.5. I hope it is correct.", r"\frac12"),
    ("answer_tag", "<think>1</think><answer> 42 </answer>", "42"),
    ("auto", "The final answer is 5", "5"),
    ("auto", "In one step the answer is 4.\n**Answer:** 5", "5"),
    ("auto", "Answer: 4 at first.\nSo the answer is 5.", "5"),
    ("auto", "Answer: $\\boxed{5}$", "5"),
    ("auto", "2+3 is 5, so the answer is 5.", "5"),
    ("auto", r"Therefore, the answer is \boxed{5}.", "5"),
    ("auto", "#### 4 at first.\n" + r"In the end \boxed{5}", "5"),
    ("auto", "The answer is $\\frac{3}{4}$.\n\nExercise 2: The answer is 1.", "0.75"),
]

NOT_CORRECT = [
    ("gsm8k", "#### 5 or 6", "5"),
    ("gsm8k", "#### 5\n#### 6", "5"),
    ("gsm8k", "#### 6" + NEXT + "#### 2", "2"),
    ("gsm8k", "#### 4\nQ: And 2+3?\n#### 5", "5"),
    ("gsm8k", "The answer is 5.", "5"),
    ("gsm8k", "####\n5", "5"),
    ("gsm8k", "#### 5 6", "56"),
    ("gsm8k", "#### 5/6", "5"),
    ("gsm8k", "#### unknown", "5"),
    ("gsm8k", "#### 5, so 6", "5"),
    ("gsm8k", "#### (5", "5"),
    ("gsm8k", "#### 5 #### 6", "5"),
    ("boxed", r"\boxed{5}\boxed{6}", "5"),
    ("boxed", r"$x=\boxed{5}$ or $x=\boxed{6}$", "6"),
    ("boxed", r"\boxed{5} and \boxed{6}", "6"),
    ("boxed", r"\boxed{5}, \boxed{6}", "6"),
    ("boxed", r"It is not \boxed{5} but \boxed{6}.", "5"),
    ("boxed", r"\boxed{4}" + "\nProblem: 2+3?\n\\boxed{5}", "5"),
    ("boxed", r"\boxed{}", "5"),
    ("boxed", r"\boxed{5", "5"),
    ("boxed", r"<think>\boxed{5}</think> It is 5.", "5"),
    ("boxed", r"<think>\boxed{5}", "5"),
    ("boxed", r"\boxed{5 \text{ or } 6}", "5"),
    ("boxed", r"\boxed{5, 6}", "5"),
    ("boxed", r"\boxed{\text{not }5}", "5"),
    ("boxed", r"\boxed{5}^2", "5"),
    ("boxed", r"\boxed{x=\boxed{5}+1}", "6"),
    ("boxed", r"-\boxed{5}", "5"),
    ("boxed", r"\boxed{5}\%", "0.5"),
    ("boxed", r"\boxed{5}\cdot 2", "5"),
    ("boxed", r"\boxed{5}/2", "5"),
    *[("boxed", f"so ${before}\\boxed{{5}}{after}$", "5") for before, after in PARTS],
    ("boxed", r"The answer is not \boxed{5}.", "5"),
    ("answer_is", "The answer is not 5.", "5"),
    ("answer_is", "The answer is 5 or 6.", "5"),
    ("answer_is", "The answer is 5. No, the answer is 6.", "5"),
    ("answer_is", "The answer is either (A) or (B).", "(A)"),
    ("answer_is", "The answer is (A) and (B).", "(A)"),
    ("answer_is", "The answer is 5, but it could be 6.", "5"),
    ("answer_is", "The answer is 5 if x>0, otherwise 6.", "5"),
    ("answer_is", "The answer is greater than 5.", "5"),
    ("answer_is", "The answer is 6.\n\nQ: 2+3?\nA: The answer is 5.", "5"),
    ("answer_is", "The answer is 6.\n\nHuman: and 2+3?\nThe answer is 5.", "5"),
    ("answer_is", "I do not know what the answer is.", "5"),
    ("answer_is", "The answer is\n\n5", "6"),
    ("answer_is", "So the answer is banana apple cherry.", "apple banana cherry"),
    ("answer_is", "So the answer is ] ) }.", "] } )"),
    ("answer_is", "So the answer is (A).", "(B)"),
    ("answer_is", "So the answer is not plausible.", "plausible"),
    ("final_answer", "The final answer is $5$ or $6$. I hope it is correct.", "5"),
    ("final_answer", "The final answer is $5$. I hope it is correct.\nSo 6.", "6"),
    ("final_answer", "The answer is $5$.", "5"),
    ("answer_line", "Answer: 5\nAnswer: 6", "5"),
    ("answer_line", "Answer: 5 or 6", "5"),
    ("answer_line", "It is no answer: 5", "5"),
    ("answer_line", "Answer: 6\n\nQuestion: 2+3\nAnswer: 5", "5"),
    ("auto", "Answer: 5\n#### 6", "5"),
    ("answer_tag", "<answer>5</answer><answer>6</answer>", "5"),
    ("answer_tag", "<answer>5 or 6</answer>", "5"),
    ("answer_tag", "<answer>5", "5"),
    ("auto", "5", "5"),
    ("auto", r"\boxed{4} #### 5" + "\n" + r"\boxed{6}", "5"),
    ("auto", "The answer is 5.\n#### 6", "5"),
    ("auto", "#### 6\n\nExercise 2: 2+3\n#### 5", "5"),
]


def kind_of(answer_format, completion, reference):
    problem = Problem(problem_id="p", question="q", reference_answer=reference)
    return MathVerifier(answer_format).verify(problem, completion).kind


@pytest.mark.parametrize(("answer_format", "completion", "reference"), CORRECT)
def test_completions_with_the_right_last_answer_are_correct(answer_format, completion, reference):
    assert kind_of(answer_format, completion, reference) is VerdictKind.CORRECT


@pytest.mark.parametrize(("answer_format", "completion", "reference"), NOT_CORRECT)
def test_completions_with_another_last_answer_are_not_correct(answer_format, completion, reference):
    assert kind_of(answer_format, completion, reference) is not VerdictKind.CORRECT


SPACES = ["is" + "\n" * 18_000, "is a" + " " * 18_000 + "b", "is:" + "\t" * 18_000 + "5."]


@pytest.mark.parametrize("end", SPACES, ids=("newlines", "spaces", "tabs"))
def test_a_long_row_of_spaces_is_passed_over_once(end):
    start = time.process_time()
    MathVerifier().cache_key(Problem(problem_id="p", question="q"), "The final answer " + end)
    assert time.process_time() - start < 2


# question, reference, answer
RESTATED = [
    (r"Compute $\log_8 2$.", r"\frac{1}{3}", r"\log_8 2"),
    (r"Compute $\log_8 2$.", r"\frac{1}{3}", r"x = \log_{8}{2}"),
    (r"Expand $(x+10)(2y+10)$.", "2xy+10x+20y+100", r"\left(x + 10\right)\left(2y + 10\right)"),
    (r"Evaluate \[55\times1212-15\times1212.\]", "48480", r"55\cdot 1212 - 15\cdot 1212"),
    (r"Simplify $\dfrac{88}{7744}.$", r"\frac{1}{88}", r"\frac{88}{7744}"),
    (r"Write $0.\overline{54}$ as a fraction.", r"\frac{6}{11}", r"0.\overline{54}"),
    (r"What is $115^2$?", "13225", "115^2"),
    ("Put $3, 1, 2$ in order.", "1,2,3", "3,1,2"),
    ("Solve $2x-y=3$ for $y$.", "y=2x-3", "2x-y=3"),
]
NOT_RESTATED = [
    (r"Compute $\log_8 2$.", r"\frac{1}{3}", "1/3"),
    ("Find $x$ if $2x=10$.", "5", "x=5"),
    ("If $x=5$, what is $x^2-20$?", "5", "5.0"),
    (r"A coin falls on heads with probability $1/2$. What of tails?", r"\frac{1}{2}", "1/2"),
    (r"A $50\%$ discount, then another: how much is left?", "25", r"25\%"),
    (r"Which is larger, $\sqrt{8}$ or $2$?", r"\sqrt{8}", r"2\sqrt{2}"),
    (r"Which is larger, $\sqrt{8}$ or $2$?", r"\sqrt{8}", r"\sqrt{8}"),
    ("Factor $x^2-1$.", "(x-1)(x+1)", "(x+1)(x-1)"),
]


def verdict_of(question, reference, answer):
    problem = Problem(problem_id="p", question=question, reference_answer=reference)
    return MathVerifier("boxed").verify(problem, rf"So it is \boxed{{{answer}}}.").kind


@pytest.mark.parametrize(("question", "reference", "answer"), RESTATED)
def test_an_answer_that_repeats_the_question_is_wrong(question, reference, answer):
    assert verdict_of("q", reference, answer) is VerdictKind.CORRECT
    assert verdict_of(question, reference, answer) is VerdictKind.WRONG


@pytest.mark.parametrize(("question", "reference", "answer"), NOT_RESTATED)
def test_a_final_answer_may_stand_in_the_question(question, reference, answer):
    assert verdict_of(question, reference, answer) is VerdictKind.CORRECT


def test_the_cache_tells_an_answer_from_the_repetition_of_another_question():
    verifier = MathVerifier("boxed")
    keys = [
        verifier.cache_key(
            Problem(problem_id="p", question=question, reference_answer="9"), r"\boxed{3^2}"
        )
        for question in ("Compute $3^2$.", "Compute $10-1$.")
    ]
    assert keys[0] != keys[1]
