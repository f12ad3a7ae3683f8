"""Pairs of a correct and an incorrect completion of one problem, for a verifier to learn from."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from restem_lightning.completions import CompletionStore, VerdictKind

COLUMNS = ("problem_id", "prompt_ids", "completion_ids", "finish_reason", "verdict")
_INCORRECT = (VerdictKind.WRONG.value, VerdictKind.NO_ANSWER.value)


class Judged(NamedTuple):
    """A completion after its prompt, as token ids."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


class Pair(NamedTuple):
    """Two completions of one problem."""

    correct: Judged
    incorrect: Judged


@dataclass(kw_only=True)
class _Problem:
    correct: dict[Judged, None] = field(default_factory=dict)
    incorrect: dict[Judged, None] = field(default_factory=dict)


def preference_pairs(
    stores: Iterable[CompletionStore],
    *,
    human: pa.Table | None = None,
    eos_ids: Sequence[int] = (),
    max_per_problem: int | None = None,
    seed: int = 0,
) -> list[Pair]:
    """Returns each correct completion of a problem with each incorrect one, over all stores.

    Token ids that were drawn several times count once. TIMEOUT and ERROR are neither correct nor
    incorrect.

    Args:
        stores: the pools.
        human: human solutions (a table of ACCEPTED_SCHEMA), correct too; None for none.
        eos_ids: of the policy, the one to write first; ends what a stop string ended, as in the
            accepted dataset.
        max_per_problem: most pairs of a problem, drawn at random; None for all.
        seed: of that draw.

    Source: arXiv 2402.06457, section 3.1 (the Cartesian product).
    """
    problems: dict[str, _Problem] = defaultdict(_Problem)
    for store in stores:
        for batch in store.iter_batches(COLUMNS):
            for row in batch.to_pylist():
                problem, judged = problems[row["problem_id"]], _judged(row, eos_ids)
                if row["verdict"] == VerdictKind.CORRECT.value:
                    problem.correct.setdefault(judged)
                elif row["verdict"] in _INCORRECT:
                    problem.incorrect.setdefault(judged)
    for row in human.to_pylist() if human is not None else []:
        problems[row["problem_id"]].correct.setdefault(_judged(row, eos_ids))
    pairs: list[Pair] = []
    for problem_id, problem in sorted(problems.items()):
        product = [Pair(good, bad) for good in problem.correct for bad in problem.incorrect]
        if max_per_problem is not None and len(product) > max_per_problem:
            lots = [
                (hashlib.sha256(f"{seed}/{number}/{problem_id}".encode()).digest(), number)
                for number in range(len(product))
            ]
            product = [product[number] for _, number in sorted(lots)[:max_per_problem]]
        pairs += product
    return pairs


def _judged(row: dict[str, Any], eos_ids: Sequence[int]) -> Judged:
    """Returns a row's token ids; what was not truncated ends with EOS."""
    ids = tuple(row["completion_ids"])
    is_whole = row.get("finish_reason") != "length"
    if is_whole and eos_ids and ids[-1:] != () and ids[-1] not in eos_ids:
        ids = (*ids, eos_ids[0])
    return Judged(tuple(row["prompt_ids"]), ids)
