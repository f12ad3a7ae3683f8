"""Verdicts and all that is recorded with them depend on nothing but reference and completion."""

import json
import os
import subprocess
import sys

PROGRAM = r"""
import itertools, json
from restem_lightning.problems import Problem
from restem_lightning.verifiers import MathVerifier

answers = [
    "5", "5.0", "50%", r"\frac{1}{2}", "0.5", r"\$5", r"5\text{ cm}", "5,-5", r"\pm 5", r"\{5,-5\}",
    "(1,2)", "[2,\\infty)", r"x\ge 2", "x^2-1", "(x-1)(x+1)", r"\sqrt{8}", r"2\sqrt{2}", "y=2x+1",
    "2x-y+1=0", r"\sin 2x", r"2\sin x\cos x", "101_2", "Tuesday", "(B)", r"\frac{1}{a+b+c}",
    r"x\in[2,\infty)", r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", "a<b", "b>a", r"\frac{5}", "7 or 8",
]
verifier, rows = MathVerifier(), []
for reference, answer in itertools.product(answers, repeat=2):
    problem = Problem(problem_id="p", question="q", reference_answer=reference)
    verdict = verifier.verify(problem, rf"so \boxed{{{answer}}}")
    rows.append([verdict.kind.value, verdict.reward, verdict.extracted, verdict.detail])
print(json.dumps(rows))
"""


def rows_with(hash_seed):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def test_verdicts_and_reasons_do_not_depend_on_the_hash_seed():
    first, second = rows_with("1"), rows_with("4242")
    assert first == second
    assert {row[0] for row in first} == {"CORRECT", "WRONG"}
