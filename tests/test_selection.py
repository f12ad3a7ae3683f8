import math
import random
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import Completion, Verdict, VerdictKind, to_table
from restem_lightning.equations import equations
from restem_lightning.errors import UserError
from restem_lightning.selection import (
    ACCEPTED_SCHEMA,
    HINT,
    SelectionParams,
    buckets,
    empty_reason,
    end_with_eos,
    iter_accepted,
    select_completions,
    solved_problems,
    stream_accepted,
    write_accepted,
)
from restem_lightning.selection import accepted as accepted_module
from restem_lightning.selection.buckets import Buckets
from restem_lightning.selection.rules import edit_distance
from tests.factories import make_completion

KINDS = [VerdictKind.CORRECT, VerdictKind.WRONG, VerdictKind.NO_ANSWER]


def completion(
    problem_id="p", index=0, text="t", kind=VerdictKind.CORRECT, finish="eos", reward=None
) -> Completion:
    return make_completion(
        problem_id=problem_id,
        completion_index=index,
        prompt_ids=[1, 2],
        completion_ids=[index, 9],
        text=text,
        logprobs=[-1.0, -0.5],
        sampling_logprobs=[-0.25, -0.125],
        finish_reason=finish,
        verdict=Verdict(kind=kind, reward=reward, elapsed_s=random.random()),
        verifier="math/1",
    )


def pool(num_problems=12, per_problem=20, seed=0) -> list[Completion]:
    rng = random.Random(seed)
    return [
        completion(
            f"p{number}",
            index,
            text=f"{rng.randrange(2)} + {rng.randrange(2)} = {rng.choice('12')}",
            kind=rng.choice(KINDS),
            finish=rng.choice(["eos", "eos", "length"]),
        )
        for number in range(num_problems)
        for index in range(per_problem)
    ]


def of_texts(*texts: str) -> pa.Table:
    return to_table([completion(index=i, text=text) for i, text in enumerate(texts)])


def addresses(accepted: pa.Table) -> list[tuple[str, int]]:
    columns = (accepted[name].to_pylist() for name in ("problem_id", "completion_index"))
    return list(zip(*columns, strict=True))


def chosen_by(source, **arguments):
    return select_completions(source, SelectionParams(**arguments))


def kept(table: pa.Table, **arguments) -> list[int]:
    return chosen_by(table, **arguments).accepted["completion_index"].to_pylist()


def test_only_correct_and_complete_completions_are_accepted():
    completions = [completion(index=i, kind=kind) for i, kind in enumerate(VerdictKind)]
    completions.append(completion(index=7, finish="length"))
    completions.append(completion(index=8, finish="stop"))
    assert kept(to_table(completions)) == [0, 8]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [("correct", [0, 1]), (0, [0, 1, 3]), (0.5, [0, 3]), (0.7, [0]), (-1, [0, 1, 2, 3, 5]),
     ("none", [0, 1, 2, 3, 4, 5])],
)  # fmt: skip
def test_a_threshold_accepts_rewards_above_it_but_no_error(threshold, expected):
    rewards = [
        (VerdictKind.CORRECT, None), (VerdictKind.CORRECT, 0.25), (VerdictKind.CORRECT, 0.0),
        (VerdictKind.WRONG, 0.7), (VerdictKind.NO_ANSWER, -1.0), (VerdictKind.TIMEOUT, None),
        (VerdictKind.ERROR, 2.0),
    ]  # fmt: skip
    table = to_table(
        [completion(index=i, kind=kind, reward=reward) for i, (kind, reward) in enumerate(rewards)]
    )
    assert kept(table, threshold=threshold) == expected


def test_the_accepted_dataset_has_its_columns_and_the_sampled_tokens():
    accepted = chosen_by(to_table([completion(index=3, text="x")])).accepted
    assert accepted.schema.equals(ACCEPTED_SCHEMA, check_metadata=True)
    assert accepted.to_pylist() == [
        {
            "iteration": 1,
            "problem_id": "p",
            "completion_index": 3,
            "prompt_ids": [1, 2],
            "completion_ids": [3, 9],
            "text": "x",
            "logprobs": [-1.0, -0.5],
            "weight": 1.0,
        }
    ]


