import numpy as np
import pytest

from restem_lightning.compare.table import (
    check_problems,
    compare_outcomes,
    read_outcome,
    text_table,
)
from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.run_dir import RunDir, write_json
from tests.factories import make_completion


def pool(folder, correct):
    """Writes a pool whose problems p0, p1, ... have these completions; 1 is CORRECT."""
    completions = [
        make_completion(
            problem_id=f"p{number}",
            completion_index=index,
            kind=VerdictKind.CORRECT if right else VerdictKind.WRONG,
        )
        for number, row in enumerate(correct)
        for index, right in enumerate(row)
    ]
    CompletionStore(folder).write_part(0, completions)


def iteration(run, number, greedy, sampled=(), steps=5):
    paths = run.iteration(number)
    pool(paths.path / "evaluation/held_out/greedy", [[right] for right in greedy])
    if sampled:
        pool(paths.path / "evaluation/held_out/sampled", sampled)
    if number:
        pool(paths.completions, [[1, 0], [0, 0], [1, 1]])
    if number == 1:
        pool(paths.path / "balance/0.7", [[1, 0]])
    e_step = {"num_completions": 40, "num_trained_on": 7} if number else {}
    metrics = {
        "evaluation": {"held_out": {"greedy_pass@1": {"value": sum(greedy) / len(greedy)}}},
        "e_step": e_step,
        "m_step": {"optimizer_steps": steps} if number else {},
    }
    write_json(paths.metrics, metrics)
    if number:
        write_json(paths.manifest, {})


@pytest.fixture
def run(tmp_path):
    """Two finished iterations and one that is not."""
    run = RunDir(tmp_path / "run")
    iteration(run, 0, [0, 0, 0, 0])
    iteration(run, 1, [0, 0, 1, 0])
    iteration(run, 2, [1, 0, 1, 0], [[1, 1], [0, 1], [0, 0], [1, 1]])
    run.iteration(3).path.mkdir()
    return run


def test_an_outcome_is_that_of_the_last_finished_iteration_with_the_budget_of_all(run):
    outcome = read_outcome(run.path, "held_out")
    assert outcome.greedy == {"p0": True, "p1": False, "p2": True, "p3": False}
    assert outcome.sampled == {"p0": (2, 2), "p1": (2, 1), "p2": (2, 0), "p3": (2, 2)}
    assert outcome.budget == {"samples": 6 + 2 + 6, "trained_on": 14, "optimizer_steps": 10}
    base = read_outcome(run.path, "held_out", iteration=0)
    assert (sum(base.greedy.values()), base.budget["samples"]) == (0, 0)


def test_a_run_without_that_set_or_without_an_iteration_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"evaluation_set \(test\) .* held_out"):
        read_outcome(run.path, "test")
    with pytest.raises(UserError, match="no finished iteration"):
        read_outcome(tmp_path / "nowhere", "held_out")


def outcomes_of(tmp_path, **arms):
    """Returns arm -> seed -> outcome of runs of one iteration with these greedy completions."""
    found = {}
    for arm, by_seed in arms.items():
        for seed, greedy in enumerate(by_seed):
            run = RunDir(tmp_path / arm / str(seed))
            iteration(run, 1, greedy)
            found.setdefault(arm, {})[seed] = read_outcome(run.path, "held_out")
    return found


def test_rows_hold_means_over_seeds_and_tests_against_the_control(tmp_path):
    outcomes = outcomes_of(
        tmp_path,
        plain=[[0, 0, 1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]],
        better=[[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    )
    rows = compare_outcomes(outcomes, "plain")
    assert rows["plain"]["versus_control"] == {}
    assert rows["plain"]["metrics"]["greedy_pass@1"]["value"] == pytest.approx(5 / 16)
    versus = rows["better"]["versus_control"]
    assert versus["greedy"]["value"] == pytest.approx(10 / 16)
    assert versus["greedy"]["low"] > 0
    # p0, p1, p3, p4, p5 and p2 are solved by more seeds, p7 by fewer, p6 by as many.
    assert versus["mcnemar"] == {"num_better": 6, "num_worse": 1, "p": 2 * (1 + 7) / 128}
    assert versus["mcnemar_by_seed"][0] == {"num_better": 5, "num_worse": 1, "p": 14 / 64}
    assert versus["mcnemar_by_seed"][1]["num_better"] == 6
    text = text_table(rows, control="plain")
    line = next(line for line in text.splitlines() if line.startswith("better"))
    assert "93.8 [" in line
    assert "+62.5 [" in line
    assert "6/1  " in line
    assert "0.125" in line


def test_only_seeds_that_both_have_are_paired(tmp_path):
    outcomes = outcomes_of(tmp_path, plain=[[0, 0]], other=[[1, 0], [1, 1]])
    rows = compare_outcomes(outcomes, "plain")
    assert rows["other"]["seeds"] == [0, 1]
    assert rows["other"]["metrics"]["greedy_pass@1"]["value"] == 0.75
    assert rows["other"]["versus_control"]["greedy"]["value"] == 0.5


def test_an_arm_stays_in_the_table_when_the_control_has_failed(tmp_path):
    outcomes = {**outcomes_of(tmp_path, other=[[1, 0]]), "plain": {}}
    rows = compare_outcomes(outcomes, "plain")
    assert list(rows) == ["other"]
    assert rows["other"]["versus_control"] == {}
    assert "50.0 [" in text_table(rows, control="plain")


def test_arms_measured_on_other_problems_are_not_compared(tmp_path):
    outcomes = outcomes_of(tmp_path, plain=[[0, 0, 1]], other=[[1, 0]])
    with pytest.raises(UserError, match="on 2 problems, the first run on 3, 2 of them the same"):
        check_problems(outcomes["other"][0], outcomes["plain"][0])


def test_pass_at_k_is_compared_too(tmp_path):
    outcomes = {}
    for arm, sampled in (
        ("plain", [[0, 0], [0, 1], [1, 1]]),
        ("other", [[0, 1], [0, 1], [1, 1]]),
    ):
        run = RunDir(tmp_path / arm)
        iteration(run, 1, [0, 0, 0], sampled)
        outcomes[arm] = {0: read_outcome(run.path, "held_out")}
    rows = compare_outcomes(outcomes, "plain")
    metrics = rows["other"]["metrics"]
    assert np.isclose(metrics["pass@1"]["value"], (0.5 + 0.5 + 1) / 3)
    assert np.isclose(metrics["pass@2"]["value"], 1.0)
    assert np.isclose(rows["other"]["versus_control"]["pass@2"]["value"], 1 / 3)
