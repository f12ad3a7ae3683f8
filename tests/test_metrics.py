from itertools import combinations

import numpy as np
import pytest

from restem_lightning.errors import UserError
from restem_lightning.metrics import (
    answer_key,
    best_of_k,
    bootstrap,
    diversity,
    evaluate_table,
    majority_at_k,
    normalize_text,
    pass_at_k,
    wilson,
)


def test_pass_at_k_by_hand():
    # n = 4, c = 1: of the 6 pairs, 3 hold the correct one.
    assert pass_at_k([4], [1], 2) == pytest.approx([0.5])
    assert pass_at_k([4, 4, 4], [0, 3, 4], 2) == pytest.approx([0.0, 1.0, 1.0])


def test_pass_at_1_is_the_share_of_correct_completions():
    assert pass_at_k([8, 5], [3, 5], 1) == pytest.approx([3 / 8, 1.0])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_equals_the_count_over_all_subsets(k):
    for num_correct in range(7):
        outcomes = [i < num_correct for i in range(6)]
        subsets = [any(subset) for subset in combinations(outcomes, k)]
        expected = sum(subsets) / len(subsets)
        assert pass_at_k([6], [num_correct], k) == pytest.approx([expected], abs=1e-12)


def test_pass_at_k_is_stable_for_many_completions():
    values = pass_at_k([100_000, 100_000], [1, 99_999], 1000)
    assert values == pytest.approx([0.01, 1.0])


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_a_user_error(k):
    with pytest.raises(UserError, match=rf"k \({k}\).*\(4\)"):
        pass_at_k([4, 9], [1, 1], k)
    with pytest.raises(UserError, match=rf"k \({k}\)"):
        majority_at_k(["a"] * 4, [True] * 4, k)


@pytest.mark.parametrize(
    ("extracted", "correct", "expected"),
    [
        (["7", "8", "7"], [True, False, True], 1.0),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["7", "8", "8", "7"], [True, False, False, True], 1.0),  # a tie: 7 occurs first
        (["8", "7", "7", "8"], [False, True, True, False], 0.0),
        ([None, None, "7"], [False, False, True], 1.0),  # no answer does not vote
        ([None, None], [False, False], 0.0),
        (["7", "7"], [False, True], 1.0),  # the first of them timed out
    ],
)
def test_majority_of_all(extracted, correct, expected):
    assert majority_at_k(extracted, correct, len(extracted)) == expected


@pytest.mark.parametrize(
    ("answer", "other", "are_same"),
    [
        ("1200", "$1,200.00", True), ("1200", r"\$1200.", True), ("(1, 2)", "(1,2)", True),
        ("5", "5.0", True), ("-5", "-5.00", True), ("120", "12", False), ("0.5", "0.50", True),
        ("0", "0.0", True), ("5", "-5", False), ("1,2", "12", False), ("A", "B", False),
        ("10", "1.0", False), ("5", "50", False), ("1,2,3", "123", False),
    ],
)  # fmt: skip
def test_answers_that_differ_in_form_alone_vote_together(answer, other, are_same):
    assert (answer_key(answer) == answer_key(other)) is are_same
    votes = [answer, "7", "7", other, other]
    right = [True, False, False, are_same, are_same]
    assert majority_at_k(votes[:4], right[:4], 4) == (1.0 if are_same else 0.0)


def test_majority_of_fewer_is_the_mean_over_disjoint_groups():
    extracted = ["7", "7", "8", "8", "7", "8", "7"]
    correct = [answer == "7" for answer in extracted]
    assert majority_at_k(extracted, correct, 3) == 0.5  # 7 7 8 wins, 8 7 8 loses, 7 is left out
    assert majority_at_k(extracted, correct, 1) == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_against_known_values(successes, trials, low, high):
    estimate = wilson(successes, trials)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)
    assert estimate.value == successes / trials


def test_bootstrap_is_deterministic_and_near_the_normal_interval():
    values = np.arange(400) % 2
    estimate = bootstrap(values, seed=1)
    assert estimate == bootstrap(values, seed=1)
    assert estimate.value == 0.5
    half = 1.96 * 0.5 / 20
    assert (0.5 - estimate.low, estimate.high - 0.5) == pytest.approx((half, half), abs=0.006)


def test_evaluate_table_has_the_keys_and_values_of_metrics_json():
    samples = [
        [(True, "7"), (True, "7"), (False, "8"), (False, None)],
        [(False, "1"), (False, "1"), (False, "2"), (True, "3")],
    ]
    metrics = evaluate_table(samples, [True, False], ks=[4])
    assert list(metrics) == ["greedy_pass@1", "pass@1", "pass@4", "maj@4"]
    values = {name: estimate["value"] for name, estimate in metrics.items()}
    assert values == {"greedy_pass@1": 0.5, "pass@1": 0.375, "pass@4": 1.0, "maj@4": 0.5}
    for estimate in metrics.values():
        assert set(estimate) == {"value", "low", "high", "num_problems"}
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        assert estimate["num_problems"] == 2


def test_evaluate_table_with_greedy_alone():
    assert list(evaluate_table(greedy=[True])) == ["greedy_pass@1"]


def test_normalize_text_keeps_the_space_between_words():
    assert normalize_text("  The  sum\n: 3 + 4 =7 .") == "the sum:3+4=7."
    assert normalize_text("a  b") == "a b"


def test_diversity_counts_texts_that_differ_beyond_spacing():
    assert diversity([["3 + 4", "3+4", "7", "7"], ["a", "b"], []]) == 0.75
    assert diversity([]) is None


@pytest.mark.parametrize("scores", [[0.5, 0.9, 0.1, 0.7, 0.3], [1, 1, 0, 0, 0], [2, 2, 2, 2, 2]])
def test_best_of_k_is_the_mean_over_all_subsets_and_orders_of_equal_scores(scores):
    correct = [True, False, True, False, True]
    for k in range(1, 6):
        wins = []
        for subset in combinations(range(5), k):
            best = max(scores[i] for i in subset)
            tied = [correct[i] for i in subset if scores[i] == best]
            wins.append(sum(tied) / len(tied))
        assert best_of_k(correct, scores, k) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


def test_best_of_1_is_the_mean_and_best_of_n_the_best_one():
    correct, scores = [True, False, False, True], [-3.0, -1.0, -2.0, -4.0]
    assert best_of_k(correct, scores, 1) == pytest.approx(0.5)
    assert best_of_k(correct, scores, 4) == 0.0
    assert best_of_k(correct, [0.0, *scores[1:]], 4) == 1.0
    with pytest.raises(UserError, match=r"k \(5\)"):
        best_of_k(correct, scores, 5)
