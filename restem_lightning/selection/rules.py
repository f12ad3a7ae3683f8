"""The rules of a selection: pure functions of one problem's completions."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from restem_lightning.completions import Completion, VerdictKind
from restem_lightning.equations import equations
from restem_lightning.errors import UserError
from restem_lightning.metrics import answer_key, normalize_text
from restem_lightning.selection.params import Dedupe, SelectionParams, Threshold

MAX_EXPONENT = 80.0  # e^89 is no float32
_TOKEN = re.compile(r"\w+|[^\w\s]")


class Candidate(NamedTuple):
    """What the rules look at in a completion.

    Attributes:
        index: its completion_index.
        row: its row in the source.
        reward: the verifier's.
        is_whole: whether it was not truncated.
        is_paid: whether verdict and reward pass the threshold.
        text: None unless a rule needs it.
        extracted: its answer; None if it has none, or if no rule needs it.
    """

    index: int
    row: int
    reward: float = 1.0
    is_whole: bool = True
    is_paid: bool = True
    text: str | None = None
    extracted: str | None = None


def passes(kind: VerdictKind, reward: float, threshold: Threshold) -> bool:
    """Returns whether a verdict and its reward pass a threshold."""
    if threshold == "correct":
        return kind is VerdictKind.CORRECT and reward > 0
    return kind is not VerdictKind.ERROR and (threshold == "none" or reward > threshold)


def is_acceptable(completion: Completion, threshold: Threshold) -> bool:
    """Returns whether a completion may be accepted: whole, and paid for."""
    verdict = completion.verdict
    return completion.finish_reason != "length" and passes(verdict.kind, verdict.reward, threshold)


def paid_by_majority(problem: Sequence[Candidate], threshold: Threshold) -> list[Candidate]:
    """Returns the candidates with the rewards of a vote: 1 for the most frequent answer, else 0.

    Truncated completions and those without an answer do not vote; a tie goes to the answer that
    occurs first.
    """
    keys = [None if one.extracted is None else answer_key(one.extracted) for one in problem]
    votes = Counter(
        key for key, one in zip(keys, problem, strict=True) if one.is_whole and key is not None
    )
    winner = max(votes, key=votes.__getitem__, default=None)
    voted = []
    for key, one in zip(keys, problem, strict=True):
        reward = float(key is not None and key == winner)
        kind = VerdictKind.CORRECT if reward else VerdictKind.WRONG
        voted.append(one._replace(reward=reward, is_paid=passes(kind, reward, threshold)))
    return voted


def dedupe_key(dedupe: Dedupe) -> Callable[[str], Any]:
    """Returns the function of a text that is equal for texts that count as the same."""
    if dedupe == "exact":
        return str
    if dedupe == "normalized":
        return normalize_text
    return lambda text: equations(text) or normalize_text(text)


def distinct(paid: list[Candidate], params: SelectionParams) -> list[Candidate]:
    """Returns one of all candidates that count as the same, in order of completion_index."""
    if params.dedupe == "none":
        return paid
    key = dedupe_key(params.dedupe)
    kept: dict[Any, Candidate] = {}
    for one in paid:
        own = key(one.text)
        if own not in kept:
            kept[own] = one
        elif params.dedupe_keep == "farthest":
            others = [other.text for name, other in kept.items() if name != own]
            kept[own] = max(kept[own], one, key=lambda some: _total_distance(some.text, others))
    return sorted(kept.values(), key=lambda one: one.index)


def limit_of(
    fails: Sequence[bool], params: SelectionParams, max_per_problem: int | None
) -> int | None:
    """Returns how many completions of one problem may be accepted at most.

    Args:
        fails: of the problem's completions in order, whether each one must not be accepted; as many
            as `params.probe`, or all.
        params: the settings.
        max_per_problem: the limit of a problem that always fails.
    """
    if params.quota == "uniform" or max_per_problem is None:
        return max_per_problem
    probe = fails[: params.probe]
    return max(1, round(max_per_problem * sum(probe) / len(probe)))


def choose(
    problem_id: str, some: list[Candidate], limit: int | None, params: SelectionParams
) -> list[Candidate]:
    """Returns at most `limit` of a problem's distinct candidates by the rule `params.select`."""
    if limit is None or len(some) <= limit:
        return some
    if params.select == "first":
        return some[:limit]
    if params.select == "max_reward":
        return sorted(some, key=lambda one: (-one.reward, one.index))[:limit]
    if params.select == "random":
        return draw(problem_id, some, limit, params.seed)
    return _most_diverse(some, limit)


def draw(problem_id: str, some: list[Candidate], num: int, seed: int | str) -> list[Candidate]:
    """Returns `num` candidates at random, independently for each problem."""

    def lot(one: Candidate) -> bytes:
        return hashlib.sha256(f"{seed}/{one.index}/{problem_id}".encode()).digest()

    return sorted(some, key=lot)[:num]


def weight_of(reward: float, params: SelectionParams) -> float:
    """Returns the weight of an accepted completion in the loss.

    Raises:
        UserError: an exponential weight is too large.
    """
    if params.weight == "uniform":
        return 1.0
    if params.weight == "reward":
        return reward
    if reward / params.beta > MAX_EXPONENT:
        raise UserError(
            f"selection.beta ({params.beta}) must be above {reward / MAX_EXPONENT:g} for a reward "
            f"of {reward}; raise it"
        )
    return math.exp(reward / params.beta)


def edit_distance(a: str, b: str) -> int:
    """Returns the Levenshtein distance, one column of the table at a time as bits of an integer.

    Source: Hyyro, "Explaining and extending the bit-parallel approximate string matching algorithm
    of Myers" (2001).
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for place, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << place
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)  # where a column rises and falls by one
    for character in b:
        equal = places.get(character, 0) | down
        diagonal = (((equal & up) + up) ^ up) | equal
        right, left = down | ~(diagonal | up) & full, up & diagonal
        distance += bool(right & last) - bool(left & last)
        right = right << 1 | 1
        up = (left << 1 | ~(diagonal | right)) & full
        down = right & diagonal & full
    return distance


def _total_distance(text: str, others: list[str]) -> int:
    return sum(edit_distance(text, other) for other in others)


def _most_diverse(some: list[Candidate], limit: int) -> list[Candidate]:
    """Returns the first candidate, then greedily the one farthest from all taken so far.

    The distance is that of Jaccard on sets of words and punctuation marks; a tie goes to the
    lower completion_index.
    """
    words = [frozenset(_TOKEN.findall(one.text.casefold())) for one in some]
    distance = [float("inf")] * len(words)
    taken = [0]
    while len(taken) < limit:
        last = words[taken[-1]]
        distance = [min(old, _jaccard(last, one)) for old, one in zip(distance, words, strict=True)]
        left = (position for position in range(len(words)) if position not in taken)
        taken.append(max(left, key=distance.__getitem__))
    return [some[position] for position in taken]


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    total = len(a) + len(b) - shared
    return 1.0 - shared / total if total else 0.0