@pytest.mark.parametrize("select", ["first", "random", "diverse"])
@pytest.mark.parametrize("dedupe", ["none", "exact", "normalized", "equations"])
def test_the_result_does_not_depend_on_rows_or_parts(tmp_path, select, dedupe):
    arguments = {"max_per_problem": 2, "select": select, "dedupe": dedupe, "seed": 4}
    completions = pool()
    expected = chosen_by(to_table(completions), **arguments)
    shuffled = random.Random(1).sample(completions, len(completions))
    assert chosen_by(to_table(shuffled), **arguments) == expected
    store = CompletionStore(tmp_path)
    for index, numbers in enumerate([(7,), (0, 3, 11), (1, 2, 4, 5, 6, 8, 9, 10)]):
        names = {f"p{number}" for number in numbers}
        store.write_part(index, [one for one in shuffled if one.problem_id in names])
    assert chosen_by(store, **arguments) == expected


def test_order_is_by_problem_id_then_completion_index():
    found = addresses(chosen_by(to_table(pool()), select="random").accepted)
    assert found == sorted(found)
    assert len(found) > 10


def test_the_funnel_adds_up():
    completions = pool()
    selection = chosen_by(to_table(completions), max_per_problem=2, dedupe="exact")
    whole = [one for one in completions if one.finish_reason != "length"]
    correct = [one for one in whole if one.verdict.reward == 1.0]
    distinct = {(one.problem_id, one.text) for one in correct}
    solved = {one.problem_id for one in correct}
    counts = {name: sum(1 for pid, _ in distinct if pid == name) for name in solved}
    accepted = sum(min(2, count) for count in counts.values())
    assert selection.funnel == {
        "completions": len(completions),
        "not_truncated": len(whole),
        "correct": len(correct),
        "distinct": len(distinct),
        "accepted": accepted,
        "num_problems": 12,
        "num_solved": len(solved),
        "acceptance_rate": accepted / len(completions),
        "verdicts": {
            kind.value: sum(one.verdict.kind is kind for one in completions)
            for kind in sorted(KINDS, key=lambda kind: kind.value)
        },
    }
    assert selection.accepted.num_rows == accepted
    assert len(whole) > len(correct) > len(distinct) > accepted


@pytest.mark.parametrize(
    ("dedupe", "expected"), [("none", [0, 1, 2, 3]), ("exact", [0, 2, 3]), ("normalized", [0, 3])]
)
def test_dedupe_keeps_the_first_of_equal_texts(dedupe, expected):
    table = of_texts("So 3+4=7.", "So 3+4=7.", "so  3 + 4 = 7 .", "So 4+3=7.")
    assert kept(table, dedupe=dedupe) == expected


def test_dedupe_by_equations_ignores_words_but_not_other_steps():
    table = of_texts(
        "Adding, 3 + 4 = 7.",
        "We get 3+4 = <<3+4=7>>7 apples.",
        "Adding, 4 + 3 = 7.",
        "3 + 4 = 7 and 7 * 2 = 14",
        "The answer is seven.",
        "the answer is  seven .",
        "It is seven.",
    )
    assert kept(table, dedupe="equations") == [0, 2, 3, 4, 6]


def test_dedupe_is_within_a_problem():
    table = to_table([completion("a", text="same"), completion("b", text="same")])
    assert chosen_by(table, dedupe="exact").accepted.num_rows == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24 clips", ("48/2=24",)),
        ("48/2 = 24 <<48/2=24>>", ("48/2=24",)),
        ("costs $1,200.50 - $200 = $1,000.50.", ("$1,200.50-$200=$1,000.50",)),
        ("(3 + 4) * 2 = 7 * 2 = 14", ("(3+4)*2=7*2=14",)),
        ("x = 5, 2x = 10", ()),
        ("room 5 3+4=7", ("3+4=7",)),
        (r"3 \times 4 = 12", (r"3\times4=12",)),
        ("20% * 50 = 10, .5 + .5 = 1", ("20%*50=10", ".5+.5=1")),
        ("7 = ( 3 + 4 ) and -3 = -3", ("7=(3+4)",)),
        ("<<7>> and <<total=3>>", ("total=3",)),
    ],
)
def test_equations_of_a_text(text, expected):
    assert equations(text) == expected


