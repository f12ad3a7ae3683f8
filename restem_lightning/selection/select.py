"""From a pool of completions to the accepted dataset, and the funnel that led to it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.selection.accepted import ACCEPTED_SCHEMA
from restem_lightning.selection.buckets import Buckets
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
_FLAGS = ["is_whole", "is_paid", "is_hinted", "is_candidate"]


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

    def fails(self, params: SelectionParams) -> bytes:
        """Returns of the first `probe` candidates whether they must not be accepted."""
        probe = self.candidates[: params.probe]
        return bytes(not (one.is_whole and one.is_paid) for one in probe)

    def accepted(self, params: SelectionParams, max_per_problem: int | None) -> list[Candidate]:
        """Returns the candidates that are accepted, in order of completion_index."""
        limit = limit_of(self.fails(params), params, max_per_problem)
        chosen = choose(self.problem_id, self.distinct, limit, params)
        if params.random_control:
            whole = [one for one in self.candidates if one.is_whole]
            chosen = draw(self.problem_id, whole, len(chosen), f"control/{params.seed}")
        return sorted(chosen, key=lambda one: one.index)


def select_completions(source: Source, params: SelectionParams | None = None) -> Selection:
    """Returns the accepted dataset of a pool, in memory, and the funnel that led to it.

    Args:
        source: the pool.
        params: the settings, the default ones if None.

    Raises:
        UserError: as `stream_accepted`.
    """
    funnel: dict[str, Any] = {}
    tables = list(stream_accepted(source, params or SelectionParams(), funnel))
    accepted = pa.concat_tables([ACCEPTED_SCHEMA.empty_table(), *tables]).combine_chunks()
    return Selection(accepted=accepted, funnel=funnel)


def stream_accepted(
    source: Source, params: SelectionParams, funnel: dict[str, Any]
) -> Iterator[pa.Table]:
    """Yields the accepted dataset of a pool in pieces; memory does not grow with the pool.

    The whole does not depend on the order of rows, on the boundaries of parts, or on how it is cut
    into pieces. A completion that was drawn with a hint gets the prompt of its problem without the
    hint.

    Args:
        source: the pool, read once.
        params: the settings.
        funnel: gets the funnel (see `Selection`) once the last piece is out.

    Raises:
        UserError: a part of the pool is damaged, or a completion is in the pool twice.
    """
    buckets, counts = _share_out(source, params, ACCEPTED_SCHEMA.names[:-1])
    most = _raised(buckets, params)
    num_correct = num_distinct = num_accepted = num_solved = 0
    for bucket in buckets:
        accepted: list[Candidate] = []
        for problem in _judged(bucket, params):
            num_correct += len(problem.paid)
            num_distinct += len(problem.distinct)
            num_solved += bool(problem.paid)
            accepted += problem.accepted(params, most)
        num_accepted += len(accepted)
        weights = [weight_of(one.reward, params) for one in accepted]
        yield _gather(bucket, [one.row for one in accepted], weights)
    total, verdicts = counts["completions"], counts["verdicts"]
    funnel |= {
        "completions": total,
        "not_truncated": counts["not_truncated"],
        "correct": num_correct,
        "distinct": num_distinct,
        "accepted": num_accepted,
        "num_problems": counts["num_problems"],
        "num_solved": num_solved,
        "acceptance_rate": num_accepted / total if total else 0.0,
        "verdicts": verdicts,
    }


def solved_problems(source: Source, params: SelectionParams) -> set[str]:
    """Returns the ids of problems with a completion that may be accepted."""
    buckets, _ = _share_out(source, params, _ADDRESS)
    return {
        problem.problem_id
        for bucket in buckets
        for problem in _judged(bucket, params)
        if problem.paid
    }


def _raised(buckets: Buckets, params: SelectionParams) -> int | None:
    """Returns max_per_problem, raised until params.min_total are accepted or no more are left."""
    most = params.max_per_problem
    if most is None or params.min_total is None:
        return most
    left = [
        (len(problem.distinct), problem.fails(params))
        for bucket in buckets
        for problem in _judged(bucket, params)
    ]

    def total(limit: int) -> int:
        return sum(min(num, limit_of(fails, params, limit)) for num, fails in left)

    candidates = range(most, max(most, *(num for num, _ in left), 0) + 1)
    place = bisect_left(candidates, params.min_total, key=total)
    return candidates[min(place, len(candidates) - 1)]


def _stores(source: CompletionStore | Sequence[CompletionStore]) -> Sequence[CompletionStore]:
    return [source] if isinstance(source, CompletionStore) else source


def _scan(source: Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a source."""
    if isinstance(source, pa.Table):
        yield from source.select(columns).to_batches(max_chunksize=_BATCH_ROWS)
    else:
        for store in _stores(source):
            yield from store.iter_batches(columns)


def empty_buckets(source: Source) -> tuple[Buckets, int]:
    """Returns buckets for the rows of a source, and its number of problems."""
    if isinstance(source, pa.Table):
        ids, num_rows, folder = source["problem_id"], source.num_rows, None
    else:
        parts = [part for store in _stores(source) for part in store.parts()]
        ids = pa.chunked_array((part.problem_ids for part in parts), pa.string())
        num_rows = sum(part.num_rows for part in parts)
        folder = parts[0].path.parent if parts else None
    problem_ids = pc.unique(ids).sort()
    return Buckets(problem_ids, num_rows, folder=folder), len(problem_ids)


