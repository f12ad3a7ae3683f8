"""The accepted dataset: which completions the M-step trains on, as a pure function of the pool."""

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from restem_lightning.completions import (
    SCHEMA_METADATA,
    SCHEMA_VERSION,
    Completion,
    CompletionStore,
    VerdictKind,
)
from restem_lightning.errors import UserError
from restem_lightning.metrics import normalize_text
from restem_lightning.run_dir import atomic_path

Select = Literal["first", "random", "diverse"]
Dedupe = Literal["none", "exact", "normalized", "equations"]
Threshold = float | Literal["correct", "none"]

ACCEPTED_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("completion_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("weight", pa.float32()),
    ],
    metadata=SCHEMA_METADATA,
)
_ADDRESS = ["problem_id", "completion_index"]
_BATCH_ROWS = 4096

# Numbers joined by operators and "=". Every space has one place in the pattern and all that follows
# the first operand is optional, so that no text makes the search backtrack.
_OPERAND = r"(?:\( ?){0,9}-?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?(?: ?\)){0,9}"
_OPERATOR = r"(?:[-+*/^x\u00d7\u00f7\u2212]|\\times|\\cdot|\\div)"
_MARK_OR_CHAIN = re.compile(
    rf"<<([^<>]*)>>|(?<![\w.])({_OPERAND}(?: ?(?:{_OPERATOR}|=) ?{_OPERAND})*)"
)
_OPERATION = re.compile(rf"[\d)%] ?{_OPERATOR}")
_RULES = ("correct", "none")
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class SelectionParams:
    """Which completions enter the accepted dataset; truncated ones never do.

    Args:
        threshold: "correct" accepts what the verifier calls CORRECT and pays for (reward above 0);
            a number accepts every reward above it, whatever the verdict; "none" accepts all. With
            the binary reward each number from 0 to below 1 means "correct". ERROR is never
            accepted.
        max_per_problem: most completions accepted per problem, at least 1; null for no limit. It
            keeps easy problems from dominating (10 in arXiv 2312.06585, section 5).
        select: which ones, where a problem has more: "first" (lowest completion_index), "random"
            (seeded, independent for each problem) or "diverse" (the first one, then always the one
            whose set of words is farthest from those taken).
        dedupe: which completions of a problem count as the same, so that only the first of them
            can be accepted: "none", "exact" (same text), "normalized" (same but for case, white
            space and spaces beside punctuation) or "equations" (same list of equations such as
            3 + 4 = 7 or <<3+4=7>>; "normalized" for a text without equations).
        seed: of "random"; any integer.
    """

    threshold: Threshold = "correct"
    max_per_problem: int | None = 10
    select: Select = "first"
    dedupe: Dedupe = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.max_per_problem is not None and self.max_per_problem < 1:
            raise UserError(
                f"max_per_problem ({self.max_per_problem}) must be at least 1, or null for no "
                "limit; the default is 10"
            )
        if not isinstance(self.threshold, int | float) and self.threshold not in _RULES:
            raise UserError(
                f"threshold ({self.threshold!r}) must be a number, correct or none; set one"
            )
        for name, value, allowed in (
            ("select", self.select, get_args(Select)),
            ("dedupe", self.dedupe, get_args(Dedupe)),
        ):
            if value not in allowed:
                raise UserError(f"{name} ({value!r}) must be one of {', '.join(allowed)}; set one")


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


