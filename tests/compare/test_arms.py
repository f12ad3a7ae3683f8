"""Planning and running arms; the words here are cheap ones of `restem`, not of a whole fit."""

import fcntl

import pytest

from restem_lightning.compare.arms import Arm, ArmRun, plan_runs, run_all
from restem_lightning.errors import UserError
from restem_lightning.run_dir import RunDir, write_json


def test_an_arm_is_a_command_line_whose_own_settings_come_last(tmp_path):
    runs = plan_runs(
        {"a": Arm(), "b": Arm(configs=["b.yaml"], settings={"sampling.n": 24, "policy": "p"})},
        seeds=[0, 7],
        configs=["all.yaml"],
        settings={"sampling.n": 8, "problems.held_out": {"x": {"class_path": "c"}}},
        output=tmp_path,
    )
    assert [(run.arm, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 7), ("b", 7)]
    assert runs[3].words == (
        *("fit", "--config", "all.yaml", "--config", "b.yaml", "--sampling.n=24"),
        *('--problems.held_out={"x": {"class_path": "c"}}', "--policy=p"),
        *(f"--run_dir={tmp_path}/b/seed_7", "--seed_everything=7"),
        f"--e_step.pool_cache={tmp_path}/pools",
    )


@pytest.mark.parametrize("key", ["run_dir", "seed_everything", "e_step.pool_cache"])
def test_an_arm_may_not_set_what_the_comparison_sets(key, tmp_path):
    arms = {"a": Arm(settings={key: "1"})}
    with pytest.raises(UserError, match=rf"arms\.a sets {key}"):
        plan_runs(arms, seeds=[0], configs=[], settings={}, output=tmp_path)


@pytest.fixture
def arm_run(tmp_path):
    """Returns a run of any words of `restem`, with the run folder that a fit would make."""

    def make(name, *words):
        run = ArmRun(arm=name, seed=0, folder=tmp_path / name / "seed_0", words=words)
        write_json(RunDir(run.folder).run_json, {})
        return run

    return make


def test_a_run_that_fails_does_not_lose_the_others_and_is_run_again(arm_run):
    good, bad, also_good = (
        arm_run(name, words)
        for name, words in (("a", "--version"), ("b", "no_verb"), ("c", "--version"))
    )
    lines = []
    failed = run_all([good, bad, also_good], jobs=2, say=lines.append)
    assert list(failed) == [bad]
    assert failed[bad].startswith("exit status 2: restem no_verb: error: unknown verb")
    assert [run.is_finished() for run in (good, bad, also_good)] == [True, False, True]
    assert len(lines) == 3
    lines.clear()
    times = good.log.stat().st_mtime_ns
    assert list(run_all([good, bad, also_good], jobs=1, say=lines.append)) == [bad]
    assert lines[0] == "2 of 3 runs are finished already"
    assert good.log.stat().st_mtime_ns == times


def test_a_run_is_not_finished_for_other_words_or_another_content_of_its_config(arm_run, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("a: 1")
    run = arm_run("a", "--version", "--config", str(config))
    run.finish()
    assert run.is_finished()
    assert not arm_run("a", "--version").is_finished()
    config.write_text("a: 2")
    assert not run.is_finished()


def test_a_run_that_another_process_works_on_is_left_to_it(arm_run):
    run = arm_run("a", "--version")
    with open(run.folder.with_name("seed_0.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = run_all([run], jobs=1, say=lambda _: None)
    assert "another process" in failed[run]
    assert run_all([run], jobs=1, say=lambda _: None) == {}
