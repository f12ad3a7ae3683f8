"""The balance score: how well a temperature and a threshold keep completions many and right."""

from collections.abc import Sequence


def balance_score(selected: Sequence[tuple[int, int]], num_wanted: int) -> float:
    """Returns the mean over problems of min(correct / num_wanted, 1) * correct / selected.

    Args:
        selected: for each problem how many distinct completions pass the threshold, and how many
            correct ones are among them.
        num_wanted: distinct correct completions of a problem that are enough, at least 1.

    Source: B-STaR, arXiv 2412.17256, section 3.1 (a problem of which nothing is selected counts 0).
    """
    scores = [
        min(correct / num_wanted, 1.0) * correct / total if total else 0.0
        for total, correct in selected
    ]
    return sum(scores) / len(scores) if scores else 0.0
