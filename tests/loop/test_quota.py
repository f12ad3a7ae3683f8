"""Drawing that stops at the quota: the same accepted dataset from fewer completions."""

import json
import random
from pathlib import Path

import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind, to_table
from restem_lightning.loop.quota import next_indices
from restem_lightning.problems import WordProblems, write_problems
from restem_lightning.run_dir import RunDir, read_json
from restem_lightning.selection import SelectionParams, select_completions
from tests.factories import make_completion

EASY = f"{Path(__file__).with_name('easy_verifier.py')}:EasyVerifier"
N = 8
RULES = ["none", "exact", "normalized", "equations"]


def completion(index, text="t", kind=VerdictKind.CORRECT, finish="eos"):
    return make_completion(completion_index=index, text=text, kind=kind, finish_reason=finish)


def turns(pool, quota):
    """Draws a problem's completions from a pool turn by turn; returns the turns."""
    drawn, sizes = [], []
    while indices := next_indices(drawn, len(pool), quota):
        assert indices == tuple(range(len(drawn), len(drawn) + len(indices)))
        drawn += [pool[index] for index in indices]
        sizes.append(len(indices))
    return drawn, sizes


@pytest.mark.parametrize("dedupe", RULES)
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_what_is_left_out_could_not_have_been_accepted(dedupe, limit):
    rng, num_drawn = random.Random(0), 0
    quota = SelectionParams(max_per_problem=limit, dedupe=dedupe)
    for _ in range(200):
        pool = [
            completion(
                index,
                text=f"{rng.randrange(2)} + {rng.randrange(2)} = {rng.choice('12')}",
                kind=rng.choice([VerdictKind.CORRECT, VerdictKind.CORRECT, VerdictKind.WRONG]),
                finish=rng.choice(["eos", "stop", "length"]),
            )
            for index in range(16)
        ]
        drawn, _ = turns(pool, quota)
        part, whole = (select_completions(to_table(some), quota) for some in (drawn, pool))
        assert part.accepted.equals(whole.accepted)
        num_drawn += len(drawn)
    assert num_drawn < 200 * 16


def test_turns_are_as_large_as_the_share_of_correct_completions_asks_for():
    quota = SelectionParams(max_per_problem=4)
    kinds = [VerdictKind.CORRECT, VerdictKind.WRONG]
    assert turns([completion(i) for i in range(32)], quota)[1] == [4]
    half = [completion(i, kind=kinds[i % 2]) for i in range(32)]
    assert turns(half, quota)[1] == [4, 4]
    assert turns([completion(i, kind=kinds[1]) for i in range(32)], quota)[1] == [4, 16, 12]
    assert turns(half, None)[1] == [32]
    assert turns(half[:3], quota)[1] == [3]


