"""From a pool of completions to the accepted dataset, and the funnel that led to it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from restem_lightning.completions import CompletionStore, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.selection.accepted import ACCEPTED_SCHEMA, with_column
from restem_lightning.selection.params import SelectionParams
from restem_lightning.selection.rules import (
    Candidate,
    choose,
    distinct,
    draw,
    limit_of,
    paid_by_majority,
    weight_of,
)

# A pool: a table with the columns of `completions.SCHEMA`, a store, or several stores that share
# no completion_index of a problem.
Source = pa.Table | CompletionStore | Sequence[CompletionStore]

HINT = "hint/"  # purpose of completions whose prompt held a hint
_ADDRESS = ["problem_id", "completion_index"]
_BATCH_ROWS = 4096
# Texts of a large pool pass the 2 GiB that one array of `string` can hold.
_TYPES = {
    "problem_id": pa.large_string(),
    "completion_index": pa.int32(),
    "reward": pa.float64(),
    "text": pa.large_string(),
    "extracted": pa.large_string(),
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The result of a selection.

    Args:
        accepted: table of ACCEPTED_SCHEMA, sorted by problem_id (code points), completion_index.
        funnel: completions left after each stage (completions, not_truncated, correct, distinct,
            accepted), then num_problems, num_solved (problems with a completion at stage
            "correct"), acceptance_rate (accepted / completions) and verdicts (kind -> count).
    """

    accepted: pa.Table
    funnel: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """One problem with its completions and what the rules leave of them."""

    problem_id: str
    candidates: list[Candidate]
    paid: list[Candidate]
    distinct: list[Candidate]

    def limit(self, params: SelectionParams, max_per_problem: int | None) -> int | None:
        """Returns how many may be accepted at most."""
        fails = [not (one.is_whole and one.is_paid) for one in self.candidates]
        return limit_of(fails, params, max_per_problem)

    def accepted(self, params: SelectionParams, max_per_problem: int | None) -> list[Candidate]:
        """Returns the candidates that are accepted."""
        limit = self.limit(params, max_per_problem)
        chosen = choose(self.problem_id, self.distinct, limit, params)
        if not params.random_control:
            return chosen
        whole = [one for one in self.candidates if one.is_whole]
        return draw(self.problem_id, whole, len(chosen), f"control/{params.seed}")


def select_completions(source: Source, params: SelectionParams | None = None) -> Selection:
    """Returns the accepted dataset of a pool and the funnel that led to it.

    The result does not depend on the order of rows or on the boundaries of parts. The pool is read
    twice: light columns of all rows, then all columns of the accepted rows. A completion that was
    drawn with a hint gets the prompt of its problem without the hint.

    Args:
        source: the pool.
        params: the settings, the default ones if None.

    Raises:
        UserError: a part of the pool is damaged, or a completion is in the pool twice.
    """
    params = params or SelectionParams()
    candidates, hinted, funnel = _candidates(source, params)
    problems = [_judge(problem_id, some, params) for problem_id, some in _by_problem(candidates)]
    most = _raised(problems, params)
    chosen = {
        one.row: weight_of(one.reward, params)
        for problem in problems
        for one in problem.accepted(params, most)
    }
    num_completions, verdicts = funnel["completions"], funnel.pop("verdicts")
    funnel |= {
        "correct": sum(len(problem.paid) for problem in problems),
        "distinct": sum(len(problem.distinct) for problem in problems),
        "accepted": len(chosen),
        "num_problems": funnel.pop("num_problems"),
        "num_solved": sum(bool(problem.paid) for problem in problems),
        "acceptance_rate": len(chosen) / num_completions if num_completions else 0.0,
        "verdicts": verdicts,
    }
    accepted = _gather(source, chosen)
    return Selection(accepted=_without_hints(source, accepted, hinted), funnel=funnel)


def solved_problems(source: Source, params: SelectionParams) -> set[str]:
    """Returns the ids of problems with a completion that may be accepted."""
    candidates, _, _ = _candidates(source, params)
    return {
        problem_id
        for problem_id, some in _by_problem(candidates)
        if _judge(problem_id, some, params).paid
    }


def _judge(problem_id: str, candidates: list[Candidate], params: SelectionParams) -> _Judged:
    if params.rewards == "majority":
        candidates = paid_by_majority(candidates, params.threshold)
    paid = [one for one in candidates if one.is_whole and one.is_paid]
    return _Judged(
        problem_id=problem_id, candidates=candidates, paid=paid, distinct=distinct(paid, params)
    )


def _raised(problems: list[_Judged], params: SelectionParams) -> int | None:
    """Returns max_per_problem, raised until params.min_total are accepted or no more are left."""
    most = params.max_per_problem
    if most is None or params.min_total is None:
        return most
    left = max((len(problem.distinct) for problem in problems), default=0)

    def total(limit: int) -> int:
        limits = ((one, one.limit(params, limit)) for one in problems)
        return sum(min(len(one.distinct), own) for one, own in limits)

    candidates = range(most, max(most, left) + 1)
    place = bisect_left(candidates, params.min_total, key=total)
    return candidates[min(place, len(candidates) - 1)]