def select_completions(
    source: pa.Table | CompletionStore,
    *,
    threshold: Threshold = SelectionParams.threshold,
    max_per_problem: int | None = SelectionParams.max_per_problem,
    select: Select = SelectionParams.select,
    dedupe: Dedupe = SelectionParams.dedupe,
    seed: int = SelectionParams.seed,
) -> Selection:
    """Returns the accepted dataset of a pool and the funnel that led to it.

    The result does not depend on the order of rows or on the boundaries of parts. The pool is read
    twice: light columns of all rows, then all columns of the accepted rows.

    Args:
        source: a pool, or a table with the columns of `completions.SCHEMA`.
        threshold: see SelectionParams.
        max_per_problem: see SelectionParams.
        select: see SelectionParams.
        dedupe: see SelectionParams.
        seed: see SelectionParams.

    Raises:
        UserError: an argument is not allowed, a part of the pool is damaged, or a completion is
            in the pool twice.
    """
    params = SelectionParams(
        threshold=threshold,
        max_per_problem=max_per_problem,
        select=select,
        dedupe=dedupe,
        seed=seed,
    )
    candidates, funnel = _candidates(source, params)
    rows: list[int] = []
    num_distinct = num_solved = 0
    for problem_id, problem in _by_problem(candidates):
        distinct = _distinct(problem, params.dedupe)
        rows += [row for _, row, _ in _choose(problem_id, distinct, params)]
        num_distinct += len(distinct)
        num_solved += 1
    num_completions = funnel["completions"]
    verdicts = funnel.pop("verdicts")
    funnel |= {
        "correct": candidates.num_rows,
        "distinct": num_distinct,
        "accepted": len(rows),
        "num_problems": funnel.pop("num_problems"),
        "num_solved": num_solved,
        "acceptance_rate": len(rows) / num_completions if num_completions else 0.0,
        "verdicts": verdicts,
    }
    return Selection(accepted=_gather(source, sorted(rows)), funnel=funnel)


def empty_reason(funnel: dict[str, Any]) -> str:
    """Returns which stage of a funnel left nothing to train on, and what to try, in one line."""
    total, verdicts = funnel["completions"], funnel["verdicts"]
    if total == 0:
        return "no completion was drawn; check that the problem source yields problems"
    for kind, remedy in (
        ("ERROR", "the verifier itself fails: see the column `detail` of the pool and mend it"),
        ("TIMEOUT", "raise the verifier's time limit or lower its number of workers"),
    ):
        if verdicts.get(kind, 0) > total / 2:
            return f"{verdicts[kind]} of {total} verdicts are {kind}; {remedy}"
    if funnel["not_truncated"] == 0:
        return f"all {total} completions are truncated; raise sampling.max_new_tokens"
    if verdicts.get("CORRECT", 0) > 0 and funnel["correct"] == 0:
        return (
            f"all {verdicts['CORRECT']} correct completions are truncated; raise "
            "sampling.max_new_tokens"
        )
    if verdicts.get("NO_ANSWER", 0) > total / 2:
        return (
            f"none of {total} completions is correct and {verdicts['NO_ANSWER']} have no answer "
            "in the verifier's format; change the prompt so that it shows the format"
        )
    if funnel["correct"] == 0:
        return (
            f"none of {total} completions is correct; draw more per problem (sampling.n), raise "
            "sampling.temperature, change the prompt, or check the verifier"
        )
    return f"the dataset is not empty: {funnel['accepted']} of {total} completions are accepted"


def end_with_eos(accepted: pa.Table, eos_ids: Collection[int]) -> pa.Table:
    """Returns an accepted dataset whose completions all end with EOS, so that training shows it.

    Completions that a stop string ended were cut before it and have no EOS of their own. The added
    EOS has no log-probability: `logprobs` stays as drawn.

    Args:
        accepted: table of ACCEPTED_SCHEMA.
        eos_ids: the policy's EOS token ids, the one to add first; empty for none.
    """
    if not eos_ids:
        return accepted
    end = next(iter(eos_ids))
    place = ACCEPTED_SCHEMA.get_field_index("completion_ids")
    ids = [
        row if row[-1:] and row[-1] in eos_ids else [*row, end]
        for row in accepted["completion_ids"].to_pylist()
    ]
    column = pa.array(ids, type=ACCEPTED_SCHEMA.field(place).type)
    return accepted.set_column(place, ACCEPTED_SCHEMA.field(place), column)