@pytest.mark.parametrize("unit", ["1 + ", "1+", "(", "( ", "1", "1,111", "1 ) ", "<<", "1 = ", "-"])
def test_no_text_makes_the_search_for_equations_slow(unit):
    # Backtracking would take minutes here (exponential) or seconds (quadratic).
    start = time.perf_counter()
    equations(unit * 10_000 + "!")
    assert time.perf_counter() - start < 1.0


def test_first_keeps_the_lowest_indices():
    assert kept(of_texts(*"abcdef"), max_per_problem=3) == [0, 1, 2]


def test_no_limit_keeps_all():
    assert kept(of_texts(*(str(i) for i in range(30))), max_per_problem=None) == list(range(30))


def test_random_depends_on_seed_and_problem_but_on_no_other_problem():
    table = to_table([completion(f"p{n}", i) for n in range(30) for i in range(8)])
    found = addresses(chosen_by(table, max_per_problem=2, select="random").accepted)
    other = chosen_by(table, max_per_problem=2, select="random", seed=1).accepted
    assert found != addresses(other)
    chosen = {tuple(i for pid, i in found if pid == f"p{n}") for n in range(30)}
    assert len(chosen) > 5
    alone = table.filter(pa.compute.equal(table["problem_id"], "p17"))
    selection = chosen_by(alone, max_per_problem=2, select="random")
    assert addresses(selection.accepted) == [one for one in found if one[0] == "p17"]


def test_random_is_uniform_over_completions():
    table = to_table([completion(f"p{n}", i) for n in range(600) for i in range(6)])
    indices = kept(table, max_per_problem=1, select="random")
    counts = [indices.count(i) for i in range(6)]
    chi_square = sum((count - 100) ** 2 / 100 for count in counts)
    assert chi_square < 15.1  # 99 % quantile with 5 degrees of freedom


def test_diverse_starts_at_the_first_and_takes_the_farthest():
    table = of_texts("a b c d", "a b c e", "x y z w", "a b x y")
    assert kept(table, max_per_problem=2, select="diverse") == [0, 2]
    assert kept(table, max_per_problem=3, select="diverse") == [0, 2, 3]


def test_max_reward_takes_the_highest_and_of_equals_the_first():
    rewards = [0.5, 2.0, 1.0, 2.0]
    table = to_table([completion(index=i, reward=reward) for i, reward in enumerate(rewards)])
    assert kept(table, max_per_problem=1, select="max_reward") == [1]
    assert kept(table, max_per_problem=3, select="max_reward") == [1, 2, 3]


def test_a_vote_ignores_truncated_completions_and_a_tie_goes_to_the_first_answer():
    answers = [("5", "length"), ("5", "length"), ("7", "eos"), (None, "eos"), ("6", "eos")]
    table = to_table(
        [
            replace(
                completion(index=i, finish=finish),
                verdict=Verdict(kind=VerdictKind.WRONG, extracted=answer),
            )
            for i, (answer, finish) in enumerate(answers)
        ]
    )
    assert kept(table, rewards="majority") == [2]


def test_answers_that_differ_in_form_alone_vote_together():
    rows = [
        replace(completion(index=i), verdict=Verdict(kind=VerdictKind.WRONG, extracted=answer))
        for i, answer in enumerate(["7", "$5", "7", "5.00", "5"])
    ]
    assert kept(to_table(rows), rewards="majority") == [1, 3, 4]


