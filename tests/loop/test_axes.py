"""The axes of the design space in the loop: who draws, on what, and what the M-step sees."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.loop.balance import count_selected
from restem_lightning.loop.draw import DrawParams, problems_of_e_step
from restem_lightning.loop.mixing import MixParams
from restem_lightning.m_step.export import policy_hash
from restem_lightning.problems import WordProblems
from restem_lightning.run_dir import RunDir, read_json
from restem_lightning.settings import EMBEDDED_POLICY
from tests.factories import make_completion

CORRECT, WRONG = VerdictKind.CORRECT, VerdictKind.WRONG
HINT = json.dumps(
    {
        "class_path": "restem_lightning.prompts.FewShotPrompt",
        "init_args": {"question_format": "Q: {question} ({reference_answer})\nA:\n"},
    }
)
PER_ITERATION = {
    "draw": {"reuse_pool": [False, False, True], "num_problems": [0, 10]},
    "start_from": ["base", "previous"],
    "trainer": {"max_steps": {"first": 1, "plus": 1}},
    "selection": {"threshold": ["correct", "correct", "none"]},
}


@pytest.fixture(scope="module")
def words(fit_words):
    """The words of a run with every axis set, of three iterations."""

    def of(folder, **changes):
        settings = {
            "iterations": 3,
            "per_iteration": json.dumps(PER_ITERATION),
            "draw.policies": "[previous, base]",
            "hint": HINT,
            "mix.human": "all",
            "mix.earlier": "true",
            "balance.temperatures": "[0.5, 1.0]",
            "balance.num_problems": 4,
            "stop.rule": "none",
            "evaluation.n": 0,
            **changes,
        }
        return fit_words(folder, **settings)

    return of


@pytest.fixture(scope="module")
def whole(restem, words, tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("axes") / "run")
    result = restem(*words(run.path))
    assert result.code == 0, result.err
    return run


def rows(run, iteration, *names):
    table = pq.read_table(run.iteration(iteration).accepted)
    return [tuple(row.values()) for row in table.select(list(names)).to_pylist()]


def test_an_iteration_without_draws_trains_on_human_solutions(whole):
    assert not (whole.iteration(1).completions / "pool.json").exists()
    problems = WordProblems("train", 24).load()
    found = rows(whole, 1, "iteration", "problem_id", "text", "weight")
    assert found == [(0, p.problem_id, p.reference_solution, 1.0) for p in problems]


def test_each_policy_draws_all_n_and_indices_do_not_meet(whole):
    folder, hashes = whole.iteration(2).completions, []
    for place, store in enumerate((folder, folder / "policy_2")):
        table = CompletionStore(store).read(["problem_id", "completion_index", "policy_hash"])
        counts = Counter(table["problem_id"].to_pylist())
        assert list(counts.values()) == [4] * 10
        assert set(table["completion_index"].to_pylist()) == set(range(4 * place, 4 * place + 4))
        hashes += set(table["policy_hash"].to_pylist())
    assert hashes == [policy_hash(whole.iteration(1).policy), policy_hash(EMBEDDED_POLICY)]


def test_only_what_nobody_solved_is_drawn_with_the_hint_and_trained_on_without(whole):
    folder = whole.iteration(2).completions
    plain = [CompletionStore(path).read() for path in (folder, folder / "policy_2")]
    usual, solved = {}, set()
    for table in plain:
        for row in table.to_pylist():
            usual[row["problem_id"]] = row["prompt_ids"]
            if row["verdict"] == "CORRECT" and row["finish_reason"] != "length":
                solved.add(row["problem_id"])
    hinted = CompletionStore(folder / "hint").read().to_pylist()
    assert {row["problem_id"] for row in hinted} == set(usual) - solved
    for row in hinted:
        assert row["completion_index"] >= 8
        assert row["prompt_ids"] != usual[row["problem_id"]]
    for iteration, problem_id, prompt_ids in rows(
        whole, 2, "iteration", "problem_id", "prompt_ids"
    ):
        assert iteration == 0 or prompt_ids == usual[problem_id]


def test_a_reused_pool_is_selected_from_again_and_nothing_is_drawn(whole):
    assert not whole.iteration(3).completions.exists()
    assert read_json(whole.iteration(3).manifest)["pool_iteration"] == 2
    drawn = read_json(whole.iteration(2).funnel)
    again = read_json(whole.iteration(3).funnel)
    assert again["completions"] == drawn["completions"]
    assert again["accepted"] > drawn["accepted"]  # its threshold is none


def test_earlier_completions_and_human_solutions_are_there_once(whole):
    addresses = rows(whole, 3, "iteration", "problem_id", "completion_index")
    assert len(set(addresses)) == len(addresses)
    assert set(rows(whole, 2, "iteration", "problem_id", "completion_index")) <= set(addresses)
    assert sum(iteration == 0 for iteration, *_ in addresses) == 24


def test_the_balance_sets_the_temperature_of_the_round(whole):
    balance = read_json(whole.iteration(2).path / "balance" / "balance.json")
    assert [row["temperature"] for row in balance["scores"]] == [0.5, 1.0]
    best = max(balance["scores"], key=lambda row: row["score"])
    table = CompletionStore(whole.iteration(2).completions).read(["problem_id", "sampling"])
    temperatures = {json.loads(text)["temperature"] for text in table["sampling"].to_pylist()}
    assert temperatures == {best["temperature"]}
    # They are tried on some of the problems, not on the first ones.
    drawn = list(dict.fromkeys(table["problem_id"].to_pylist()))
    tried = [
        CompletionStore(whole.iteration(2).path / "balance" / name).finished_problem_ids()
        for name in ("temperature_0.5", "temperature_1")
    ]
    assert tried[0] == tried[1]
    assert len(tried[0]) == 4
    assert tried[0] < set(drawn)
    assert tried[0] != set(drawn[:4])


def test_a_completion_that_was_drawn_twice_counts_once_in_the_balance(tmp_path):
    texts = [("7", CORRECT), ("7", CORRECT), ("8", CORRECT), ("9", WRONG), ("9", WRONG)]
    store = CompletionStore(tmp_path)
    store.write_part(
        0, [make_completion(kind, completion_index=i, text=t) for i, (t, kind) in enumerate(texts)]
    )
    assert count_selected(store, "correct") == [(2, 2)]  # a binary reward selects no wrong one
    assert count_selected(store, -0.5) == [(3, 2)]


def test_start_and_length_of_the_m_step_follow_the_iteration(whole):
    starts = [read_json(whole.iteration(i).manifest)["trained_from"] for i in (1, 2, 3)]
    previous = [str(whole.iteration(i).policy) for i in (1, 2)]
    assert starts == [str(EMBEDDED_POLICY), *previous]
    steps = [read_json(whole.iteration(i).metrics)["m_step"]["optimizer_steps"] for i in (1, 2, 3)]
    assert steps == [1, 2, 3]


def test_a_run_with_every_axis_resumes_to_the_same_end(whole, words, restem, copy_of, outcome):
    run = copy_of(whole.path)
    for iteration in (2, 3):
        paths = run.iteration(iteration)
        for path in (paths.manifest, paths.metrics, paths.funnel, paths.accepted):
            path.unlink()
        for path in (paths.policy, paths.m_step):
            path.rename(path.with_name(f"old_{path.name}"))
    CompletionStore(run.iteration(2).completions / "hint").delete_part(0)
    CompletionStore(run.iteration(2).completions / "policy_2").delete_part(1)
    CompletionStore(run.iteration(2).path / "balance" / "temperature_1").delete_part(0)
    (run.iteration(2).path / "balance" / "balance.json").unlink()
    assert restem(*words(run.path)).code == 0
    for iteration in (2, 3):
        assert outcome(run, iteration) == outcome(whole, iteration)


def test_the_optimizer_goes_on_where_the_m_step_before_left_it(
    restem, fit_words, tmp_path, outcome
):
    callback = {"class_path": "tests.loop.snapshots.Snapshots"}
    callback["init_args"] = {"folder": str(tmp_path)}
    changes = {
        "iterations": 2,
        "carry_optimizer": "true",
        "start_from": "previous",
        "stop.rule": "none",
        "trainer.max_steps": 4,
        "evaluation.n": 0,
        "trainer.callbacks": json.dumps([callback]),
    }
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "iteration_2_optimizer_step_3")
    assert restem(*fit_words(whole.path, **changes)).code == 0
    state = torch.load(whole.iteration(2).optimizer, weights_only=True)["state"]
    assert {int(one["step"]) for one in state.values()} == {8}
    assert not whole.iteration(1).optimizer.exists()
    assert restem(*fit_words(killed.path, **changes)).code == 0
    assert outcome(killed, 2) == outcome(whole, 2)


def test_a_run_ends_at_a_plateau_and_goes_no_further_when_called_again(restem, fit_words, tmp_path):
    changes = {"stop.rule": "none", "stop.at_plateau": "true", "model.learning_rate": 1e-12}
    for _ in range(2):
        result = restem(*fit_words(tmp_path / "run", iterations=5, **changes))
        assert result.code == 0, result.err
        assert RunDir(tmp_path / "run").finished_iterations() == [1, 2]
        assert "iteration_2/policy" in result.out


def test_e_steps_take_the_next_problems_of_an_endless_shuffle():
    problems = WordProblems("train", 10).load()
    counts = Counter()
    for index in range(10):
        some = problems_of_e_step(problems, 3, e_step_index=index, seed=1)
        assert len({one.problem_id for one in some}) == 3
        assert some == problems_of_e_step(problems, 3, e_step_index=index, seed=1)
        counts.update(one.problem_id for one in some)
    assert set(counts.values()) == {3}
    assert problems_of_e_step(problems, None, e_step_index=4, seed=1) == problems
    assert problems_of_e_step(problems, 99, e_step_index=4, seed=1) == problems
    assert problems_of_e_step(problems, 0, e_step_index=4, seed=1) == []


def test_a_sampler_with_another_tokenizer_is_refused(restem, fit_words, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(EMBEDDED_POLICY).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = restem(*fit_words(tmp_path / "run", **{"draw.policies": str(other)}))
    assert result.code == 2
    assert "must have the tokenizer of the policy" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draw.reuse_pool": "true"}, "must be false in iteration 1"),
        ({"carry_optimizer": "true"}, "needs start_from previous"),
        ({"draw.num_problems": 0}, "leaves nothing to train on"),
        ({"e_step.stop_at_quota": "true", "selection.rewards": "majority"}, "looks at all"),
        ({"e_step.stop_at_quota": "true", "selection.quota": "fail_rate", "hint": HINT}, "2 pools"),
        ({"carry_optimizer": "true", "start_from": "previous", "stop.rule": "none",
          "model.lora": '{"r": 2}'}, "fresh adapters"),
        ({"per_iteration": '{"seed_everything": [1, 2]}'}, "must be a setting of one of"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together_are_one_line(
    changes, message, restem, fit_words, tmp_path
):
    result = restem(*fit_words(tmp_path / "run", **changes))
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_values_that_are_not_allowed_are_refused():
    with pytest.raises(UserError, match=r"mix.human \(some\)"):
        MixParams(human="some")
    with pytest.raises(UserError, match="leaves nothing"):
        MixParams(model=False)
    with pytest.raises(UserError, match="at least one policy"):
        DrawParams(policies=[])
    with pytest.raises(UserError, match=r"num_problems \(-1\)"):
        DrawParams(num_problems=-1)
