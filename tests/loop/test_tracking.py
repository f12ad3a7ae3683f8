"""W&B: one run over all calls, named axes, nothing lost, nothing that stops a run."""

import json
import socket
import struct
import sys
import time

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from restem_lightning.errors import UserError
from restem_lightning.loop.journal import Journal
from restem_lightning.loop.redact import redact
from restem_lightning.loop.tracking import AXES, Tracker, TrackingParams
from restem_lightning.run_dir import open_run, read_json, write_json
from restem_lightning.settings import EMBEDDED_POLICY

BASE = str(EMBEDDED_POLICY)
BLOCK, WHOLE, LAST = 32768, 1, 4


def records(file):
    """Yields the records of an offline run's file (LevelDB's log format behind 7 bytes)."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < 7:
            place += left_in_block
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def of_type(file, name):
    """Returns the records of one type."""
    return [getattr(r, name) for r in records(file) if r.WhichOneof("record_type") == name]


def history(file):
    """Returns what was logged, one mapping of name -> value for each call."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in of_type(file, "history")
    ]


def files_of(run):
    return sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))


def finished_run(path, **settings):
    """A run folder with one iteration, made by hand but for its pool."""
    run = open_run(path, {"seed": 0, **settings})
    paths = run.iteration(1)
    paths.policy.mkdir(parents=True)
    (paths.policy / "shards").mkdir()
    for name in ("model.safetensors.index.json", "shards/model-1-of-2.safetensors"):
        (paths.policy / name).write_text(name)
    paths.accepted.write_bytes(b"rows")
    write_json(paths.funnel, {"completions": 8, "accepted": 2})
    metrics = {"iteration": 1, "evaluation": {}, "m_step": {"optimizer_steps": 3}}
    write_json(paths.metrics, metrics)
    write_json(paths.manifest, {"iteration": 1, "policy_hash": "abc"})
    return run


def test_both_calls_write_to_one_run_below_the_run_folder(tracked):
    files = files_of(tracked)
    assert len(files) == 2
    run_id = read_json(tracked.run_json)["wandb_run_id"]
    assert run_id
    assert {file.stem for file in files} == {f"run-{run_id}"}


def test_the_last_folder_holds_the_whole_run_with_the_steps_and_times_of_the_first(tracked):
    first, last = (history(file) for file in files_of(tracked))
    steps = [row["_step"] for row in last]
    assert steps == sorted(set(steps))
    assert [(row["_step"], row["_timestamp"]) for row in first] == [
        (row["_step"], row["_timestamp"]) for row in last[: len(first)]
    ]
    assert len(last) > len(first)


def test_every_axis_is_defined_and_never_goes_back(tracked):
    file = files_of(tracked)[-1]
    rows = history(file)
    for axis in AXES:
        values = [row[axis] for row in rows if axis in row]
        assert values == sorted(values), axis
    assert [row["iteration"] for row in rows if "iteration/iteration" in row] == [0, 1, 2]
    taken = [read_json(tracked.iteration(t).metrics)["m_step"]["optimizer_steps"] for t in (1, 2)]
    steps = [row["optimizer_step"] for row in rows if "m_step/train_loss" in row]
    assert len(steps) == len(set(steps)) == sum(taken)
    assert [row["samples_seen"] for row in rows if "e_step/completions" in row] == [96, 192]
    axes = {m.name or m.glob_name: m.step_metric for m in of_type(file, "metric")}
    assert set(AXES) <= set(axes)
    assert axes["iteration/*"] == axes["completions/*"] == "iteration"
    assert axes["e_step/*"] == axes["budget/*"] == "samples_seen"
    assert axes["m_step/*"] == "optimizer_step"


def test_metrics_carry_the_values_of_metrics_json(tracked):
    rows = [row for row in history(files_of(tracked)[-1]) if "iteration/iteration" in row]
    for row in rows:
        metrics = read_json(tracked.iteration(row["iteration"]).metrics)
        value = metrics["evaluation"]["held_out"]["pass@1"]["value"]
        assert row["iteration/evaluation/held_out/pass@1/value"] == value
        assert row["budget/held_out/pass@1"] == value
        if parity := metrics["e_step"].get("parity"):
            assert row["iteration/e_step/parity/kl"] == parity["kl"]
            assert row["iteration/e_step/num_skipped"] == 0


