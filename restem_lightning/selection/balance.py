"""The balance score: how well a temperature and a threshold keep completions many and right."""

from collections.abc import Sequence


def balance_score(selected: Sequence[tuple[int, int]], num_wanted: int) -> float:
    """Returns the mean over problems of min(unique / num_wanted, 1) * unique / selected.

    Args:
        selected: for each problem how many completions pass the threshold, and how many distinct
            correct ones are among them.
        num_wanted: distinct correct completions of a problem that are enough, at least 1.

    Source: B-STaR, arXiv 2412.17256, section 3 (a problem of which nothing is selected counts 0).
    """
    scores = [
        min(unique / num_wanted, 1.0) * unique / total if total else 0.0
        for total, unique in selected
    ]
    return sum(scores) / len(scores) if scores else 0.0