def _scan(source: Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a source, at every call in the same order."""
    if isinstance(source, pa.Table):
        yield from source.select(columns).to_batches(max_chunksize=_BATCH_ROWS)
    else:
        for store in [source] if isinstance(source, CompletionStore) else source:
            yield from store.iter_batches(columns)


def _candidates(
    source: Source, params: SelectionParams
) -> tuple[pa.Table, set[int], dict[str, Any]]:
    """Returns what the rules look at sorted by address, rows with a hint, and the funnel so far."""
    # A vote, a control and a fail rate look at rejected completions too.
    needs_all = params.rewards != "verdict" or params.random_control or params.quota != "uniform"
    names = [*_ADDRESS, "reward"]
    names += ["text"] if params.dedupe != "none" or params.select == "diverse" else []
    names += ["extracted"] if params.rewards == "majority" else []
    flags = [("is_whole", pa.bool_()), ("is_paid", pa.bool_()), ("row", pa.int64())]
    schema = pa.schema([*((name, _TYPES[name]) for name in names), *flags])
    kept, hinted, problem_ids, verdicts = [], set(), set(), Counter()
    num_completions = num_not_truncated = 0
    for batch in _scan(source, [*names, "finish_reason", "verdict", "purpose"]):
        whole = pc.not_equal(batch["finish_reason"].cast(pa.string()), "length")
        paid = _passes(batch, params)
        row = pa.array(range(num_completions, num_completions + batch.num_rows), pa.int64())
        columns = [*(batch[name].cast(_TYPES[name]) for name in names), whole, paid, row]
        light = pa.RecordBatch.from_arrays(columns, schema=schema)
        kept.append(light if needs_all else light.filter(pc.and_(whole, paid)))
        hinted.update(row.filter(pc.equal(batch["purpose"].cast(pa.string()), HINT)).to_pylist())
        problem_ids.update(pc.unique(batch["problem_id"]).to_pylist())
        verdicts.update(batch["verdict"].to_pylist())
        num_completions += batch.num_rows
        num_not_truncated += pc.sum(whole).as_py() or 0
    table = pa.Table.from_batches(kept, schema=schema)
    funnel = {
        "completions": num_completions,
        "not_truncated": num_not_truncated,
        "num_problems": len(problem_ids),
        "verdicts": dict(sorted(verdicts.items())),
    }
    table = table.sort_by([(name, "ascending") for name in _ADDRESS]).combine_chunks()
    return table, hinted, funnel


def _passes(batch: pa.RecordBatch, params: SelectionParams) -> pa.Array:
    """Returns `rules.passes` of each row."""
    verdicts, threshold = batch["verdict"].cast(pa.string()), params.threshold
    if threshold == "correct":
        is_correct = pc.equal(verdicts, VerdictKind.CORRECT.value)
        return pc.and_(is_correct, pc.greater(batch["reward"], 0.0))
    is_judged = pc.not_equal(verdicts, VerdictKind.ERROR.value)
    if threshold == "none":
        return is_judged
    return pc.and_(is_judged, pc.greater(batch["reward"], threshold))


def _by_problem(candidates: pa.Table) -> Iterator[tuple[str, list[Candidate]]]:
    """Yields each problem with its candidates in order of completion_index."""
    names = {"completion_index": "index"}  # of columns that are called otherwise in Candidate
    for batch in _slices(candidates):
        problem_id = batch["problem_id"][0].as_py()
        columns = {
            names.get(name, name): batch[name].to_pylist()
            for name in candidates.column_names
            if name != "problem_id"
        }
        rows = zip(*columns.values(), strict=True)
        some = [Candidate(**dict(zip(columns, row, strict=True))) for row in rows]
        if len({one.index for one in some}) < len(some):
            raise UserError(
                f"completion_index must be unique within a problem, and problem {problem_id!r} has "
                "one twice in the pool; delete one of the parts that hold it"
            )
        yield problem_id, some


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    """Yields the rows of each problem of a sorted table."""
    start = 0
    for _, group in groupby(table["problem_id"].to_pylist()):
        stop = start + sum(1 for _ in group)
        yield table.slice(start, stop - start)
        start = stop


def _gather(source: Source, weights: dict[int, float]) -> pa.Table:
    """Returns rows of a source, given by their numbers, with these weights as accepted dataset."""
    rows, columns = sorted(weights), ACCEPTED_SCHEMA.names[:-1]
    taken, start = [], 0
    for batch in _scan(source, columns):
        low, high = bisect_left(rows, start), bisect_left(rows, start + batch.num_rows)
        if low < high:
            taken.append(batch.take(pa.array([row - start for row in rows[low:high]])))
        start += batch.num_rows
    column = pa.array([weights[row] for row in rows], pa.float32())
    table = pa.Table.from_batches(taken, schema=pa.schema(list(ACCEPTED_SCHEMA)[:-1]))
    table = table.append_column(ACCEPTED_SCHEMA.field("weight"), column)
    table = table.replace_schema_metadata(ACCEPTED_SCHEMA.metadata)
    return table.sort_by([(name, "ascending") for name in _ADDRESS]).combine_chunks()


def _without_hints(source: Source, accepted: pa.Table, hinted: set[int]) -> pa.Table:
    """Returns the accepted dataset with the usual prompts in place of those that held a hint."""
    if not hinted:
        return accepted
    usual: dict[str, list[int]] = {}
    for batch in _scan(source, ["problem_id", "purpose", "prompt_ids"]):
        for row in batch.filter(pc.not_equal(batch["purpose"].cast(pa.string()), HINT)).to_pylist():
            usual.setdefault(row["problem_id"], row["prompt_ids"])
    prompts = [usual[problem_id] for problem_id in accepted["problem_id"].to_pylist()]
    return with_column(accepted, "prompt_ids", prompts)