def write_accepted(path: str | Path, table: pa.Table) -> None:
    """Writes an accepted dataset atomically; the same table gives the same bytes."""
    assert table.schema.equals(ACCEPTED_SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_accepted(path: str | Path) -> pa.Table:
    """Returns an accepted dataset.

    Raises:
        UserError: the file is missing, damaged or of another schema version.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); delete it and run "
            "again: it is selected anew from the pool"
        ) from error
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION) or not table.schema.equals(ACCEPTED_SCHEMA):
        raise UserError(
            f"{path} must be an accepted dataset of schema version {SCHEMA_VERSION}, found "
            f"version {version}; delete it and run again: it is selected anew from the pool"
        )
    return table


def equations(text: str) -> tuple[str, ...]:
    """Returns the equations of a text in order, without white space, repeats in a row merged.

    An equation is numbers joined by at least one operator and "=", as in 3+4=7 or in the chain
    1+2+3=3+3=6, or the inside of a GSM8K calculator mark <<...=...>>.
    """
    parts = _MARK_OR_CHAIN.findall(" ".join(text.split()))
    found = (mark or chain for mark, chain in parts if mark or _OPERATION.search(chain))
    keys = ("".join(equation.split()) for equation in found if "=" in equation)
    return tuple(key for key, _ in groupby(keys))


# A candidate is (completion_index, row in the source, text or None).
_Candidate = tuple[int, int, str | None]


def _scan(source: pa.Table | CompletionStore, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a source, at every call in the same order."""
    if isinstance(source, pa.Table):
        yield from source.select(columns).to_batches(max_chunksize=_BATCH_ROWS)
    else:
        yield from source.iter_batches(columns)


def _candidates(
    source: pa.Table | CompletionStore, params: SelectionParams
) -> tuple[pa.Table, dict[str, Any]]:
    """Returns the correct, complete completions sorted by address, and the funnel so far."""
    needs_text = params.dedupe != "none" or params.select == "diverse"
    columns = [*_ADDRESS, *(["text"] if needs_text else [])]
    # Texts of a large pool pass the 2 GiB that one array of `string` can hold.
    types = {"problem_id": pa.large_string(), "completion_index": pa.int32()}
    types |= {"text": pa.large_string()} if needs_text else {}
    schema = pa.schema([*types.items(), ("row", pa.int64())])
    kept, problem_ids, verdicts = [], set(), Counter()
    num_completions = num_not_truncated = 0
    for batch in _scan(source, [*columns, "reward", "finish_reason", "verdict"]):
        complete = pc.not_equal(batch["finish_reason"].cast(pa.string()), "length")
        verdict = batch["verdict"].cast(pa.string())
        eligible = pc.and_(complete, _is_paid(verdict, batch["reward"], params.threshold))
        row = pa.array(range(num_completions, num_completions + batch.num_rows), pa.int64())
        light = [batch[name].cast(types[name]) for name in columns]
        kept.append(pa.RecordBatch.from_arrays([*light, row], schema=schema).filter(eligible))
        problem_ids.update(pc.unique(batch["problem_id"]).to_pylist())
        verdicts.update(batch["verdict"].to_pylist())
        num_completions += batch.num_rows
        num_not_truncated += pc.sum(complete).as_py() or 0
    table = pa.Table.from_batches(kept, schema=schema)
    funnel = {
        "completions": num_completions,
        "not_truncated": num_not_truncated,
        "num_problems": len(problem_ids),
        "verdicts": dict(sorted(verdicts.items())),
    }
    return table.sort_by([(name, "ascending") for name in _ADDRESS]).combine_chunks(), funnel


def is_acceptable(completion: Completion, threshold: Threshold) -> bool:
    """Returns whether a completion may be accepted: whole, and paid for by the rule."""
    verdict = completion.verdict
    paid = _is_paid(pa.array([verdict.kind.value]), pa.array([verdict.reward]), threshold)
    return completion.finish_reason != "length" and paid[0].as_py()


def _is_paid(verdicts: pa.Array, rewards: pa.Array, threshold: Threshold) -> pa.Array:
    """Returns, for each completion, whether its verdict and reward pass the threshold."""
    if threshold == "correct":
        return pc.and_(pc.equal(verdicts, VerdictKind.CORRECT.value), pc.greater(rewards, 0.0))
    judged = pc.not_equal(verdicts, VerdictKind.ERROR.value)
    return judged if threshold == "none" else pc.and_(judged, pc.greater(rewards, threshold))


def _by_problem(candidates: pa.Table) -> Iterator[tuple[str, list[_Candidate]]]:
    """Yields each problem with its candidates in order of completion_index."""
    problem_ids = candidates["problem_id"].to_pylist()
    indices, rows = candidates["completion_index"].to_pylist(), candidates["row"].to_pylist()
    texts = candidates["text"] if "text" in candidates.column_names else None
    for problem_id, positions in groupby(range(len(rows)), key=problem_ids.__getitem__):
        start, *others = positions
        stop = start + 1 + len(others)
        if len(set(indices[start:stop])) < stop - start:
            raise UserError(
                f"completion_index must be unique within a problem, and problem {problem_id!r} has "
                "one twice in the pool; delete one of the parts that hold it"
            )
        own_texts = [None] * (stop - start)
        if texts is not None:
            own_texts = texts.slice(start, stop - start).to_pylist()
        yield problem_id, list(zip(indices[start:stop], rows[start:stop], own_texts, strict=True))


def dedupe_key(dedupe: Dedupe) -> Callable[[str], Any]:
    """Returns the function of a text that is equal for texts that count as the same."""
    if dedupe == "exact":
        return str
    if dedupe == "normalized":
        return normalize_text
    return lambda text: equations(text) or normalize_text(text)


def _distinct(problem: list[_Candidate], dedupe: Dedupe) -> list[_Candidate]:
    """Returns the first of all candidates that count as the same."""
    if dedupe == "none":
        return problem
    key = dedupe_key(dedupe)
    first: dict[Any, _Candidate] = {}
    for candidate in problem:
        first.setdefault(key(candidate[2]), candidate)
    return list(first.values())


def _choose(
    problem_id: str, distinct: list[_Candidate], params: SelectionParams
) -> list[_Candidate]:
    """Returns at most max_per_problem candidates by the rule of `params.select`."""
    limit = params.max_per_problem
    if limit is None or len(distinct) <= limit:
        return distinct
    if params.select == "first":
        return distinct[:limit]
    if params.select == "random":
        return sorted(distinct, key=lambda one: _lot(params.seed, problem_id, one[0]))[:limit]
    return _most_diverse(distinct, limit)


def _lot(seed: int, problem_id: str, completion_index: int) -> bytes:
    """Returns a pseudo-random sort key that depends on its address alone."""
    return hashlib.sha256(f"{seed}/{completion_index}/{problem_id}".encode()).digest()


def _most_diverse(distinct: list[_Candidate], limit: int) -> list[_Candidate]:
    """Returns the first candidate, then greedily the one farthest from all taken so far.

    The distance is that of Jaccard on sets of words and punctuation marks; a tie goes to the
    lower completion_index.
    """
    words = [frozenset(_TOKEN.findall(text.casefold())) for _, _, text in distinct]
    distance = [float("inf")] * len(words)
    taken = [0]
    while len(taken) < limit:
        last = words[taken[-1]]
        distance = [min(old, _jaccard(last, one)) for old, one in zip(distance, words, strict=True)]
        left = (position for position in range(len(words)) if position not in taken)
        taken.append(max(left, key=distance.__getitem__))
    return [distinct[position] for position in taken]


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    total = len(a) + len(b) - shared
    return 1.0 - shared / total if total else 0.0


def _gather(source: pa.Table | CompletionStore, rows: list[int]) -> pa.Table:
    """Returns the rows with these sorted numbers as a table of ACCEPTED_SCHEMA."""
    columns = ACCEPTED_SCHEMA.names[:-1]
    taken, start = [], 0
    for batch in _scan(source, columns):
        low, high = bisect_left(rows, start), bisect_left(rows, start + batch.num_rows)
        if low < high:
            taken.append(batch.take(pa.array([row - start for row in rows[low:high]])))
        start += batch.num_rows
    batches = [
        pa.RecordBatch.from_arrays(
            [*batch.columns, pa.repeat(pa.scalar(1.0, pa.float32()), batch.num_rows)],
            schema=ACCEPTED_SCHEMA,
        )
        for batch in taken
    ]
    table = pa.Table.from_batches(batches, schema=ACCEPTED_SCHEMA)
    return table.sort_by([(name, "ascending") for name in _ADDRESS]).combine_chunks()