def test_weights_follow_the_reward_and_one_too_large_is_refused():
    table = to_table([completion(index=i, reward=reward) for i, reward in enumerate([0.5, 2.0])])
    for params, expected in (
        ({"weight": "reward"}, [0.5, 2.0]),
        ({"weight": "exponential", "beta": 2.0}, [math.exp(0.25), math.exp(1.0)]),
    ):
        weights = chosen_by(table, **params).accepted["weight"].to_pylist()
        assert weights == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match=r"beta \(0\.01\) must be above 0\.025"):
        chosen_by(table, weight="exponential", beta=0.01)


def table_of_distances(a, b):
    """The textbook's table of the edit distance, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_the_edit_distance_is_that_of_the_textbook():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(2))
        assert edit_distance(a, b) == table_of_distances(a, b)
    long = ["".join(rng.choices("ab 1", k=150)) for _ in range(2)]
    assert edit_distance(*long) == table_of_distances(*long)


def test_the_count_of_a_problem_is_raised_no_further_than_needed_or_possible():
    table = to_table([completion("a", i) for i in range(5)] + [completion("b", 0)])
    for total, expected in ((1, 2), (2, 2), (3, 3), (4, 4), (6, 6), (99, 6)):
        found = chosen_by(table, max_per_problem=1, min_total=total).accepted
        assert found.num_rows == expected


def test_two_writes_of_one_selection_have_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        shuffled = random.Random(seed).sample(pool(), 240)
        write_accepted(tmp_path / name, [chosen_by(to_table(shuffled)).accepted])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_bytes_do_not_depend_on_how_the_rows_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(accepted_module, "ROW_GROUP", 7)
    whole = chosen_by(to_table(pool()), threshold="none").accepted
    pieces = [whole.slice(start, 5) for start in range(0, whole.num_rows, 5)]
    for name, tables in (("a", [whole]), ("b", pieces)):
        assert write_accepted(tmp_path / name, tables) == whole.num_rows
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = list(iter_accepted(tmp_path / "a"))
    assert [table.num_rows for table in read[:-1]] == [7] * (len(read) - 1)
    assert pa.concat_tables(read).equals(whole)


def stores(folder, num_problems) -> list[CompletionStore]:
    """Two pools of problems in some order, and hinted completions of every third problem."""
    rng, pools = random.Random(num_problems), []
    for number, (name, purpose, every) in enumerate([("a", "", 1), ("b", "", 1), ("c", HINT, 3)]):
        problems = rng.sample(range(0, num_problems, every), num_problems // every)
        pools.append(CompletionStore(folder / name))
        for start in range(0, len(problems), 16):
            part = [
                replace(
                    completion(f"p{problem}", 6 * number + index, rng.choice("abc")),
                    purpose=purpose,
                    prompt_ids=[problem, number],
                    verdict=Verdict(kind=rng.choice(KINDS), extracted=rng.choice("12")),
                )
                for problem in problems[start : start + 16]
                for index in range(6)
            ]
            pools[-1].write_part(start // 16, part)
    return pools


@pytest.mark.parametrize(
    "arguments",
    [
        {"dedupe": "exact", "max_per_problem": 3},
        {"rewards": "majority", "select": "random", "max_per_problem": 2},
        {"quota": "fail_rate", "probe": 8, "select": "diverse", "min_total": 300},
        {"random_control": True, "max_per_problem": 2},
        {"threshold": "none", "max_per_problem": None, "weight": "reward"},
    ],
)
def test_a_pool_that_memory_does_not_hold_gives_the_same(tmp_path, monkeypatch, arguments):
    pools, params = stores(tmp_path, 100), SelectionParams(**arguments)
    whole = select_completions(pools, params)
    assert whole.accepted.num_rows > 0
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4096)
    funnel = {}
    pieces = list(stream_accepted(pools, params, funnel))
    assert len(pieces) > 5
    assert pa.concat_tables(pieces).combine_chunks().equals(whole.accepted)
    assert funnel == whole.funnel
    assert len(solved_problems(pools, params)) == funnel["num_solved"]


@pytest.mark.parametrize("num_problems", [50, 400])
def test_no_more_is_held_of_a_large_pool_than_of_a_small_one(monkeypatch, num_problems):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 16_384)
    rows = to_table(pool(num_problems)).select(["problem_id", "text", "completion_ids"])
    batches = rows.to_batches(max_chunksize=50)
    names = sorted(f"p{number}" for number in range(num_problems))
    shared = Buckets(pa.array(names), rows.num_rows)
    before = pa.total_allocated_bytes()
    for batch in batches:
        shared.add(batch, out_of=batch.num_rows)
        assert pa.total_allocated_bytes() - before < 2 * 16_384
    ranges = [table["problem_id"].to_pylist() for table in shared]
    assert max(map(len, ranges)) < 600
    assert all(max(one) < min(other) for one, other in pairwise(ranges))
    found = [problem_id for one in ranges for problem_id in one]
    assert sorted(found) == sorted(rows["problem_id"].to_pylist())


def test_the_accepted_dataset_survives_the_file(tmp_path):
    accepted = chosen_by(to_table(pool())).accepted
    write_accepted(tmp_path / "accepted.parquet", [accepted])
    (found,) = iter_accepted(tmp_path / "accepted.parquet")
    assert found.equals(accepted)
    assert found.schema.metadata == accepted.schema.metadata


def test_no_flipped_bit_is_read_as_another_accepted_dataset(tmp_path):
    path = tmp_path / "accepted.parquet"
    write_accepted(path, [chosen_by(to_table(pool())).accepted])
    whole, content = list(iter_accepted(path)), path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # its names have no sum
    for bit in range(0, footer * 8, 13):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(UserError):
            assert list(iter_accepted(path)) == whole


def test_a_damaged_accepted_dataset_is_a_user_error(tmp_path):
    path = tmp_path / "accepted.parquet"
    with pytest.raises(UserError, match=r"accepted\.parquet is missing"):
        list(iter_accepted(path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"missing or damaged .*; delete it and manifest"):
        list(iter_accepted(path))


def test_a_completion_that_is_there_twice_is_refused():
    table = to_table([completion("q", 5), completion("q", 5)])
    with pytest.raises(UserError, match="'q'"):
        chosen_by(table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_per_problem": 0}, r"max_per_problem \(0\)"),
        ({"threshold": "high"}, r"threshold \('high'\).*correct, none"),
        ({"select": "best"}, r"select \('best'\).*first, random, diverse"),
        ({"dedupe": "fuzzy"}, r"dedupe \('fuzzy'\).*equations"),
    ],
)
def test_values_that_are_not_allowed_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SelectionParams(**arguments)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([], "no completion was drawn"),
        ([completion(kind=VerdictKind.ERROR)], "1 of 1 verdicts are ERROR"),
        ([completion(kind=VerdictKind.TIMEOUT)], "time limit"),
        ([completion(kind=VerdictKind.WRONG, finish="length")], "max_new_tokens"),
        (
            [completion(finish="length"), completion(index=1, kind=VerdictKind.WRONG)],
            "1 correct completions are truncated",
        ),
        ([completion(kind=VerdictKind.NO_ANSWER)], "change the prompt"),
        ([completion(kind=VerdictKind.WRONG)], "temperature"),
    ],
)
def test_the_reason_of_an_empty_dataset_names_the_stage_and_a_remedy(completions, message):
    selection = chosen_by(to_table(completions))
    assert selection.accepted.num_rows == 0
    assert message in empty_reason(selection.funnel)


def test_every_accepted_completion_ends_with_eos_and_logprobs_stay_as_drawn():
    table = to_table([completion(index=3, finish="stop"), completion(index=4, finish="eos")])
    accepted = chosen_by(table).accepted
    ended = end_with_eos(accepted, (7, 9))
    assert ended["completion_ids"].to_pylist() == [[3, 9], [4, 9]]
    ended = end_with_eos(accepted, (7,))
    assert ended["completion_ids"].to_pylist() == [[3, 9, 7], [4, 9, 7]]
    assert ended["logprobs"].to_pylist() == accepted["logprobs"].to_pylist()
    assert ended.schema.equals(ACCEPTED_SCHEMA)
    assert end_with_eos(accepted, ()) is accepted
