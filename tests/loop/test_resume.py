"""A run killed anywhere ends like one that was never interrupted."""

import json
import shutil

import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.m_step import PolicyModule
from restem_lightning.run_dir import TEMP_SUFFIX, RunDir, read_json, write_json


@pytest.fixture
def resume(restem, fit_words, callbacks):
    """Goes on with a run to the end of its second iteration."""

    def go_on(run, **changes):
        settings = {"iterations": 2, "trainer.callbacks": callbacks, **changes}
        result = restem(*fit_words(run.path, **settings))
        assert result.code == 0, result.err
        return result

    return go_on


def undo(run, iteration, *, until):
    """Takes away what an iteration has written from a stage on, the last thing first."""
    paths = run.iteration(iteration)
    others = {"evaluation": paths.path / "evaluation", "parity": paths.path / "parity.json"}
    order = ["manifest", "metrics", "evaluation", "policy", "m_step", "parity", "funnel"]
    order.append("accepted")
    for name in order[: order.index(until) + 1]:
        path = others[name] if name in others else getattr(paths, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "moment",
    [
        "iteration_1_fit_start",
        "iteration_2_optimizer_step_3",
        "iteration_2_train_end",
        "iteration_2_fit_end",
    ],
)
def test_a_kill_in_the_m_step_changes_nothing(
    moment, snapshots, finished, copy_of, resume, outcome
):
    run = copy_of(snapshots / moment)
    assert not run.iteration(2).manifest.exists()
    resume(run)
    for iteration in (1, 2):
        assert outcome(run, iteration) == outcome(finished, iteration)


def test_a_kill_behind_the_last_optimizer_step_allowed_changes_nothing(
    restem, fit_words, outcome, tmp_path
):
    callback = {"class_path": "tests.loop.snapshots.Snapshots"}
    callback["init_args"] = {"folder": str(tmp_path)}
    changes = {"trainer.max_steps": 2, "stop.rule": "none", "evaluation.n": 0}
    changes["trainer.callbacks"] = json.dumps([callback])
    names = ("whole", "iteration_1_train_end", "iteration_1_fit_end")
    whole, *killed = (RunDir(tmp_path / name) for name in names)
    for run in (whole, *killed):
        assert restem(*fit_words(run.path, **changes)).code == 0
        assert outcome(run, 1) == outcome(whole, 1)


def test_a_policy_that_is_there_is_not_trained_again(
    restem, fit_words, outcome, monkeypatch, tmp_path
):
    callback = {"class_path": "tests.loop.snapshots.Snapshots"}
    callback["init_args"] = {"folder": str(tmp_path)}
    # An optimizer step behind the last look: what is resumed from is not the last weights.
    changes = {"trainer.max_steps": 4, "trainer.val_check_interval": 3, "stop.rule": "none"}
    changes["trainer.callbacks"] = json.dumps([callback])
    whole, killed = (RunDir(tmp_path / name) for name in ("whole", "iteration_1_fit_end"))
    assert restem(*fit_words(whole.path, **changes)).code == 0
    assert killed.iteration(1).policy.exists()
    trained = []
    monkeypatch.setattr(PolicyModule, "training_step", lambda *batch: trained.append(batch))
    resumed = restem(*fit_words(killed.path, **changes))
    assert resumed.code == 0, resumed.err
    assert not trained
    assert outcome(killed, 1) == outcome(whole, 1)


@pytest.mark.parametrize("until", ["manifest", "metrics", "parity", "accepted"])
def test_a_kill_between_stages_changes_nothing(until, finished, copy_of, resume, outcome):
    run = copy_of(finished.path)
    undo(run, 2, until=until)
    resume(run)
    assert outcome(run, 2) == outcome(finished, 2)


@pytest.mark.parametrize("num_left", [1, 3])
def test_a_kill_in_the_e_step_changes_nothing(num_left, finished, copy_of, resume, outcome):
    run = copy_of(finished.path)
    undo(run, 2, until="accepted")
    folder = run.iteration(2).completions
    store = CompletionStore(folder)
    kept = {part.path: part.path.read_bytes() for part in store.parts()[:num_left]}
    for part in store.parts()[num_left:]:
        store.delete_part(part.index)
    (folder / f".part-00003.parquet.0123{TEMP_SUFFIX}").write_bytes(b"half a part")
    (folder / "part-00003.parquet").write_bytes(b"a part whose index entry was not written")
    resume(run)
    assert outcome(run, 2) == outcome(finished, 2)
    assert {path: path.read_bytes() for path in kept} == kept
    assert not list(run.path.rglob(f"*{TEMP_SUFFIX}"))


def test_a_finished_run_does_nothing_more(finished, copy_of, resume):
    run = copy_of(finished.path)
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("iteration_*/**/*")}
    resume(run)
    assert {path: path.stat().st_mtime_ns for path in run.path.glob("iteration_*/**/*")} == before


def test_what_a_kill_behind_the_manifest_has_left_goes(finished, copy_of, resume):
    run = copy_of(finished.path)
    left = [run.iteration(2).m_step / "last-4.ckpt", run.iteration(2).accepted.with_suffix(".ids")]
    left.append(run.iteration(1).optimizer)
    for path in left:
        path.touch()
    carried = run.iteration(2).optimizer  # the next iteration, if one comes, goes on with it
    carried.touch()
    resume(run)
    assert [path for path in (*left, carried) if path.exists()] == [carried]


def test_one_iteration_and_then_another_equal_two(finished, tracked, outcome):
    for iteration in (1, 2):
        assert outcome(tracked, iteration) == outcome(finished, iteration)


def test_seconds_go_on_counting_where_a_stage_was_stopped(finished, copy_of, resume):
    run = copy_of(finished.path)
    undo(run, 2, until="accepted")
    CompletionStore(run.iteration(2).completions).delete_part(3)
    path = run.iteration(2).path / "seconds.json"
    write_json(path, {"e_step": 1000.0})
    resume(run)
    assert 1000 < read_json(path)["e_step"] < 1100
    assert read_json(run.iteration(2).metrics)["seconds"]["e_step"] > 1000


def test_other_settings_are_refused_with_the_key_and_both_values(
    finished, copy_of, restem, fit_words, callbacks
):
    run = copy_of(finished.path)
    changes = {"iterations": 2, "trainer.callbacks": callbacks, "sampling.top_k": 7}
    result = restem(*fit_words(run.path, **changes))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "sampling.top_k was 40, now 7" in result.err
    assert "--run_dir" in result.err


def test_a_mistake_found_before_the_run_begins_does_not_bind_the_folder(
    restem, fit_words, tmp_path
):
    missing = (
        '{"class_path": "restem_lightning.problems.JsonlProblems", "init_args": {"path": "x"}}'
    )
    refused = restem(*fit_words(tmp_path / "run", **{"problems.train": missing}))
    assert refused.code == 2
    assert not (tmp_path / "run").exists()


def test_an_e_step_of_changed_problems_is_refused_in_one_short_line(
    finished, copy_of, restem, fit_words, callbacks
):
    run = copy_of(finished.path)
    undo(run, 2, until="accepted")
    pool = run.iteration(2).completions / "pool.json"
    record = read_json(pool)
    record["settings"]["problems_hash"] = "0" * 64
    write_json(pool, record)
    result = restem(*fit_words(run.path, iterations=2, **{"trainer.callbacks": callbacks}))
    assert result.code == 2
    assert "problems_hash" in result.err
    assert len(result.err) < 600