@pytest.fixture(scope="module")
def draw(restem, tmp_path_factory):
    """Runs `restem sample` on 20 problems into a folder of a given name."""
    home = tmp_path_factory.mktemp("quota")
    problems = home / "problems.jsonl"
    write_problems(problems, WordProblems("train", 20).load())

    def run(name, **changes):
        settings = {
            "problems": problems,
            "output": home / name,
            "verifier": EASY,
            "sampling.n": N,
            "sampling.temperature": 0.9,
            "sampling.max_new_tokens": 40,
            "selection.max_per_problem": 2,
            "engine.device": "cpu",
            "engine.max_batch_size": 16,
            "engine.cache_tokens": 16384,
            "e_step.problems_per_part": 3,
            "e_step.parity_completions": 0,
            **changes,
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        return home / name, restem("sample", *words)

    return run


def rows(folder):
    columns = ["problem_id", "completion_index", "completion_ids", "logprobs", "verdict"]
    return CompletionStore(folder / "completions").read(columns).to_pylist()


@pytest.mark.parametrize("dedupe", RULES)
def test_the_accepted_dataset_is_the_same_bytes_and_counts_tell_the_saving(draw, dedupe):
    changes = {"selection.dedupe": dedupe}
    whole, result = draw("whole", **changes)
    assert result.code == 0, result.err
    quota, result = draw(f"quota_{dedupe}", **changes, **{"e_step.stop_at_quota": "true"})
    assert result.code == 0, result.err
    accepted = [(folder / "accepted.parquet").read_bytes() for folder in (whole, quota)]
    assert accepted[0] == accepted[1]
    everything = {(row["problem_id"], row["completion_index"]): row for row in rows(whole)}
    drawn = rows(quota)
    assert len(drawn) < len(everything) == 20 * N
    assert all(row == everything[row["problem_id"], row["completion_index"]] for row in drawn)
    funnel = read_json(quota / "funnel.json")
    assert funnel["completions"] == len(drawn)
    assert funnel["num_skipped"] == 20 * N - len(drawn)
    assert funnel["acceptance_rate"] == funnel["accepted"] / len(drawn)
    assert read_json(whole / "funnel.json")["num_skipped"] == 0


@pytest.mark.parametrize(
    "changes", [{"engine.max_batch_size": 64}, {"verification.num_workers": 2}]
)
def test_the_pool_depends_neither_on_kills_nor_on_timing(draw, changes):
    settings = {"e_step.stop_at_quota": "true"}
    expected = rows(draw("expected", **settings)[0])
    name = "resumed" + next(iter(changes))
    folder, _ = draw(name, **settings)
    store = CompletionStore(folder / "completions")
    assert len(store.parts()) == 7
    for part in store.parts()[1::2]:
        store.delete_part(part.index)
    _, result = draw(name, **settings, **changes)
    assert result.code == 0, result.err
    assert rows(folder) == expected


def test_a_pool_of_one_quota_does_not_serve_another(draw):
    settings = {"e_step.stop_at_quota": "true"}
    draw("bound", **settings)
    for changes in ({"selection.max_per_problem": 3}, {"selection.dedupe": "exact"}):
        _, result = draw("bound", **settings, **changes)
        assert result.code == 2
        assert f"stop_at_quota.{next(iter(changes)).removeprefix('selection.')}" in result.err
    assert draw("bound")[1].code == 2


def test_a_run_trains_the_same_policy_and_its_evaluation_is_not_cut_short(
    finished, restem, fit_words, tmp_path
):
    run = RunDir(tmp_path / "run")
    changes = {"e_step.stop_at_quota": True, "e_step.parity_completions": 0}
    result = restem(*fit_words(run.path, **changes))
    assert (result.code, result.err) == (0, "")
    ours, theirs = run.iteration(1), finished.iteration(1)
    assert ours.accepted.read_bytes() == theirs.accepted.read_bytes()
    hashes = [read_json(paths.manifest)["policy_hash"] for paths in (ours, theirs)]
    assert hashes[0] == hashes[1]
    metrics, expected = read_json(ours.metrics), read_json(theirs.metrics)
    assert metrics["evaluation"] == expected["evaluation"]
    e_step = metrics["e_step"]
    assert e_step["num_skipped"] > 0
    assert e_step["num_completions"] + e_step["num_skipped"] == 24 * 4
    assert e_step["num_accepted"] == expected["e_step"]["num_accepted"]
    assert f"; {e_step['num_skipped']} not drawn, the quota was met" in result.out
    assert (expected["e_step"]["num_skipped"], e_step["parity"]) == (0, None)
    assert f"({e_step['num_skipped']} not drawn)" in run.report.read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"selection.select": "random"}, ["selection.select (random)", "first"]),
        ({"selection.select": "diverse"}, ["selection.select (diverse)", "first"]),
        ({"selection.max_per_problem": "null"}, ["selection.max_per_problem (null)"]),
    ],
)
def test_settings_with_which_the_accepted_dataset_would_change_are_refused(
    changes, named, draw, restem, fit_words, tmp_path
):
    changes = {"e_step.stop_at_quota": "true", **changes}
    results = [draw("refused", **changes)[1], restem(*fit_words(tmp_path / "run", **changes))]
    for result in results:
        assert result.code == 2
        assert result.err.count("\n") == 1
        for name in (*named, "e_step.stop_at_quota"):
            assert name in result.err
    assert not (tmp_path / "run").exists()


def test_a_number_of_completions_below_zero_is_refused(draw):
    _, result = draw("refused", **{"e_step.parity_completions": json.dumps(-1)})
    assert result.code == 2
    assert "e_step.parity_completions (-1) must be at least 0" in result.err
