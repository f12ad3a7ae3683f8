"""pass@k, maj@k, their 95 % intervals, and diversity. Pure functions of verdicts and texts."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from restem_lightning.errors import UserError

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
NUM_RESAMPLES = 2000

_NO_VOTE = re.compile(r"\s|\\?\$")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_SPACE_BESIDE_PUNCTUATION = re.compile(r"(?<!\w) | (?!\w)")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems with its 95 % interval.

    Args:
        value: the mean, 0 to 1.
        low: lower end of the interval.
        high: upper end of the interval.
        num_problems: problems in the mean, at least 1.
    """

    value: float
    low: float
    high: float
    num_problems: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the estimate as it stands in metrics.json."""
        return asdict(self)


def pass_at_k(num_samples: np.ndarray, num_correct: np.ndarray, k: int) -> np.ndarray:
    """Returns, for each problem, the unbiased chance that k of its completions hold a correct one.

    1 - C(n - c, k) / C(n, k), as the product over j < k of (n - c - j) / (n - j), which neither
    overflows nor cancels.

    Args:
        num_samples: completions n of each problem, int, shape (num_problems,).
        num_correct: correct ones c among them, int, shape (num_problems,).
        k: completions that one attempt may use, 1 to the smallest n.

    Returns:
        float64, shape (num_problems,).

    Raises:
        UserError: k is out of range.

    Source: arXiv 2107.03374, equation 1.
    """
    n = np.atleast_1d(np.asarray(num_samples, dtype=np.float64))
    c = np.atleast_1d(np.asarray(num_correct, dtype=np.float64))
    _check_k(k, int(n.min(initial=np.iinfo(np.int64).max)))
    j = np.arange(k)
    wrong_left = np.maximum(n[:, None] - c[:, None] - j, 0.0)
    return 1.0 - np.prod(wrong_left / (n[:, None] - j), axis=1)


def majority_at_k(extracted: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Returns how often the majority answer of k completions of one problem is correct, 0 to 1.

    The n completions are cut in their order into n // k disjoint groups of k, a remainder is left
    out, and the mean over groups is taken; with k = n that is one vote over all of them. Answers
    count as equal if `answer_key` makes them so. A completion without an answer does not vote, a
    tie goes to the answer that occurs first, and a group without votes is wrong. The majority
    answer is correct if any of its completions in the group is (the others may have timed out).

    Args:
        extracted: the answer of each completion, None if it has none; length n.
        correct: whether the verdict of each completion is CORRECT; length n.
        k: completions that vote, 1 to n.

    Raises:
        UserError: k is out of range.
    """
    assert len(extracted) == len(correct)
    _check_k(k, len(extracted))
    starts = range(0, len(extracted) - k + 1, k)
    wins = [_majority_is_correct(extracted[i : i + k], correct[i : i + k]) for i in starts]
    return sum(wins) / len(wins)


def best_of_k(correct: Sequence[bool], scores: Sequence[float], k: int) -> float:
    """Returns the chance that the best-scored of k completions of one problem is correct, 0 to 1.

    The k are drawn without replacement from all n. With a_i the correctness of the i-th best score
    (from 0) it is sum_i a_i C(n - i - 1, k - 1) / C(n, k); of equal scores each counts as the mean
    of them, which is what breaking ties at random gives.

    Args:
        correct: whether each completion is CORRECT; length n.
        scores: of the scorer; length n.
        k: completions that one attempt may use, 1 to n.

    Raises:
        UserError: k is out of range.

    Source: arXiv 2402.06457, equation 3.
    """
    n = len(correct)
    assert n == len(scores)
    _check_k(k, n)
    _, group = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True)
    right = np.bincount(group, weights=np.asarray(correct, dtype=np.float64))
    share = np.repeat(right / np.bincount(group), np.bincount(group))
    ways = np.array([math.comb(n - i - 1, k - 1) / math.comb(n, k) for i in range(n)])
    return float(share @ ways)


