import random

import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.loop.evaluate import EvaluationParams, measure
from restem_lightning.metrics import evaluate_table
from restem_lightning.sampler import SamplingParams
from tests.factories import make_completion

SAMPLING = SamplingParams(n=8, temperature=0.7, top_k=40, min_p=0.1, max_new_tokens=9, stop=("Q",))


def completion(problem_id, index, is_right, extracted):
    kind = VerdictKind.CORRECT if is_right else VerdictKind.WRONG
    return make_completion(
        problem_id=problem_id,
        completion_index=index,
        verdict=Verdict(kind=kind, extracted=extracted),
        verifier="math/1",
    )


def test_greedy_and_sampled_stages_keep_length_and_stop_strings_of_the_e_step():
    stages = EvaluationParams(n=4, ks=(1, 4), temperature=1.0, top_p=0.95).stages(SAMPLING)
    assert list(stages) == ["greedy", "sampled"]
    for params in stages.values():
        assert (params.max_new_tokens, params.stop) == (9, ("Q",))
        assert params.min_p == 0
    greedy, sampled = stages.values()
    assert (greedy.n, greedy.temperature) == (1, 0)
    assert (sampled.n, sampled.temperature, sampled.top_p, sampled.top_k) == (4, 1.0, 0.95, 0)


def test_stages_that_nobody_wants_are_left_out():
    assert list(EvaluationParams(greedy=False, n=1).stages(SAMPLING)) == ["sampled"]
    assert list(EvaluationParams(greedy=True, n=0).stages(SAMPLING)) == ["greedy"]


@pytest.mark.parametrize(
    "arguments",
    [{"n": -1}, {"n": 2, "ks": (0,)}, {"n": 2, "ks": (3,)}, {"n": 2, "temperature": 0.0}],
)
def test_values_that_make_no_sense_are_refused(arguments):
    with pytest.raises(UserError, match="evaluation"):
        EvaluationParams(**arguments)


def test_the_metrics_of_a_store_are_those_of_its_problems_in_memory(tmp_path):
    rng = random.Random(0)
    store, problems = CompletionStore(tmp_path / "sampled"), []
    for part in range(3):
        completions = []
        for number in range(4):
            judged = [(rng.random() < 0.5, rng.choice(["1", "2", None])) for _ in range(5)]
            problems.append(judged)
            completions += [
                completion(f"{part}/{number}", index, *one) for index, one in enumerate(judged)
            ]
        store.write_part(part, rng.sample(completions, len(completions)))
    found = measure(tmp_path, EvaluationParams(greedy=False, n=5, ks=(1, 3)))
    expected = evaluate_table(problems, ks=(1, 3))
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(
        {name: one["value"] for name, one in expected.items()}, abs=1e-12
    )
    assert list(found) == ["pass@1", "pass@3", "maj@5"]
