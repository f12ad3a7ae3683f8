"""Paired statistics of arms over problems and seeds; pure functions.

Legend of shapes: `S` seeds, `P` problems. A row is one seed's run, a column one problem.
"""

import math
from dataclasses import dataclass

import numpy as np

from restem_lightning.metrics import NUM_RESAMPLES


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over problems and seeds with its 95 % interval.

    Args:
        value: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided p-value of "the mean is 0".
    """

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, kw_only=True)
class SignTest:
    """How many problems one arm solves more often than another.

    Args:
        num_better: problems that the arm solves with more seeds than the control does.
        num_worse: problems where it is the other way round.
        p: exact two-sided p-value of "both are as likely".
    """

    num_better: int
    num_worse: int
    p: float


def crossed_bootstrap(values_SP: np.ndarray, *, seed: int = 0) -> Mean:
    """Returns a mean over problems and seeds with its percentile bootstrap interval.

    Problems and seeds are drawn with replacement, independently of each other, so both that there
    are other problems and that a run may fall out otherwise are in the interval. The difference of
    two arms on the same problems and seeds makes it the paired bootstrap.

    Args:
        values_SP: float, shape (S, P), both at least 1.
        seed: of the resampling.
    """
    values_SP = np.asarray(values_SP, dtype=np.float64)
    num_seeds, num_problems = values_SP.shape
    rng = np.random.default_rng(seed)
    means = np.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):
        seeds = rng.integers(0, num_seeds, num_seeds)
        problems = rng.integers(0, num_problems, num_problems)
        means[index] = values_SP[seeds].mean(axis=0)[problems].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    # One is added to each count: a p-value of 0 is more than a bootstrap can say.
    tail = 1 + min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Mean(
        value=float(values_SP.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * tail / (NUM_RESAMPLES + 1)),
    )


def mcnemar(arm_SP: np.ndarray, control_SP: np.ndarray) -> SignTest:
    """Returns McNemar's exact test of two arms on the same problems.

    With one seed the discordant problems are those that only one arm solves. With several, a
    problem counts once, for the arm that solves it with more seeds: seeds share their problems, so
    pairs of (problem, seed) would count as independent what is not.

    Args:
        arm_SP: whether solved, bool, shape (S, P).
        control_SP: the same of the control, paired by row and column.

    Source: Q. McNemar, Psychometrika 12 (1947), 153-157, with the binomial tail in place of chi2.
    """
    num_more_P = arm_SP.astype(int).sum(axis=0) - control_SP.astype(int).sum(axis=0)
    better, worse = int((num_more_P > 0).sum()), int((num_more_P < 0).sum())
    return SignTest(num_better=better, num_worse=worse, p=binomial_p(better, worse))


def binomial_p(num_better: int, num_worse: int) -> float:
    """Returns the exact two-sided p-value of two counts if either side is as likely."""
    num = num_better + num_worse
    tail = sum(math.comb(num, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**num)
