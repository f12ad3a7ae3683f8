import hashlib
import json
from pathlib import Path

import pytest

from restem_lightning.errors import UserError
from restem_lightning.run_dir import (
    TEMP_SUFFIX,
    RunDir,
    atomic_path,
    open_run,
    read_json,
    settings_hash,
    sha256_of,
    write_json,
)

SETTINGS = {"seed": 3, "sampling": {"n": 32, "temperature": 0.7}, "ks": (1, 4)}


def finish(run: RunDir, *iterations: int) -> None:
    for iteration in iterations:
        write_json(run.iteration(iteration).manifest, {"iteration": iteration})


def test_paths_follow_the_documented_layout(tmp_path):
    run = RunDir(tmp_path)
    two = run.iteration(2)
    paths = [run.run_json, run.report, two.completions, two.accepted, two.funnel, two.m_step]
    paths += [two.policy, two.metrics, two.manifest]
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "run.json",
        "report.html",
        "iteration_2/completions",
        "iteration_2/accepted.parquet",
        "iteration_2/funnel.json",
        "iteration_2/m_step",
        "iteration_2/policy",
        "iteration_2/metrics.json",
        "iteration_2/manifest.json",
    ]


def test_open_run_records_settings_and_origin(tmp_path):
    run = open_run(tmp_path / "runs" / "a", SETTINGS)
    record = read_json(run.run_json)
    assert record["settings"]["sampling"] == {"n": 32, "temperature": 0.7}
    assert record["settings_hash"] == settings_hash(SETTINGS)
    assert record["seed"] == 3
    assert record["wandb_run_id"] is None
    assert set(record["versions"]) == {
        "python",
        "torch",
        "lightning",
        "transformers",
        "restem_lightning",
    }
    assert "git_commit" in record
    assert record["created"]


def test_the_hash_ignores_the_order_of_keys_but_not_values():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})
    assert settings_hash({"a": 1, "b": 2}) != settings_hash({"a": 1, "b": 3})


def test_the_same_settings_resume_and_keep_the_wandb_run(tmp_path):
    open_run(tmp_path, SETTINGS).update_run(wandb_run_id="abc")
    run = open_run(tmp_path, json.loads(json.dumps(SETTINGS)))
    record = read_json(run.run_json)
    assert record["wandb_run_id"] == "abc"
    assert len(record["resumed"]) == 1


def test_other_settings_are_refused_with_each_difference_named(tmp_path):
    open_run(tmp_path, SETTINGS)
    other = {"seed": 3, "sampling": {"n": 16, "top_k": 40, "temperature": 0.7}, "ks": [1, 4]}
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, other)
    message = str(caught.value)
    assert "sampling.n was 32, now 16" in message
    assert "sampling.top_k was not set, now 40" in message
    assert "--run_dir" in message
    assert "temperature" not in message
    assert "ks" not in message
    assert "\n" not in message


def test_a_setting_within_a_list_of_mappings_is_named(tmp_path):
    open_run(tmp_path, {"callbacks": [{"patience": 1}, {"patience": 2}]})
    with pytest.raises(UserError, match=r"callbacks\.1\.patience was 2, now 5"):
        open_run(tmp_path, {"callbacks": [{"patience": 1}, {"patience": 5}]})


def test_free_keys_may_change(tmp_path):
    open_run(tmp_path, {"trainer": {"devices": 1}, "trainer_name": "a"})
    open_run(tmp_path, {"trainer": {"devices": 8}, "trainer_name": "a"}, free=("trainer",))
    with pytest.raises(UserError, match="trainer_name"):
        open_run(tmp_path, {"trainer": {"devices": 8}, "trainer_name": "b"}, free=("trainer",))


def test_a_folder_of_the_home_folder_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir("~/run").path == tmp_path / "run"


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.*--run_dir"):
        open_run(tmp_path / "file" / "run", SETTINGS)


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    with (
        RunDir(tmp_path / "run").held(),
        pytest.raises(UserError, match="another process"),
        RunDir(tmp_path / "run").held(),
    ):
        pass
    with RunDir(tmp_path / "run").held():
        pass


def test_a_folder_that_cannot_be_made_is_not_held(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.*--run_dir"), RunDir(tmp_path / "file").held():
        pass


def test_a_damaged_run_json_is_a_user_error(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(UserError, match=r"run\.json must be JSON"):
        open_run(tmp_path, SETTINGS)


def test_the_resume_point_is_the_first_iteration_without_a_manifest(tmp_path):
    run = RunDir(tmp_path)
    assert (run.finished_iterations(), run.resume_iteration()) == ([], 1)
    finish(run, 0, 1, 2, 4)
    write_json(run.iteration(3).metrics, {})
    assert (run.finished_iterations(), run.resume_iteration()) == ([1, 2], 3)


def test_iterations_are_listed_in_number_order(tmp_path):
    run = RunDir(tmp_path)
    finish(run, 10, 2, 0)
    (tmp_path / "iteration_old").mkdir()
    assert run.iterations() == [0, 2, 10]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_json_without_a_standard_form_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_resume_removes_what_a_killed_process_left_and_nothing_else(tmp_path):
    run = open_run(tmp_path, SETTINGS)
    leftover = run.iteration(1).completions / f".part-00000.parquet.12ab{TEMP_SUFFIX}"
    kept = run.iteration(1).completions / "part-00000.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    kept.touch()
    open_run(tmp_path, SETTINGS)
    assert not leftover.exists()
    assert kept.exists()


def test_sha256_of_a_file_longer_than_a_block(tmp_path):
    content = bytes(range(256)) * 5000
    path = Path(tmp_path / "a.bin")
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