def _rule_columns(params: SelectionParams) -> list[str]:
    """Returns the columns that the rules look at beside the address."""
    needs_text = params.dedupe != "none" or params.select == "diverse"
    needs_answer = params.rewards == "majority"
    return ["reward", *["text"] * needs_text, *["extracted"] * needs_answer]


def _share_out(
    source: Source, params: SelectionParams, columns: Sequence[str]
) -> tuple[Buckets, dict[str, Any]]:
    """Returns what the rules look at, and the funnel so far.

    Args:
        source: the pool.
        params: the settings.
        columns: what else is wanted of the rows.
    """
    # A vote, a control and a fail rate look at rejected completions too.
    needs_all = params.rewards != "verdict" or params.random_control or params.quota != "uniform"
    names = list(dict.fromkeys([*_ADDRESS, *_rule_columns(params), *columns]))
    buckets, num_problems = empty_buckets(source)
    verdicts: Counter[str] = Counter()
    num_completions = num_not_truncated = 0
    for batch in _scan(
        source, list(dict.fromkeys([*names, "finish_reason", "verdict", "purpose"]))
    ):
        whole = pc.not_equal(batch["finish_reason"].cast(pa.string()), "length")
        paid = _passes(batch, params)
        hinted = pc.equal(batch["purpose"].cast(pa.string()), HINT)
        candidate = pa.repeat(True, batch.num_rows) if needs_all else pc.and_(whole, paid)
        flags = zip(_FLAGS, (whole, paid, hinted, candidate), strict=True)
        rows = pa.RecordBatch.from_pydict({name: batch[name] for name in names} | dict(flags))
        rows = rows.filter(pc.or_(candidate, _has_usual_prompt(rows)))
        buckets.add(rows, out_of=batch.num_rows)
        verdicts.update(batch["verdict"].to_pylist())
        num_completions += batch.num_rows
        num_not_truncated += pc.sum(whole).as_py() or 0
    counts = {
        "completions": num_completions,
        "not_truncated": num_not_truncated,
        "num_problems": num_problems,
        "verdicts": dict(sorted(verdicts.items())),
    }
    return buckets, counts


def _has_usual_prompt(rows: pa.RecordBatch) -> pa.Array:
    """Returns of each row whether it is the first one of its problem without a hint."""
    problems = rows["problem_id"].dictionary_encode().indices.to_numpy()
    places = np.flatnonzero(~rows["is_hinted"].to_numpy(zero_copy_only=False))
    _, firsts = np.unique(problems[places], return_index=True)
    is_first = np.zeros(rows.num_rows, dtype=bool)
    is_first[places[firsts]] = True
    return pa.array(is_first)


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


def _judged(bucket: pa.Table, params: SelectionParams) -> Iterator[_Judged]:
    """Yields the problems of a bucket in order of problem_id; `row` is that of the bucket."""
    names = [*_rule_columns(params), "is_whole", "is_paid"]
    table = bucket.select([*_ADDRESS, *names])
    table = table.append_column("row", pa.array(range(bucket.num_rows), pa.int64()))
    table = table.filter(bucket["is_candidate"])
    table = table.sort_by([(name, "ascending") for name in _ADDRESS]).combine_chunks()
    start = 0
    for problem_id, group in groupby(table["problem_id"].to_pylist()):
        stop = start + sum(1 for _ in group)
        columns = {name: table[name][start:stop].to_pylist() for name in [*names, "row"]}
        columns["index"] = table["completion_index"][start:stop].to_pylist()
        rows = zip(*columns.values(), strict=True)
        candidates = [Candidate(**dict(zip(columns, row, strict=True))) for row in rows]
        if len({one.index for one in candidates}) < len(candidates):
            raise UserError(
                f"completion_index must be unique within a problem, and problem {problem_id!r} has "
                "one twice in the pool; delete one of the parts that hold it"
            )
        if params.rewards == "majority":
            candidates = paid_by_majority(candidates, params.threshold)
        paid = [one for one in candidates if one.is_whole and one.is_paid]
        yield _Judged(
            problem_id=problem_id,
            candidates=candidates,
            paid=paid,
            distinct=distinct(paid, params),
        )
        start = stop


def _gather(bucket: pa.Table, rows: list[int], weights: list[float]) -> pa.Table:
    """Returns rows of a bucket, given by their numbers, with these weights as accepted dataset."""
    columns = {
        name: bucket[name].take(pa.array(rows, pa.int64())) for name in ACCEPTED_SCHEMA.names[:-1]
    }
    columns["prompt_ids"] = bucket["prompt_ids"].take(_rows_of_prompts(bucket, rows))
    columns["weight"] = pa.array(weights, pa.float32())
    return pa.table(columns, schema=ACCEPTED_SCHEMA)


def _rows_of_prompts(bucket: pa.Table, rows: list[int]) -> pa.Array:
    """Returns for each row the one with its prompt: itself, or where it held a hint another."""
    hinted = bucket["is_hinted"].to_pylist()
    if any(hinted):
        usual: dict[str, int] = {}
        problem_ids = bucket["problem_id"].to_pylist()
        for row, problem_id in enumerate(problem_ids):
            if not hinted[row]:
                usual.setdefault(problem_id, row)
        rows = [usual[problem_ids[row]] if hinted[row] else row for row in rows]
    return pa.array(rows, pa.int64())