def wilson(num_successes: int, num_trials: int) -> Estimate:
    """Returns a proportion with its Wilson score interval, sound near 0 and 1 too.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    assert 0 <= num_successes <= num_trials
    assert num_trials > 0
    p, n, z2 = num_successes / num_trials, num_trials, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    # At 0 and n successes an end is exactly the proportion; rounding must not pass it.
    low, high = min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
    return Estimate(value=p, low=low, high=high, num_problems=n)


def bootstrap(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Estimate:
    """Returns a mean over problems with its percentile bootstrap interval.

    Problems are drawn with replacement, 2,000 times, from a generator seeded by `seed`: the same
    values give the same interval. If all values are equal, the interval has no width.

    Args:
        values: one value per problem, shape (num_problems,).
        seed: of the resampling.
    """
    values = np.asarray(values, dtype=np.float64)
    assert values.size > 0
    rng = np.random.default_rng(seed)
    size = values.size
    means = [values[rng.integers(0, size, size)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(values.mean())
    return Estimate(value=value, low=float(low), high=float(high), num_problems=size)


def evaluate_table(
    samples: Iterable[Sequence[tuple[bool, str | None]]] = (),
    greedy: Sequence[bool] = (),
    *,
    ks: Sequence[int] = (1,),
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of one policy on one evaluation set, as in metrics.json.

    The keys are greedy_pass@1 (Wilson interval), pass@1 and pass@k for each k (bootstrap over
    problems) and maj@n (bootstrap), where n is the smallest number of completions of a problem.

    Args:
        samples: per problem, (correct, extracted answer) of each of its sampled completions;
            empty if only greedy decoding was done. Iterated twice, so that what is read from a
            file need not be held.
        greedy: per problem, whether the greedy completion is correct; empty if there is none.
        ks: the k of pass@k, each at most the number of completions; 1 is always added.
        seed: of the bootstrap.

    Raises:
        UserError: a k is out of range.
    """
    metrics: dict[str, Estimate] = {}
    if greedy:
        metrics["greedy_pass@1"] = wilson(sum(map(bool, greedy)), len(greedy))
    counts = np.fromiter(
        ((len(problem), sum(bool(right) for right, _ in problem)) for problem in samples),
        np.dtype((np.int32, 2)),
    )
    if len(counts):
        # Few of the pairs differ, and a pass@k holds k numbers of each at a time.
        pairs, place = np.unique(counts, axis=0, return_inverse=True)
        for k in sorted({1, *ks}):
            values = pass_at_k(pairs[:, 0], pairs[:, 1], k)[place.reshape(-1)]
            metrics[f"pass@{k}"] = bootstrap(values, seed=seed)
        n = int(pairs[:, 0].min())
        if n > 1:
            votes = np.fromiter((_majority_of_problem(one, n) for one in samples), np.float64)
            metrics[f"maj@{n}"] = bootstrap(votes, seed=seed)
    return {name: estimate.to_dict() for name, estimate in metrics.items()}


def diversity(texts: Sequence[Sequence[str]]) -> float | None:
    """Returns the mean over problems of distinct texts / texts, None if there are none.

    Args:
        texts: per problem, the text of each of its completions; problems without any are left
            out. Texts are the same if `normalize_text` makes them so.
    """
    rates = [
        len({normalize_text(text) for text in problem}) / len(problem)
        for problem in texts
        if problem
    ]
    return sum(rates) / len(rates) if rates else None


def normalize_text(text: str) -> str:
    """Returns a text without what does not tell completions apart.

    Case is folded, white space becomes one space, and a space beside punctuation is dropped.
    """
    return _SPACE_BESIDE_PUNCTUATION.sub("", " ".join(text.casefold().split()))


def answer_key(answer: str) -> str:
    """Returns an answer as it votes: $1,200.00 and 1200 are one answer, 1/2 and 0.5 are two.

    White space, dollar signs, backslashes before them, a full stop at the end and, of a number,
    separators of thousands and zeros behind the decimal point do not tell answers apart.
    """
    text = _NO_VOTE.sub("", answer).rstrip(".")
    if _NUMBER.fullmatch(text):
        text = text.replace(",", "")
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text


def _majority_of_problem(problem: Sequence[tuple[bool, str | None]], k: int) -> float:
    return majority_at_k([answer for _, answer in problem], [right for right, _ in problem], k)


def _majority_is_correct(extracted: Sequence[str | None], correct: Sequence[bool]) -> bool:
    keys = [None if answer is None else answer_key(answer) for answer in extracted]
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # of equal counts, the first to occur
    return any(right for key, right in zip(keys, correct, strict=True) if key == winner)


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise UserError(
            f"k ({k}) must be from 1 to the number of completions per problem ({num_samples}); "
            "lower k or draw more completions"
        )
