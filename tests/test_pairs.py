"""Pairs for a learned verifier, worked out by hand."""

import numpy as np
import pyarrow as pa

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.selection import ACCEPTED_SCHEMA, buckets
from restem_lightning.selection.pairs import stream_pairs
from tests.factories import make_completion

CORRECT, WRONG, NO_ANSWER, TIMEOUT, ERROR = VerdictKind
EOS = 0


def completion(problem_id, index, ids, kind, finish="eos"):
    return make_completion(
        problem_id=problem_id, completion_index=index, prompt_ids=[9], completion_ids=ids,
        finish_reason=finish, kind=kind,
    )  # fmt: skip


def store(folder, *completions):
    made = CompletionStore(folder)
    made.write_part(0, completions)
    return made


def ids_of(pieces):
    """The completions of each pair, over all pieces."""
    tables, numbers = zip(*pieces, strict=True)
    rows = pa.concat_tables(tables).to_pylist()
    assert {tuple(row["prompt_ids"]) for row in rows} == {(9,)}
    return [
        tuple(tuple(rows[one]["completion_ids"]) for one in pair)
        for pair in np.concatenate(numbers).tolist()
    ]


def rounds(tmp_path):
    first = store(
        tmp_path / "1",
        completion("a", 0, [1, EOS], CORRECT), completion("a", 1, [2, EOS], WRONG),
        completion("a", 2, [3, EOS], ERROR), completion("a", 3, [4, EOS], TIMEOUT),
        completion("b", 0, [5, EOS], WRONG), completion("c", 0, [6, EOS], CORRECT),
    )  # fmt: skip
    second = store(
        tmp_path / "2",
        completion("a", 0, [1, EOS], CORRECT), completion("a", 1, [7], CORRECT, "stop"),
        completion("a", 2, [8, 8], NO_ANSWER, "length"), completion("b", 0, [5, EOS], WRONG),
    )  # fmt: skip
    return [first, second]


PAIRS = [((1, EOS), (2, EOS)), ((1, EOS), (8, 8)), ((7, EOS), (2, EOS)), ((7, EOS), (8, 8))]


def human():
    row = {"iteration": 0, "problem_id": "b", "completion_index": 0, "prompt_ids": [9],
           "completion_ids": [4, 4], "text": "", "logprobs": [], "weight": 1.0}  # fmt: skip
    return pa.Table.from_pylist([row], schema=ACCEPTED_SCHEMA)


def test_each_correct_completion_of_all_rounds_meets_each_incorrect_one_once(tmp_path):
    assert ids_of(stream_pairs(rounds(tmp_path), eos_ids=[EOS])) == PAIRS


def test_a_human_solution_is_one_more_correct_completion(tmp_path):
    pairs = stream_pairs(rounds(tmp_path), human=[human()], eos_ids=[EOS])
    assert ids_of(pairs) == [*PAIRS, ((4, 4, EOS), (5, EOS))]


def test_pairs_of_pools_that_memory_does_not_hold_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 40)
    pieces = list(stream_pairs(rounds(tmp_path), human=[human()], eos_ids=[EOS]))
    assert len(pieces) == 2
    assert ids_of(pieces) == [*PAIRS, ((4, 4, EOS), (5, EOS))]


def test_a_completion_of_many_pairs_is_there_once(tmp_path):
    ((table, pairs),) = stream_pairs(rounds(tmp_path), eos_ids=[EOS])
    assert (table.num_rows, len(pairs)) == (4, 4)


def test_no_pair_is_no_piece(tmp_path):
    assert list(stream_pairs(rounds(tmp_path)[:0], human=[human()])) == []


def test_a_limit_draws_pairs_that_the_seed_alone_decides(tmp_path):
    stores = rounds(tmp_path)
    drawn = [
        ids_of(stream_pairs(stores, eos_ids=[EOS], max_per_problem=2, seed=seed))
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert all(len(set(pairs)) == 2 and set(pairs) < set(PAIRS) for pairs in drawn)
    assert len({tuple(pairs) for pairs in drawn}) > 1
