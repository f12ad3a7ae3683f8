import pytest

from restem_lightning.errors import UserError
from restem_lightning.loop.evaluate import EvaluationParams
from restem_lightning.sampler import SamplingParams

SAMPLING = SamplingParams(n=8, temperature=0.7, top_k=40, min_p=0.1, max_new_tokens=9, stop=("Q",))


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
