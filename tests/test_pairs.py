"""Pairs for a learned verifier, worked out by hand."""

import pyarrow as pa

from restem_lightning.completions import CompletionStore, VerdictKind
from restem_lightning.selection import ACCEPTED_SCHEMA
from restem_lightning.selection.pairs import preference_pairs
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


def ids_of(pairs):
    return [(pair.correct.completion_ids, pair.incorrect.completion_ids) for pair in pairs]


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


def test_each_correct_completion_of_all_rounds_meets_each_incorrect_one_once(tmp_path):
    pairs = preference_pairs(rounds(tmp_path), eos_ids=[EOS])
    assert ids_of(pairs) == [
        ((1, EOS), (2, EOS)), ((1, EOS), (8, 8)), ((7, EOS), (2, EOS)), ((7, EOS), (8, 8)),
    ]  # fmt: skip
    assert {pair.correct.prompt_ids for pair in pairs} == {(9,)}


def test_a_human_solution_is_one_more_correct_completion(tmp_path):
    human = pa.Table.from_pylist(
        [
            {"iteration": 0, "problem_id": "b", "completion_index": 0, "prompt_ids": [9],
             "completion_ids": [4, 4], "text": "", "logprobs": [], "weight": 1.0}
        ],
        schema=ACCEPTED_SCHEMA,
    )  # fmt: skip
    pairs = preference_pairs(rounds(tmp_path), human=human, eos_ids=[EOS])
    assert ids_of(pairs)[4:] == [((4, 4, EOS), (5, EOS))]


def test_a_limit_draws_pairs_that_the_seed_alone_decides(tmp_path):
    stores = rounds(tmp_path)
    everything = set(preference_pairs(stores, eos_ids=[EOS]))
    drawn = [
        preference_pairs(stores, eos_ids=[EOS], max_per_problem=2, seed=seed)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert all(len(set(pairs)) == 2 and set(pairs) < everything for pairs in drawn)
    assert len({tuple(pairs) for pairs in drawn}) > 1
