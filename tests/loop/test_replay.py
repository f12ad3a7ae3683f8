"""`restem sample --replay`: a stored completion drawn again, alone, from its address."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from restem_lightning.completion_store import CompletionStore
from restem_lightning.problems import WordProblems, write_problems
from restem_lightning.settings import EMBEDDED_POLICY


def row_of(folder, place):
    """The completion in a row of a pool."""
    return CompletionStore(folder).read().slice(place, 1).to_pylist()[0]


def address(folder, row):
    return f"{folder}:{row['problem_id']}:{row['completion_index']}"


@pytest.mark.parametrize(
    ("pool", "place"),
    [
        ("iteration_1/completions", 17),
        ("iteration_2/completions", 62),
        ("iteration_0/evaluation/held_out/greedy", 3),
        ("iteration_0/evaluation/held_out/sampled", 5),
        ("iteration_2/evaluation/held_out/sampled", 9),
    ],
)
def test_every_pool_of_a_run_gives_its_completions_again(pool, place, finished, restem):
    folder = finished.path / pool
    row = row_of(folder, place)
    result = restem("sample", "--replay", address(folder, row))
    assert (result.code, result.err) == (0, "")
    count = len(row["completion_ids"])
    assert result.out == (
        f"{row['text']}\n\n{count} tokens drawn, {count} stored, all equal; largest log-prob "
        "difference of these 0\n"
    )


def test_a_moved_run_folder_is_enough(finished, copy_of, restem):
    run = copy_of(finished.path)
    folder = run.iteration(2).completions
    result = restem("sample", "--replay", address(folder, row_of(folder, 0)))
    assert (result.code, result.err) == (0, "")


@pytest.fixture(scope="module")
def evaluated(restem, tmp_path_factory):
    """The folder of a `restem evaluate` whose problem ids hold colons, with stop strings."""
    home = tmp_path_factory.mktemp("a:b")
    problems = WordProblems("held_out", 6).load()
    for number, problem in enumerate(problems):
        object.__setattr__(problem, "problem_id", f"set:{number}:x")
    write_problems(home / "p.jsonl", problems)
    settings = ["--n", 3, "--sampling.max_new_tokens", 24, "--sampling.stop", '["4"]']
    result = restem(
        *("evaluate", "--problems", home / "p.jsonl", "--output", home / "out"),
        *(*settings, "--engine.device", "cpu", "--engine.max_batch_size", 8),
    )
    assert result.code == 0, result.err
    return home / "out"


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_pool_outside_a_run_folder_takes_the_policy_that_is_given(kind, evaluated, restem):
    for place in (0, 5):
        row = row_of(evaluated / kind, place)
        words = ("sample", "--replay", address(evaluated / kind, row))
        result = restem(*words, "--policy", EMBEDDED_POLICY)
        assert (result.code, result.err) == (0, "")
        assert "all equal" in result.out
    refused = restem(*words)
    assert refused.code == 2
    assert "does not lie in a run folder" in refused.err
    assert "--policy" in refused.err


def test_tokens_that_differ_are_exit_status_1_with_the_reason(finished, copy_of, restem):
    run = copy_of(finished.path)
    folder = run.iteration(1).completions
    store = CompletionStore(folder)
    part = store.parts()[0]
    row = row_of(folder, 0)
    first, *others = (
        completion
        for problem_id in part.problem_ids
        for completion in store.completions_of(problem_id)
    )
    ids = [*first.completion_ids]
    ids[2] += 1
    object.__setattr__(first, "completion_ids", ids)
    store.delete_part(part.index)
    store.write_part(part.index, [first, *others])
    result = restem("sample", "--replay", address(folder, row))
    assert (result.code, result.err) == (1, "")
    assert "only the first 2 equal" in result.out
    assert "engine.batch_invariant" in result.out
    assert "stored: float32 on cpu, batch_invariant on" in result.out


def test_another_dtype_is_named_where_it_shows(finished, restem):
    folder = finished.iteration(1).completions
    rows = [row_of(folder, place) for place in range(0, 96, 12)]
    words = ["--engine.dtype", "bfloat16"]
    results = [restem("sample", "--replay", address(folder, row), *words) for row in rows]
    assert {result.err for result in results} == {""}
    for result in results:
        assert result.code == (0 if "all equal" in result.out else 1)
        assert "difference of these 0\n" not in result.out
        if result.code:
            assert "stored: float32 on cpu" in result.out
            assert "now: bfloat16 on cpu" in result.out


def refusal(restem, *words):
    result = restem("sample", *words)
    assert result.code == 2
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("restem sample: error: ")
    return result.err


def test_a_mistake_in_the_address_is_one_line(finished, restem):
    folder = finished.iteration(1).completions
    row = row_of(folder, 0)
    assert "must be FOLDER:PROBLEM_ID:INDEX" in refusal(restem, "--replay", folder)
    assert "must be FOLDER:PROBLEM_ID:INDEX" in refusal(restem, "--replay", f"{folder}:p:last")
    assert "/nowhere is no pool" in refusal(restem, "--replay", "/nowhere:p:0")
    line = refusal(restem, "--replay", f"{finished.path}:p:0")
    assert f"{finished.path} is no pool of completions" in line
    line = refusal(restem, f"--replay={folder}:no such:0")
    assert "no completion of problem 'no such'" in line
    assert row["problem_id"] in line
    assert "it has 0, 1, 2, 3" in refusal(restem, "--replay", f"{folder}:{row['problem_id']}:4")
    assert "--replay" in refusal(restem, "--replay")


def test_a_policy_that_is_gone_or_another_one_is_one_line(finished, copy_of, restem):
    run = copy_of(finished.path)
    folder, policy = run.iteration(2).completions, run.iteration(1).policy
    words = ("--replay", address(folder, row_of(folder, 0)))
    line = refusal(restem, *words, "--policy", EMBEDDED_POLICY)
    assert "has the hash" in line
    assert "--policy" in line
    weights = load_file(policy / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
    assert "has the hash" in refusal(restem, *words)
    shutil.rmtree(policy)
    line = refusal(restem, *words)
    assert str(policy) in line
    assert "give its folder with --policy" in line


def test_a_damaged_part_is_one_line(finished, copy_of, restem):
    run = copy_of(finished.path)
    folder = run.iteration(1).completions
    row = row_of(folder, 0)
    CompletionStore(folder).parts()[0].path.write_bytes(b"PAR1")
    assert "missing or damaged" in refusal(restem, "--replay", address(folder, row))


def test_every_option_of_replay_is_explained(restem, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = restem("sample", "--replay", "x", "--help")
    assert (result.code, result.err) == (0, "")
    assert "FOLDER:PROBLEM_ID:INDEX" in result.out
    assert "--engine.dtype" in result.out
    assert "--replay" in restem("sample", "--help").out


def test_the_engine_that_drew_a_completion_is_stored_with_it(finished):
    row = row_of(finished.iteration(1).completions, 0)
    engine = json.loads(row["engine"])
    assert (engine["device"], engine["dtype"], engine["batch_invariant"]) == (
        "cpu",
        "float32",
        "on",
    )
    assert engine["max_batch_size"] == 64
    assert row["purpose"] == ""
    assert row_of(finished.iteration(1).path / "evaluation/held_out/greedy", 0)["purpose"] == (
        "evaluation/held_out/greedy/"
    )
