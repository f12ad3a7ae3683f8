import numpy as np
import pytest

from restem_lightning.compare.statistics import binomial_p, crossed_bootstrap, mcnemar


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (6, 1, 2 * (1 + 7) / 128),
        (2, 4, 2 * (1 + 6 + 15) / 64),
        (3, 3, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_the_exact_p_value_is_that_of_the_binomial_tails(better, worse, p):
    assert binomial_p(better, worse) == pytest.approx(p, abs=1e-15)


def test_mcnemar_counts_the_problems_that_only_one_side_solves():
    control = np.array([[1, 1, 0, 0, 0, 0, 0, 1]], dtype=bool)
    arm = np.array([[1, 0, 1, 1, 1, 1, 1, 1]], dtype=bool)
    test = mcnemar(arm, control)
    assert (test.num_better, test.num_worse) == (5, 1)
    assert test.p == pytest.approx(2 * (1 + 6) / 64)


def test_mcnemar_counts_a_problem_once_however_many_seeds_it_has():
    control = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=bool)
    arm = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0]], dtype=bool)  # 3 to 0, 1 to 1, 1 to 1
    test = mcnemar(arm, control)
    assert (test.num_better, test.num_worse, test.p) == (1, 0, 1.0)


def test_the_bootstrap_of_two_problems_is_the_binomial_of_two_draws():
    # Means 0, 1/2 and 1 come with chances 1/4, 1/2 and 1/4.
    mean = crossed_bootstrap(np.array([[0.0, 1.0]]))
    assert (mean.value, mean.low, mean.high) == (0.5, 0.0, 1.0)
    assert mean.p == pytest.approx(2 * 0.25, abs=0.05)


def test_the_bootstrap_draws_seeds_too():
    only_seeds_differ = np.array([[0.0] * 100, [1.0] * 100])
    mean = crossed_bootstrap(only_seeds_differ)
    assert (mean.low, mean.high) == (0.0, 1.0)
    only_problems_differ = only_seeds_differ.T.reshape(1, -1)
    mean = crossed_bootstrap(only_problems_differ)
    assert (mean.low, mean.high) == pytest.approx((0.5 - 0.0693, 0.5 + 0.0693), abs=0.01)


def test_a_constant_difference_is_certain_and_none_at_all_is_no_difference():
    certain = crossed_bootstrap(np.full((3, 20), 0.25))
    assert (certain.value, certain.low, certain.high, certain.p) == (0.25, 0.25, 0.25, 2 / 2001)
    assert crossed_bootstrap(np.zeros((3, 20))).p == 1.0


def test_pairing_takes_what_is_common_to_both_arms_out_of_the_interval():
    rng = np.random.default_rng(0)
    control = rng.random((3, 200))
    arm = control + 0.02
    paired = crossed_bootstrap(arm - control)
    alone = crossed_bootstrap(arm)
    assert paired.low > 0.019
    assert alone.high - alone.low > 0.05


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(1).random((2, 30))
    assert crossed_bootstrap(values) == crossed_bootstrap(values)
    assert crossed_bootstrap(values) != crossed_bootstrap(values, seed=1)