def test_best_of_k_by_a_learned_verifier_is_on_both_axes(tmp_path):
    run = finished_run(tmp_path)
    rate = {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 8}
    record = {"num_pairs": 3, "evaluation": {"held_out": {"best@2": rate}}}
    write_json(run.iteration(1).verifier_json, record)
    params = TrackingParams(wandb_project="t", wandb_mode="offline", table_rows=0)
    with Tracker(params, run, {}, base=BASE):
        pass
    row = history(files_of(run)[0])[-1]
    assert row["iteration/evaluation/held_out/best@2/value"] == row["budget/held_out/best@2"] == 0.5
    assert row["iteration"] == 1


def test_each_iteration_has_a_table_of_completions_of_its_own(tracked):
    file = files_of(tracked)[-1]
    entries = {name: value for row in history(file) for name, value in row.items()}
    for iteration in (1, 2):
        name = f"completions/iteration_{iteration}"
        assert entries[f"{name}/_type"] == "table-file"
        table = json.loads((file.parent / "files" / entries[f"{name}/path"]).read_text())
        assert table["columns"][:4] == ["iteration", "question", "problem_id", "completion_index"]
        assert len(table["data"]) == 96
        assert {row[0] for row in table["data"]} == {iteration}
        assert all(row[1] for row in table["data"])


def test_base_accepted_dataset_and_policy_are_artifacts_with_lineage(tracked):
    file, run_id = files_of(tracked)[-1], read_json(tracked.run_json)["wandb_run_id"]
    found = {
        (artifact.name, alias): artifact
        for artifact in of_type(file, "artifact")
        for alias in artifact.aliases
        if alias.startswith("iteration_")
    }
    names = ("base-policy", f"accepted-{run_id}", f"policy-{run_id}")
    wanted = {(names[0], "iteration_0")}
    wanted |= {(name, f"iteration_{t}") for name in names[1:] for t in (1, 2)}
    assert set(found) == wanted
    for (name, _), artifact in found.items():
        assert artifact.use_after_commit == (name != names[2])
    sources = [found[names[0], "iteration_0"], found[names[2], "iteration_1"]]
    for iteration, source in enumerate(sources, start=1):
        drawn_by = json.loads(found[names[1], f"iteration_{iteration}"].metadata)["drawn_by"]
        assert drawn_by == [json.loads(source.metadata)["policy_hash"]]
    second = found[names[1], "iteration_2"]
    (content,) = second.manifest.contents
    assert content.local_path == str(tracked.iteration(2).accepted)
    policy = found[names[2], "iteration_2"]
    assert json.loads(policy.metadata)["accepted"] == f"{names[1]}:iteration_2"
    assert "model.safetensors" in {content.path for content in policy.manifest.contents}


def test_the_resolved_settings_are_the_config_and_clash_with_no_file(tracked):
    for file in files_of(tracked):
        (begun,) = of_type(file, "run")
        config = {one.key: json.loads(one.value_json) for one in begun.config.update}
        assert config["sampling"]["temperature"] == 0.9
        assert config["model"]["schedule"] == "constant"  # of the config file
        assert config["data"]["tokens_per_micro_batch"] == 4096  # a default
    assert not (tracked.path / "config.yaml").exists()


def test_secrets_of_settings_and_command_line_stay_here(tmp_path, monkeypatch):
    secret = "hunter2" * 3
    monkeypatch.setattr(sys, "argv", ["restem", "fit", "--prompt.init_args.api_key", secret])
    settings = {"prompt": {"init_args": {"api_key": secret, "url": f"https://me:{secret}@host/x"}}}
    run = finished_run(tmp_path, **settings)
    params = TrackingParams(wandb_project="t", wandb_mode="offline")
    with Tracker(params, run, settings, base=BASE):
        pass
    assert sys.argv[-1] == secret
    for file in (tmp_path / "wandb").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_what_is_a_secret_is_told_from_what_only_sounds_like_one():
    kept = {"max_new_tokens": 96, "answer_tag": "x", "monkey_name": "george", "key": 3, "a": ["b"]}
    assert redact(kept) == kept
    for name in ("hf_token", "apiKey", "WANDB_API_KEY", "secret_word", "password", "keys"):
        assert redact({name: "abc"}) == {name: "***"}, name
    assert redact(["use hf_abcdefghijklmnop now"]) == ["use *** now"]


