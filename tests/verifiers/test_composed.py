import json
import re

import pytest

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.settings import verifier_spec
from restem_lightning.verifiers import ComposedVerifier, VerifierPool
from restem_lightning.verifiers.composed import ITERATION

CORRECT, WRONG, NO_ANSWER, TIMEOUT, ERROR = VerdictKind
PROBLEM = Problem(problem_id="p", question="q", reference_answer="5")
MATH = {"class_path": "math", "init_args": {"answer_format": "gsm8k"}}


def short(problem, text):
    """CORRECT for a short text, whatever it says; fails for an empty one."""
    if not text:
        raise ValueError("nothing to judge")
    reward = 1.0 if len(text) < 20 else 0.25
    kind = CORRECT if reward == 1.0 else WRONG
    return Verdict(kind=kind, reward=reward, detail=f"{len(text)} characters")


def parts():
    mine = {"class_path": "callable", "init_args": {"function": f"{__file__}:short"}}
    return {"answer": MATH, "length": mine}


LONG = "so many words to say " * 2


@pytest.mark.parametrize(
    ("rule", "text", "kind"),
    [
        ("all", "#### 5", CORRECT), ("all", f"{LONG}#### 5", WRONG), ("all", "#### 6", WRONG),
        ("all", "five", NO_ANSWER), ("all", "", ERROR),
        ("any", "#### 5", CORRECT), ("any", f"{LONG}#### 5", CORRECT), ("any", "#### 6", CORRECT),
        ("any", f"{LONG}#### 6", WRONG), ("any", "", ERROR),
    ],
)  # fmt: skip
def test_all_and_any(rule, text, kind):
    verdict = ComposedVerifier(parts(), rule=rule).verify(PROBLEM, text)
    assert verdict.kind is kind
    assert verdict.reward == float(kind is CORRECT)


def test_the_weighted_mean_is_the_reward_and_the_threshold_decides():
    verifier = ComposedVerifier(
        parts(), rule="weighted", weights={"answer": 3, "length": 1}, threshold=0.8
    )
    for text, reward, kind in (
        ("#### 5", 1.0, CORRECT),
        (f"{LONG}#### 5", (3 + 0.25) / 4, CORRECT),
        ("#### 6", 0.25, WRONG),
        ("", 0.0, ERROR),
    ):
        verdict = verifier.verify(PROBLEM, text)
        assert (verdict.kind, verdict.reward) == (kind, reward)


def test_every_part_stands_in_the_detail():
    verdict = ComposedVerifier(parts()).verify(PROBLEM, f"{LONG}#### 5")
    assert verdict.extracted == "5"
    found = json.loads(verdict.detail)
    assert list(found) == ["answer", "length"]
    assert found["answer"][:2] == ["CORRECT", 1.0]
    assert found["length"] == ["WRONG", 0.25, f"{len(LONG) + 6} characters"]


def test_by_iteration_the_part_in_force_judges_the_e_step_and_the_last_one_all_else():
    verifier = ComposedVerifier(
        {"1": parts()["length"], "3": MATH, "4": parts()["answer"]}, rule="by_iteration"
    )
    judged = {}
    for iteration in (1, 2, 3, 9, None):
        metadata = {} if iteration is None else {ITERATION: iteration}
        problem = Problem(problem_id="p", question="q", reference_answer="5", metadata=metadata)
        verdict = verifier.verify(problem, "#### 6")
        judged[iteration] = (verdict.kind, list(json.loads(verdict.detail)))
    assert judged == {
        1: (CORRECT, ["1"]), 2: (CORRECT, ["1"]), 3: (WRONG, ["3"]), 9: (WRONG, ["4"]),
        None: (WRONG, ["4"]),
    }  # fmt: skip


def test_it_runs_in_a_pool_and_accepts_a_reference_that_every_part_accepts():
    spec = verifier_spec({"class_path": "composed", "init_args": {"parts": parts()}})
    with VerifierPool(spec) as pool:
        good, bad = pool.verify_all([(PROBLEM, "#### 5"), (PROBLEM, "#### 6")])
    assert (good.kind, bad.kind) == (CORRECT, WRONG)
    assert ComposedVerifier(parts()).reference_completion(PROBLEM) == "#### 5"


def test_equal_keys_mean_equal_verdicts_so_one_part_without_keys_means_none():
    assert ComposedVerifier(parts()).cache_key(PROBLEM, "#### 5") is None
    math = ComposedVerifier({"a": MATH})
    assert math.cache_key(PROBLEM, "x #### 5") == math.cache_key(PROBLEM, "y #### 5") is not None


def test_the_version_tells_every_part_rule_and_weight():
    names = {
        ComposedVerifier(parts(), **how).name + ComposedVerifier(parts(), **how).version
        for how in (
            {}, {"rule": "any"}, {"rule": "weighted", "weights": {"answer": 1, "length": 1}},
            {"rule": "weighted", "weights": {"answer": 1, "length": 2}},
        )
    }  # fmt: skip
    assert len(names) == 4
    assert all("math/" in name and "callable/1" in name for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "most"}, "rule (most) must be one of all, any, weighted, by_iteration"),
        ({"parts": {}}, "parts ({}) must name at least one"),
        ({"rule": "by_iteration"}, "parts (answer, length) must be iterations"),
        ({"rule": "weighted"}, "weights (None) must be given"),
        ({"weights": {"answer": 1, "length": 1}}, "must be given for weighted alone"),
        ({"rule": "weighted", "weights": {"answer": 1, "lenght": 1}}, "one for each of answer"),
        ({"rule": "weighted", "weights": {"answer": 0, "length": 0}}, "not all 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ComposedVerifier(**{"parts": parts(), **change})
