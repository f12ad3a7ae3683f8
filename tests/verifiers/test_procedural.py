import dataclasses
import json

import pytest

from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import ReasoningGym, read_problems, write_problems
from restem_lightning.verifiers import (
    ProceduralVerifier,
    VerifierPool,
    VerifierSpec,
    check_references,
)

SPEC = VerifierSpec(class_path="restem_lightning.verifiers.ProceduralVerifier")


def test_every_reference_is_accepted_in_another_process_after_a_file(tmp_path):
    problems = [
        problem
        for task in ("basic_arithmetic", "chain_sum", "countdown", "word_ladder")
        for problem in ReasoningGym(task, seed=3, num=8).load()
    ]
    write_problems(tmp_path / "problems.jsonl", problems)
    problems = read_problems(tmp_path / "problems.jsonl")
    with VerifierPool(SPEC, deadline_s=60.0) as pool:
        kept, dropped = check_references(problems, pool)
    assert dropped == []
    assert kept == problems


def test_the_tasks_own_checker_decides():
    (problem,) = ReasoningGym("countdown", seed=3, num=1).load()
    verifier = ProceduralVerifier()
    answer = problem.reference_answer
    swapped = "+".join(reversed(answer.split("+"))) if "-" not in answer else f"0*0 + {answer}"
    kinds = {
        text: verifier.verify(problem, f"so <answer>{text}</answer>").kind
        for text in (answer, f"({answer})", "1+1", f"{answer} or 7", swapped)
    }
    assert kinds[answer] is VerdictKind.CORRECT
    assert kinds[f"({answer})"] is VerdictKind.CORRECT
    assert kinds["1+1"] is VerdictKind.WRONG
    assert kinds[f"{answer} or 7"] is VerdictKind.WRONG


def test_partial_credit_is_no_credit():
    (problem,) = ReasoningGym("chain_sum", seed=3, num=1).load()
    text = f"<answer>it is {problem.reference_answer} I think</answer>"
    assert ProceduralVerifier().verify(problem, text).kind is VerdictKind.WRONG


def test_partial_credit_is_a_reward_where_it_is_asked_for():
    (problem,) = ReasoningGym("chain_sum", seed=3, num=1).load()
    verifier = ProceduralVerifier(partial_credit=True)
    half = verifier.verify(problem, f"<answer>it is {problem.reference_answer} I think</answer>")
    assert half.kind is VerdictKind.WRONG
    assert 0 < half.reward < 1
    assert verifier.verify(problem, f"<answer>{problem.reference_answer}</answer>").reward == 1.0
    assert verifier.version != ProceduralVerifier().version


def test_a_task_that_follows_the_hash_seed_is_the_same_in_every_process():
    problems = ReasoningGym("ransom_note", seed=1, num=15).load()
    assert "entry" not in problems[14].metadata
    with VerifierPool(SPEC, deadline_s=60.0) as pool:
        kept, dropped = check_references(problems, pool)
        assert (len(kept), dropped) == (15, [])
        (verdict,) = pool.verify_all([(problems[14], "<answer>44</answer>")])
    assert verdict.kind is VerdictKind.WRONG


def test_no_tag_is_no_answer():
    (problem,) = ReasoningGym("chain_sum", seed=3, num=1).load()
    for text in (problem.reference_answer, "<answer></answer>", "<answer>5", "5</answer>", ""):
        assert ProceduralVerifier().verify(problem, text).kind is VerdictKind.NO_ANSWER


def test_an_entry_that_json_would_change_is_generated_again():
    problems = ReasoningGym("countdown", seed=3, num=2).load()
    stripped = json.loads(json.dumps([{**problem.metadata} for problem in problems]))
    for problem, metadata in zip(problems, stripped, strict=True):
        metadata.pop("entry", None)
        rebuilt = dataclasses.replace(problem, metadata=metadata)
        text = f"<answer>{problem.reference_answer}</answer>"
        assert ProceduralVerifier().verify(rebuilt, text).kind is VerdictKind.CORRECT


def test_a_problem_of_another_origin_is_refused():
    (problem,) = ReasoningGym("chain_sum", seed=3, num=1).load()
    text = "<answer>5</answer>"
    with pytest.raises(UserError, match="lacks task, seed"):
        ProceduralVerifier().verify(dataclasses.replace(problem, metadata={}), text)
    with pytest.raises(UserError, match="is not what this reasoning-gym version generates"):
        ProceduralVerifier().verify(dataclasses.replace(problem, question="other"), text)