def test_a_policy_of_several_files_is_one_artifact_and_is_only_named_if_not_uploaded(tmp_path):
    for upload in (True, False):
        run = finished_run(tmp_path / str(upload))
        params = TrackingParams(
            wandb_project="t", wandb_mode="offline", table_rows=0, upload_policy=upload
        )
        with Tracker(params, run, {}, base=BASE):
            pass
        artifacts = of_type(files_of(run)[0], "artifact")
        (policy,) = [a for a in artifacts if a.name.startswith("policy-")]
        paths = {content.path for content in policy.manifest.contents}
        assert paths == {"model.safetensors.index.json", "shards/model-1-of-2.safetensors"}
        for content in policy.manifest.contents:
            assert bool(content.local_path) == upload
            assert content.ref.startswith("file://") != upload


def test_a_resumed_m_step_repeats_no_row_and_a_torn_line_is_dropped(tmp_path):
    run = finished_run(tmp_path)
    params = TrackingParams(wandb_project="t", wandb_mode="offline", table_rows=0)
    with Tracker(params, run, {}, base=BASE) as tracker:
        (logger,) = tracker.m_step_loggers(2)[1:]
        for step in (1, 2, 3):
            logger.log_metrics({"loss": step}, step)
    with (tmp_path / "tracking.jsonl").open("a") as file:
        file.write('{"step": 7, "ti')
    with Tracker(params, run, {}, base=BASE) as tracker:
        (logger,) = tracker.m_step_loggers(2)[1:]
        for step in (2, 3, 4):  # from the checkpoint of step 1
            logger.log_metrics({"loss": step}, step)
        logger.log_metrics({"val_reward": 0.5}, 4)
    rows = [row for row in history(files_of(run)[-1]) if "m_step/loss" in row]
    assert [row["optimizer_step"] for row in rows] == [4, 5, 6, 7]  # after 3 of iteration 1
    assert history(files_of(run)[-1])[-1]["m_step/val_reward"] == 0.5
    assert [entry.step for entry in Journal(tmp_path / "tracking.jsonl").entries] == list(range(10))


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_a_server_that_cannot_be_reached_costs_a_line_and_the_timeout(
    server, tmp_path, monkeypatch, capfd
):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "never answers":
            listening.listen(16)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        run = finished_run(tmp_path)
        params = TrackingParams(
            wandb_project="t", wandb_mode="online", table_rows=0, wandb_timeout_s=2.0
        )
        start = time.monotonic()
        with Tracker(params, run, {}, base=BASE):
            begun = time.monotonic()
    assert begun - start < 10
    assert time.monotonic() - begun < 10
    lines = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line]
    assert len(lines) == 2
    assert "goes on offline" in lines[0]
    assert f"wandb sync {tmp_path}" in lines[1]
    assert [row["iteration"] for row in history(files_of(run)[0])] == [1, 1]


def test_without_a_key_a_run_goes_on_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = finished_run(tmp_path)
    with Tracker(TrackingParams(wandb_project="t", table_rows=0), run, {}, base=BASE):
        pass
    assert "goes on offline" in capfd.readouterr().err
    assert files_of(run)


def test_what_cannot_be_sent_does_not_stop_the_run(tmp_path, capfd):
    run = finished_run(tmp_path)
    (tmp_path / "iteration_1" / "accepted.parquet").unlink()
    with Tracker(
        TrackingParams(wandb_project="t", wandb_mode="offline", table_rows=0), run, {}, base=BASE
    ):
        pass
    assert "accepted/1 failed" in capfd.readouterr().err
    assert "iteration/iteration" in history(files_of(run)[0])[-1]


@pytest.mark.parametrize("project", [None, "t"])
def test_without_a_project_or_where_w_and_b_is_disabled_nothing_is_tracked(
    project, tmp_path, monkeypatch
):
    if project is not None:
        monkeypatch.setenv("WANDB_MODE", "disabled")
    run = open_run(tmp_path, {"seed": 0})
    with Tracker(TrackingParams(wandb_project=project), run, {}, base=BASE) as tracker:
        tracker.catch_up()
        assert len(tracker.m_step_loggers(1)) == 1
    assert wandb.run is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "change", [{"wandb_mode": "dryrun"}, {"wandb_timeout_s": 0}, {"table_rows": 10_001}]
)
def test_a_value_that_is_not_allowed_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        TrackingParams(**change)
