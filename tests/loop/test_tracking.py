"""W&B, offline: one run over all calls, named axes, nothing outside the run folder."""

import json
import struct

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from restem_lightning.errors import UserError
from restem_lightning.loop.tracking import Tracker, TrackingParams
from restem_lightning.run_dir import open_run, read_json

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


def history(file):
    """Returns what was logged, one mapping of name -> value for each call."""
    return [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records(file)
        if r.WhichOneof("record_type") == "history"
    ]


def test_both_calls_write_to_one_run_below_the_run_folder(tracked):
    files = sorted((tracked.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    run_id = read_json(tracked.run_json)["wandb_run_id"]
    assert run_id
    assert {file.stem for file in files} == {f"run-{run_id}"}


def test_iterations_and_optimizer_steps_are_axes_that_never_go_back(tracked):
    files = sorted((tracked.path / "wandb").glob("offline-run-*/*.wandb"))
    rows = [row for file in files for row in history(file)]
    iterations = [row["iteration"] for row in rows if "iteration/iteration" in row]
    assert iterations == [0, 1, 2]
    steps = [row["optimizer_step"] for row in rows if "optimizer_step" in row]
    assert steps == sorted(steps)
    taken = [read_json(tracked.iteration(t).metrics)["m_step"]["optimizer_steps"] for t in (1, 2)]
    assert sum(taken) - 1 <= max(steps) <= sum(taken)
    axes = {}
    for record in records(files[0]):
        if record.WhichOneof("record_type") == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    assert axes["iteration/*"] == "iteration"
    assert axes["m_step/*"] == "optimizer_step"


def test_metrics_carry_the_values_of_metrics_json(tracked):
    files = sorted((tracked.path / "wandb").glob("offline-run-*/*.wandb"))
    rows = [row for file in files for row in history(file) if "iteration/iteration" in row]
    for row in rows:
        metrics = read_json(tracked.iteration(row["iteration"]).metrics)
        value = metrics["evaluation"]["held_out"]["pass@1"]["value"]
        assert row["iteration/evaluation/held_out/pass@1/value"] == value
        if parity := metrics["e_step"].get("parity"):
            assert row["iteration/e_step/parity/kl"] == parity["kl"]
            assert row["iteration/e_step/num_skipped"] == 0


def test_completions_go_there_as_a_table(tracked):
    tables = list((tracked.path / "wandb").glob("offline-run-*/files/media/table/**/*.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"][:3] == ["iteration", "problem_id", "completion_index"]
    assert len(table["data"]) == 96


def test_without_a_project_nothing_is_tracked(tmp_path):
    run = open_run(tmp_path, {"seed": 0})
    with Tracker(TrackingParams(), run, {}) as tracker:
        assert tracker.wandb_run is None
    assert wandb.run is None
    assert not (tmp_path / "wandb").exists()


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="online or offline"):
        TrackingParams(wandb_mode="dryrun")
