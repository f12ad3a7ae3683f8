"""`restem plan` on a run small enough to be made, and what that run then took."""

import json

import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.plan.paper import DEVICES
from restem_lightning.run_dir import RunDir, read_json


@pytest.fixture(scope="module")
def plan_words(fit_words, tmp_path_factory):
    """Words of `restem fit` for a tiny run, without its verb, and its run folder."""
    run_dir = tmp_path_factory.mktemp("plan") / "run"
    return fit_words(run_dir, **{"preference.learn": "last"})[1:], run_dir


def planned(restem, words, *more):
    result = restem("plan", *words, "--plan.json", "true", *more)
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


def test_a_plan_foretells_the_run(restem, plan_words):
    words, run_dir = plan_words
    plan = planned(restem, words)
    assert not run_dir.exists()
    assert restem("fit", *words).code == 0
    run = RunDir(run_dir)
    drawn = 0
    for iteration in (0, 1):
        for pool in run.iteration(iteration).path.rglob("pool.json"):
            for batch in CompletionStore(pool.parent).iter_batches(["completion_ids"]):
                drawn += len(batch["completion_ids"].flatten())
    rows = {row["stage"]: row for row in plan["first"]}
    looks = rows["D_val"]["tokens"]
    assert plan["drawn_tokens"] - looks == pytest.approx(drawn, rel=0.2)
    assert rows["E-step"]["items"] == 24 * 4
    assert rows["evaluation (greedy)"]["items"] == 8
    assert plan["base"][0]["stage"] == "start"
    stored = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    assert plan["disk_bytes"] == pytest.approx(stored, rel=0.2)
    (verifier,) = plan["verifiers"]
    num_pairs = read_json(run.iteration(1).verifier_json)["num_pairs"]
    assert verifier["items"] == pytest.approx(num_pairs, rel=0.5)
    assert verifier["seconds"] > 0


def test_only_what_the_settings_ask_for_is_planned(restem, plan_words):
    words, _ = plan_words
    more = ("--e_step.parity_completions", "0", "--preference.learn", "never")
    plan = planned(restem, words, *more, "--plan.seconds", "1")
    assert plan["verifiers"] == []
    assert [row["stage"] for row in plan["first"]] == [
        "E-step",
        "M-step",
        "D_val",
        "evaluation (greedy)",
        "evaluation (sampled)",
    ]


def test_an_m_step_is_planned_where_the_trial_accepts_nothing(restem, plan_words):
    words, _ = plan_words
    more = ("--sampling.max_new_tokens", "1", "--preference.learn", "never")
    plan = planned(restem, words, *more, "--plan.seconds", "1")
    assert "accepted none" in plan["origin"]
    (m_step,) = (row for row in plan["first"] if row["stage"] == "M-step")
    assert m_step["items"] >= 2  # one completion, two epochs
    assert m_step["stored_bytes"] > 1e6


def test_on_paper_nothing_runs_and_more_devices_take_less_time(restem, plan_words):
    words, _ = plan_words
    paper = ("--plan.on", "h100", "--engine.device", "auto")
    one = planned(restem, words, *paper)
    eight = planned(restem, words, *paper, "--trainer.devices", "8")
    assert "on paper, h100" in one["origin"]
    assert eight["seconds"] < one["seconds"]
    assert one["memory_bytes"] < DEVICES["h100"].memory_bytes


def test_a_plan_counts_the_problems_of_an_e_step_and_names_what_it_leaves_out(restem, plan_words):
    words, _ = plan_words
    plan = planned(
        restem,
        *(words, "--plan.on", "h100", "--engine.device", "auto", "--draw.num_problems", "6"),
        *("--mix.human", "all", "--balance.temperatures", "[0.5]", "--trainer.max_epochs", "-1"),
    )
    rows = {row["stage"]: row for row in plan["first"]}
    assert rows["E-step"]["items"] == 6 * 4
    assert rows["M-step"]["items"] > 0
    assert plan["not_counted"] == ["balance", "mix", "trainer.max_epochs"]
    later = ("--iterations", "2", "--per_iteration", '{"draw": {"num_problems": [0, 12]}}')
    plan = planned(
        restem,
        *(words, "--plan.on", "h100", "--engine.device", "auto", "--mix.human", "all"),
        *later,
    )
    assert plan["later"][0]["items"] == 12 * 4


def test_mistakes_end_in_one_line(restem, plan_words):
    words, _ = plan_words
    for more, expected in (
        (("--plan.seconds", "0"), "plan.seconds (0.0) must be above 0"),
        (("--plan.on", "tpu"), "plan.on"),
        (("--sampling.n", "0"), "n (0) must be at least 1"),
        (("--iterations", "0"), "iterations (0) must be at least 1"),
    ):
        result = restem("plan", *words, *more)
        assert result.code == 2
        assert expected in result.err
        assert len(result.err.strip().splitlines()) == 1


def test_help_explains_the_plans_own_options(restem):
    result = restem("plan", "--help")
    assert result.code == 0
    for text in ("--plan.on", "--plan.seconds", "--sampling.n", "Says what the run"):
        assert text in result.out
