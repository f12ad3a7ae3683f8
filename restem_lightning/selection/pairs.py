"""Pairs of a correct and an incorrect completion of one problem, for a verifier to learn from."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.selection.accepted import end_with_eos
from restem_lightning.selection.buckets import Buckets
from restem_lightning.selection.select import empty_buckets

_READ = ("problem_id", "prompt_ids", "completion_ids", "finish_reason", "verdict")
_JUDGED = [kind.value for kind in (VerdictKind.CORRECT, VerdictKind.WRONG, VerdictKind.NO_ANSWER)]
_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("is_correct", pa.bool_()),
    ]
)


def stream_pairs(
    stores: Sequence[CompletionStore],
    *,
    human: Iterable[pa.Table] = (),
    eos_ids: Sequence[int] = (),
    max_per_problem: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yields each correct completion of a problem with each incorrect one, over all stores.

    They come in pieces of some problems: completions with problem_id, prompt_ids and
    completion_ids, and pairs of them, int64 [P, 2], as (number of the correct one, number of the
    incorrect one), counted over all pieces. Token ids that were drawn several times count once.
    TIMEOUT and ERROR are neither correct nor incorrect. Memory does not grow with the pools.

    Args:
        stores: the pools.
        human: human solutions (tables of ACCEPTED_SCHEMA), correct too.
        eos_ids: of the policy, the one to write first; ends what a stop string ended, as in the
            accepted dataset.
        max_per_problem: most pairs of a problem, drawn at random; None for all.
        seed: of that draw.

    Source: arXiv 2402.06457, section 3.1 (the Cartesian product).
    """
    num_before = 0
    for bucket in _share_out(stores, human, eos_ids):
        pairs = _pairs(bucket, max_per_problem, seed)
        if len(pairs):
            rows, places = np.unique(pairs, return_inverse=True)
            yield bucket.drop_columns("is_correct").take(rows), num_before + places.reshape(-1, 2)
            num_before += len(rows)


def _share_out(
    stores: Sequence[CompletionStore], human: Iterable[pa.Table], eos_ids: Sequence[int]
) -> Buckets:
    """Returns what is correct or incorrect by ranges of problems; what is whole ends with EOS."""
    buckets, _ = empty_buckets(stores)

    def add(rows: pa.Table, is_whole: np.ndarray | bool) -> None:
        ended = end_with_eos(rows, eos_ids, only=is_whole).select(_SCHEMA.names).cast(_SCHEMA)
        for batch in ended.combine_chunks().to_batches():
            buckets.add(batch, out_of=batch.num_rows)

    for store in stores:
        for batch in store.iter_batches(_READ):
            verdicts = batch["verdict"].cast(pa.string())
            is_correct = pc.equal(verdicts, VerdictKind.CORRECT.value)
            rows = pa.Table.from_batches([batch]).append_column("is_correct", is_correct)
            rows = rows.filter(pc.is_in(verdicts, pa.array(_JUDGED)))
            add(rows, pc.not_equal(rows["finish_reason"].cast(pa.string()), "length").to_numpy())
    for table in human:
        add(table.append_column("is_correct", pa.repeat(True, table.num_rows)), True)
    return buckets


def _pairs(bucket: pa.Table, max_per_problem: int | None, seed: int) -> np.ndarray:
    """Returns the pairs of a bucket as (row of the correct one, row of the incorrect one)."""
    # Of each problem the first row of each (prompt, completion): incorrect ones, correct ones.
    rows_of: dict[str, tuple[dict, dict]] = defaultdict(lambda: ({}, {}))
    keys = zip(_bytes(bucket["prompt_ids"]), _bytes(bucket["completion_ids"]), strict=True)
    columns = (bucket["problem_id"].to_pylist(), bucket["is_correct"].to_pylist(), keys)
    for row, (problem_id, is_correct, key) in enumerate(zip(*columns, strict=True)):
        rows_of[problem_id][is_correct].setdefault(key, row)
    pairs = [np.empty((0, 2), np.int32)]
    for problem_id, (incorrect, correct) in sorted(rows_of.items()):
        good, bad = (np.array([*rows.values()], np.int32) for rows in (correct, incorrect))
        some = np.stack([np.repeat(good, len(bad)), np.tile(bad, len(good))], axis=1)
        if max_per_problem is not None and len(some) > max_per_problem:
            lots = [
                (hashlib.sha256(f"{seed}/{number}/{problem_id}".encode()).digest(), number)
                for number in range(len(some))
            ]
            some = some[[number for _, number in sorted(lots)[:max_per_problem]]]
        pairs.append(some)
    return np.concatenate(pairs)


def _bytes(column: pa.ChunkedArray) -> Iterator[bytes]:
    """Yields the token ids of each row."""
    lists = column.combine_chunks()
    ends = np.cumsum(lists.value_lengths().to_numpy())
    return (ids.tobytes() for ids in np.split(lists.flatten().to_numpy(), ends[:-1]))
